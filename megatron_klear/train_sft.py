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
        Evaluation(session, heldout) as evaluation,
        open_loader(reader, settings.data, session.context.device) as loader,
        SequenceLog(session, data) as sequences,
    ):
        for step in session.steps():
            plan = steps.next_step()  # (a, s) ~ teacher data
            with session.phase("wait_for_data"):
                batch = loader.next_step()
            with session.phase("train"):
                report = session.trainer.update_packed(batch.minibatch, unused, step=step)  # Eq. 8
            sequences.note(step, plan)
            evaluation.when_due(step)
            session.finish_step(step, update_metrics([report]))
        evaluation.at_end()


def main(settings: Settings, stop: StopRequest) -> None:
    """Read the data, open the session, train, report."""
    from megatron_klear.data import load_chat_tokenizer, load_prompts, require_disjoint
    from megatron_klear.model.precision import require_hardware
    from megatron_klear.session.grading import require_gradable
    from megatron_klear.session.session import Session
    from megatron_klear.session.sft_rows import open_sft_data, sft_steps

    require_hardware(settings)
    chat = load_chat_tokenizer(
        settings.tokenizer.dir, think_start=settings.tokenizer.think_start, think_end=settings.tokenizer.think_end,
        stop_tokens=settings.rollout.stop_tokens,
    )  # fmt: skip
    data = open_sft_data(settings, stop)
    heldout = None
    if settings.data.heldout:
        heldout = load_prompts(
            settings.data.heldout, chat, max_prompt_tokens=settings.data.max_prompt_tokens,
            oversize=settings.data.oversize, setting="data.heldout",
        )  # fmt: skip
        require_gradable(heldout, "data.heldout", settings)
        require_disjoint(heldout.keys(), {"data.sft": data.keys()})
    steps = sft_steps(settings, data)
    total = settings.sft.steps or steps.steps_for_epochs(settings.sft.epochs or 1)
    with Session("sft", settings, stop, chat=chat, total_steps=total) as session:
        session.restore_cursor(steps)
        session.describe(data.described())
        train(session, data, steps, heldout)
        session.export()
        session.write_report()


if __name__ == "__main__":
    leave(run_entry("sft", main))
