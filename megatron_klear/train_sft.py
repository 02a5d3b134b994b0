"""Long chain-of-thought supervised fine-tuning (Eq. 8).

    torchrun --nproc-per-node N -m megatron_klear.train_sft CONFIG.yaml [a.b=c ...]

Imports inside the functions keep torch out until the settings have been judged.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from megatron_klear.config import Settings
from megatron_klear.session.launch import StopRequest, leave, run_entry

if TYPE_CHECKING:
    from megatron_klear.data import PromptData, SftData, Steps
    from megatron_klear.session.session import Session


def train(session: Session, data: SftData, steps: Steps, heldout: PromptData | None) -> None:
    """Rows -> weights 1/N -> packs -> forward, fused loss, backward -> update, until the last step."""
    from megatron_klear.algorithm import PolicyObjective
    from megatron_klear.evaluation.during_training import write_heldout
    from megatron_klear.session.closing import told_at_once
    from megatron_klear.session.evaluation import Evaluation
    from megatron_klear.session.metrics import update_metrics
    from megatron_klear.session.sft_rows import SequenceLog
    from megatron_klear.trainer import PackLayout, SftReader, open_loader

    settings = session.settings
    unused = PolicyObjective()  # SFT rows have no policy weight, so the policy loss is 0 whatever its kind
    reader = SftReader(  # reads ahead; `steps` itself stays where training is, for checkpoints
        data, copy.deepcopy(steps), PackLayout.of(settings, session.context),
        num_steps=session.total_steps - session.step, normalizer=settings.sft.normalizer,
    )  # fmt: skip
    with (
        Evaluation(session, heldout, write_heldout) as evaluation,
        open_loader(reader, settings.data, session.context.device) as loader,
        SequenceLog(session, data) as sequences,
        told_at_once(),
    ):
        if session.step:  # fine-tuning has no figures of step 0; an earlier life may have left out later ones
            evaluation.at_start()
        for step in session.steps():
            plan = steps.next_step()  # (a, s) ~ teacher data
            with session.phase("wait_for_data"):
                batch = loader.next_step()
            with session.phase("train"):
                report = session.trainer.update_packed(batch.minibatch, unused, step=step)  # Eq. 8
            sequences.note(step, plan, trained=batch.plan)
            evaluation.when_due(step)
            session.finish_step(step, update_metrics([report]))
        evaluation.at_end()


def main(settings: Settings, stop: StopRequest) -> None:
    """Read the data, open the session, train, report."""
    from megatron_klear.data import load_prompts, require_disjoint, sft_steps
    from megatron_klear.model.precision import require_hardware
    from megatron_klear.session.grading import require_gradable
    from megatron_klear.session.session import Session
    from megatron_klear.session.sft_balance import warn_of_waiting
    from megatron_klear.session.sft_rows import open_sft_data, tell_rows
    from megatron_klear.session.tokenizer import run_tokenizer
    from megatron_klear.trainer import PackLayout

    require_hardware(settings)
    chat = run_tokenizer(settings)
    data = open_sft_data(settings, stop)
    heldout = None
    if settings.data.heldout:
        heldout = load_prompts(
            settings.data.heldout, chat, max_prompt_tokens=settings.data.max_prompt_tokens,
            oversize=settings.data.oversize, setting="data.heldout",
        )  # fmt: skip
        require_gradable(heldout, "data.heldout", settings)
        require_disjoint(heldout.keys(), {"data.sft": data.keys()})
    steps = sft_steps(settings, data.lengths, data.fingerprint)
    total = settings.sft.steps or steps.steps_for_epochs(settings.sft.epochs or 1)
    with Session("sft", settings, stop, chat=chat, total_steps=total) as session:
        session.restore_cursor(steps)
        if settings.sft.epochs:
            session.end_at(session.step + steps.steps_for_epochs(settings.sft.epochs))
        session.describe(f"{data.described()}; {steps.described()}")
        if session.is_first:
            tell_rows(data)
            warn_of_waiting(settings, data, steps, PackLayout.of(settings, session.context))
        train(session, data, steps, heldout)
        session.export()
        session.write_report()


def expected_waiting(settings: Settings, world_size: int) -> str:
    """Lines for `--check`: which lengths are known, and whether data-parallel ranks would wait for one another."""
    from megatron_klear.planning import StoredLengths, expected_evenness, stored_lengths
    from megatron_klear.session.waiting import word_on_waiting

    dp = world_size // (settings.parallel.tp * settings.parallel.pp * settings.parallel.cp)
    if dp == 1:
        return ""
    lengths = stored_lengths(settings)
    stored, why_assumed = (lengths, "") if isinstance(lengths, StoredLengths) else (None, lengths)
    even, mean_tokens, told = expected_evenness(settings, dp, stored, why_assumed)
    word = word_on_waiting(settings, slowest=even.slowest, mean_tokens=mean_tokens, dp=dp)
    word = word or f"the slowest of {dp} data-parallel ranks has {even.slowest - 1:.1%} more to do than the mean"
    return f"lengths: {told}\nwaiting: {word}\n"


if __name__ == "__main__":
    leave(run_entry("sft", main, more_outlook=expected_waiting))
