"""The rollout ledger in a run whose ranks generate together: each step is written down, and recalled after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.data import DataCursor, PromptData
from megatron_klear.records import Grade, Prompt, RolloutGroup, ScoredGroup
from megatron_klear.rollout.ledger import (
    LEDGER_FILE,
    Ledger,
    LedgerPosition,
    LedgerReader,
    position,
    reconcile,
    replay_step,
    scored_group,
)
from megatron_klear.session.rollouts import Rollouts
from megatron_klear.session.session import Session


def reconcile_with_checkpoint(ledger: Ledger, session: Session, prompts: PromptData) -> None:
    """Make the ledger agree with what the run resumes from; on rank 0.

    Raises:
        CheckpointError: it is not the ledger of the run's checkpoint.
    """
    settings = session.settings
    stored = None if session.resumed is None else session.resumed.get("ledger")
    first_weights = (settings.model, settings.checkpoint.start_from, settings.run.seed, prompts.fingerprint)
    reconcile(
        ledger,
        session.step,
        None if stored is None else LedgerPosition.from_json(stored),
        identity=hashlib.blake2b(repr(first_weights).encode(), digest_size=16).hexdigest(),
        prompts={prompt.prompt_id: prompt for prompt in prompts.prompts},
        num_responses=settings.rollout.responses_per_prompt,
        # Otherwise the order of the data alone says which groups a step has.
        keep_next_step=settings.scheduling.order == "completion",
    )


class RunLedger:
    """Where a step's groups come from: the ledger, where an earlier life of the run left them, else the engines.

    Rank 0 reads and writes; what fails there fails on all ranks. With `scheduling.replay_from` the groups are those
    of another run's steps, and nothing is generated or written.

    Args:
        session: the run; its checkpoints get the ledger's position.
        prompts: the data that steps are drawn from.

    Raises:
        CheckpointError: the ledger cannot be used, or is not the one of the run's checkpoint.
    """

    def __init__(self, session: Session, prompts: PromptData) -> None:
        self.session, self._prompts = session, prompts
        self._close = ExitStack()
        self._ledger: Ledger | None = None
        self._reader: LedgerReader | None = None
        together("open the rollout ledger", self._open, session.context, only_first=True)
        session.ledger_position = self._position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def groups(self, step: int, cursor: DataCursor, rollouts: Rollouts) -> list[ScoredGroup]:
        """The scored groups of a step, in the order of its prompts, the same on every rank.

        Args:
            step: to train.
            cursor: walks over the data; moved on by one batch.
            rollouts: generates and grades what is not there yet, with the weights that precede the step.
        """
        first = cursor.rows_taken
        batch = [self._prompts.prompts[i] for i in cursor.next_batch()]
        if self.session.settings.scheduling.replay_from is not None:
            with self.session.phase("replay"):
                return self._scored(agree("replay a step", lambda: self._replayed(step), self.session.context))
        keyed = [((first + i) // len(self._prompts), prompt) for i, prompt in enumerate(batch)]
        recalled = self._scored(
            agree("read the rollout ledger", lambda: self._recalled(step, keyed), self.session.context)
        )
        known = {group.group.prompt.prompt_id: group for group in recalled}
        missing = [prompt for prompt in batch if prompt.prompt_id not in known]
        fresh = rollouts.score(missing, rollouts.generate(missing, step=step)) if missing else []
        together(
            "write the rollout ledger", lambda: self._record(step, keyed, fresh), self.session.context, only_first=True
        )
        known.update({group.group.prompt.prompt_id: group for group in fresh})
        return [known[prompt.prompt_id] for prompt in batch]

    def trained(self, step: int) -> None:
        """Note that the updates of a step are done; before its checkpoint.

        With `scheduling.rollout_only` there were none, and the groups stay promised to the step, to be replayed.
        """
        if self.session.settings.scheduling.rollout_only:
            return
        together("write the rollout ledger", lambda: self._trained(step), self.session.context, only_first=True)

    @contextmanager
    def publishing(self, version: int) -> Iterator[None]:
        """Around a publish; the ranks that generate are the ones that publish, so nothing is in flight."""
        yield

    @contextmanager
    def sharing_engines(self) -> Iterator[None]:
        """Around an evaluation; nothing else is generated meanwhile."""
        yield

    def _open(self) -> None:
        settings, session = self.session.settings, self.session
        source = settings.scheduling.replay_from
        if source is not None:
            self._reader = self._close.enter_context(LedgerReader(Path(source) / LEDGER_FILE))
            return
        self._ledger = self._close.enter_context(Ledger(session.root / LEDGER_FILE))
        reconcile_with_checkpoint(self._ledger, session, self._prompts)

    def _position(self) -> dict[str, Any] | None:
        return None if self._ledger is None else position(self._ledger, self.session.step).to_json()

    def _replayed(self, step: int) -> list[tuple[RolloutGroup, tuple[Grade, ...]]]:
        assert self._reader is not None
        std = self.session.settings.algorithm.advantage_std
        return [(group.group, group.grades) for group in replay_step(self._reader, step, normalize_std=std)]

    def _recalled(self, step: int, keyed: Sequence[tuple[int, Prompt]]) -> list[tuple[RolloutGroup, tuple[Grade, ...]]]:
        """Reserve the step's groups, and take those whose responses are there and from the current weights."""
        ledger = self._ledger
        assert ledger is not None
        ids = ledger.reserve(keyed, num_responses=self.session.settings.rollout.responses_per_prompt)
        found = []
        for group_id in ids:
            [stored] = ledger.load([group_id])
            if stored.state in ("graded", "committed") and stored.oldest_version == step - 1:
                found.append((stored.rollout_group(), tuple(stored.grades[i] for i in range(stored.num_responses))))
            elif stored.rollouts:
                ledger.replace_responses(group_id, {}, why=f"not sampled by the weights before step {step}")
        return found

    def _record(self, step: int, keyed: Sequence[tuple[int, Prompt]], fresh: Sequence[ScoredGroup]) -> None:
        """Write down what was generated, and promise the whole batch to the step, in one transaction."""
        ledger = self._ledger
        assert ledger is not None
        with ledger.transaction():
            ids = ledger.reserve(keyed, num_responses=self.session.settings.rollout.responses_per_prompt)
            by_prompt = {prompt.prompt_id: group_id for (_, prompt), group_id in zip(keyed, ids, strict=True)}
            for scored in fresh:
                group_id = by_prompt[scored.group.prompt.prompt_id]
                for index, rollout in enumerate(scored.group.rollouts):
                    ledger.save_response(group_id, index, rollout)
                ledger.save_grades(group_id, scored.grades)
            ledger.commit(step, ids)

    def _trained(self, step: int) -> None:
        keep = self.session.settings.scheduling.keep_steps
        if self._ledger is not None:
            self._ledger.trained(step)
            if keep:
                self._ledger.prune(step - keep)

    def _scored(self, found: Sequence[tuple[RolloutGroup, tuple[Grade, ...]]]) -> list[ScoredGroup]:
        std = self.session.settings.algorithm.advantage_std
        return [scored_group(group, grades, normalize_std=std) for group, grades in found]
