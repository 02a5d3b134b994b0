"""Long chain-of-thought supervised fine-tuning (Eq. 8).

    torchrun --nproc-per-node N -m megatron_klear.train_sft CONFIG.yaml [a.b=c ...]

Imports inside the functions keep torch out until the settings have been judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_klear.config import Settings
from megatron_klear.session.launch import StopRequest, leave, run_entry

if TYPE_CHECKING:
    from megatron_klear.data import DataCursor, PromptData, SftData
    from megatron_klear.session.session import Session


def train(session: Session, data: SftData, cursor: DataCursor, heldout: PromptData | None) -> None:
    """Rows -> weights 1/N -> packs -> forward, fused loss, backward -> update, until the last step."""
    from megatron_klear.algorithm import PolicyObjective
    from megatron_klear.session.evaluation import Evaluation
    from megatron_klear.session.metrics import update_metrics
    from megatron_klear.trainer import sft_minibatch

    settings = session.settings
    unused = PolicyObjective()  # SFT rows have no policy weight, so the policy loss is 0 whatever its kind
    with Evaluation(session, heldout) as evaluation:
        for step in session.steps():
            rows = [data.examples[i] for i in cursor.next_batch()]  # (a, s) ~ teacher data
            batch = sft_minibatch(
                [(row.sequence_id, row.token_ids, row.trained_mask) for row in rows], settings.sft.normalizer
            )
            with session.phase("train"):
                report = session.trainer.update(batch, unused, step=step)  # Eq. 8
            evaluation.when_due(step)
            session.finish_step(step, update_metrics([report]))
        evaluation.at_end()


def require_positions(data: SftData, limit: int) -> None:
    """Refuse conversations that are longer than the model has positions.

    Raises:
        DataError: names them and the setting.
    """
    from megatron_klear.errors import DataError

    long = [f"{row.sequence_id} ({len(row.token_ids)})" for row in data.examples if len(row.token_ids) > limit]
    if long:
        raise DataError(
            f"data.sft: {len(long)} conversations are longer than model.max_position_embeddings = {limit}: "
            f"{', '.join(long[:8])}; to leave them out, set packing.token_budget={limit} packing.oversize=drop"
        )


def main(settings: Settings, stop: StopRequest) -> None:
    """Read the data, open the session, train, report."""
    from megatron_klear.data import DataCursor, load_chat_tokenizer, load_prompts, load_sft, require_disjoint
    from megatron_klear.model.precision import require_hardware
    from megatron_klear.packing import sequence_multiple
    from megatron_klear.session.policy import require_gradable
    from megatron_klear.session.session import Session

    require_hardware(settings)
    chat = load_chat_tokenizer(
        settings.tokenizer.dir, think_start=settings.tokenizer.think_start, think_end=settings.tokenizer.think_end,
        stop_tokens=settings.rollout.stop_tokens,
    )  # fmt: skip
    data = load_sft(
        settings.data.sft,
        chat,
        token_budget=settings.packing.token_budget,
        multiple=sequence_multiple(settings.parallel.cp),
        oversize=settings.packing.oversize,
    )
    require_positions(data, settings.yarn.training_positions(settings.architecture))
    heldout = None
    if settings.data.heldout:
        heldout = load_prompts(
            settings.data.heldout, chat, max_prompt_tokens=settings.data.max_prompt_tokens,
            oversize=settings.data.oversize, setting="data.heldout",
        )  # fmt: skip
        require_gradable(heldout, "data.heldout")
        require_disjoint(heldout.keys(), {"data.sft": data.keys()})
    cursor = DataCursor(
        len(data),
        settings.sft.batch_sequences,
        seed=settings.run.seed,
        shuffle=settings.data.shuffle,
        fingerprint=data.fingerprint,
    )
    steps = settings.sft.steps or cursor.steps_for_epochs(settings.sft.epochs or 1)
    with Session("sft", settings, stop, chat=chat, total_steps=steps) as session:
        session.restore_cursor(cursor)
        session.describe(f"{len(data)} conversations, {len(data.dropped_ids)} dropped for their length")
        train(session, data, cursor, heldout)
        session.export()
        session.write_report()


if __name__ == "__main__":
    leave(run_entry("sft", main))
