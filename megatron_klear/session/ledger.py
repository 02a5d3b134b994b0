"""The rollout ledger in a run whose ranks generate together: each step is written down, and recalled after a kill."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.data import DataCursor, PromptData
from megatron_klear.records import Grade, Prompt, Rollout, RolloutGroup, ScoredGroup
from megatron_klear.rollout import RolloutCallback
from megatron_klear.rollout.ledger import (
    LEDGER_FILE,
    ROLLOUT_ONLY,
    Ledger,
    LedgerPosition,
    LedgerReader,
    check_replay,
    open_groups,
    position,
    reconcile,
    replay_step,
    require_steps,
    scored_group,
)
from megatron_klear.session.finished_groups import FinishedGroups, enter_left_behind, forget_left_behind
from megatron_klear.session.first_weights import first_weights_identity
from megatron_klear.session.recorded import Recorded
from megatron_klear.session.rollouts import Rollouts
from megatron_klear.session.session import Session
from megatron_klear.session.terms import run_terms
from megatron_klear.session.walk import caught_up, next_prompts

log = logging.getLogger(__name__)


def reconcile_with_checkpoint(
    ledger: Ledger, session: Session, prompts: PromptData, *, keep_next_step: bool
) -> list[tuple[int, str]]:
    """Make the ledger agree with what the run resumes from and with its settings; on rank 0.

    Args:
        ledger: of the run.
        session: the run.
        prompts: the data that steps are drawn from.
        keep_next_step: see `reconcile`.

    Returns:
        (epoch, prompt_id) of the groups that are not trained, in the ledger's order.

    Raises:
        CheckpointError: it is not the ledger of the run's checkpoint, or lacks steps that were only recorded.
    """
    settings = session.settings
    saved = None if session.resumed is None else session.resumed.get("ledger")
    stored = None if saved is None else LedgerPosition.from_json(saved)
    entered = enter_left_behind(ledger, session.root)
    found = reconcile(
        ledger,
        session.step,
        stored,
        identity=first_weights_identity(session, prompts.fingerprint),
        prompts={prompt.prompt_id: prompt for prompt in prompts.prompts},
        num_responses=settings.rollout.responses_per_prompt,
        terms=run_terms(settings, session.chat),
        keep_next_step=keep_next_step,
        rollout_only=settings.scheduling.rollout_only,
    )
    forget_left_behind(session.root)
    # Those of weights that are gone, or of other settings, are not among them any more.
    kept = sum(group.state != "reserved" for group in ledger.load(entered))
    if kept:
        log.info("%d prompt groups were finished when the run was ended; they are not drawn again", kept)
    other = found.other_terms
    if other.why:
        log.warning(
            "prompt groups in flight under other settings: %d are drawn anew, %d are graded anew (%s)",
            other.redrawn, other.regraded, other.why,
        )  # fmt: skip
    return [(epoch, prompt_id) for _, epoch, prompt_id in open_groups(ledger)]


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
        self._finished = FinishedGroups(session.root, session.context.world.rank)
        self._close = ExitStack()
        self._ledger: Ledger | None = None
        self._reader: LedgerReader | None = None
        self._open_groups: list[tuple[int, str]] = []  # as the run found them
        self._pending: list[tuple[int, Prompt]] | None = None
        """Prompts that the cursor has passed and that are not trained, the oldest first; None before the first step."""
        together("open the rollout ledger", self._open, session.context, only_first=True)
        session.ledger_position = self._position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def groups(self, step: int, cursor: DataCursor, rollouts: Rollouts | Recorded) -> list[ScoredGroup]:
        """The scored groups of a step, in the order of its prompts, the same on every rank.

        Args:
            step: to train.
            cursor: walks over the data; moved on by one batch, unless enough prompts that it has passed are not
                trained, and at the first step past all that the ledger has in flight.
            rollouts: generates and grades what is not there yet, with the weights that precede the step.

        Raises:
            Preempted: when any rank was asked to stop meanwhile; groups that are whole are kept for the next life.
        """
        if self.session.settings.scheduling.replay_from is not None:
            cursor.next_batch()
            with self.session.phase("replay"):
                return self._scored(agree("replay a step", lambda: self._replayed(step), self.session.context))
        assert not isinstance(rollouts, Recorded)
        before = cursor.state_dict()
        drawn, keyed = self._next(cursor)
        batch = [prompt for _, prompt in keyed]
        graded, ungraded = agree(
            "read the rollout ledger", lambda: self._recalled(step, drawn, keyed), self.session.context
        )
        known = {group.group.prompt.prompt_id: group for group in self._scored(graded)}
        fresh = rollouts.score_stored(ungraded) if ungraded else []
        known.update({group.group.prompt.prompt_id: group for group in fresh})
        missing = [prompt for prompt in batch if prompt.prompt_id not in known]
        if missing:
            mine = rollouts.generate(missing, step=step, on_rollout=self._keeper(keyed))
            scored = rollouts.score(missing, mine)
            if scored is None:
                cursor.load_state(before)  # the checkpoint is that of the step before, whose next one has this batch
                self.session.stop_if_asked()
            assert scored is not None
            fresh += scored
        together(
            "write the rollout ledger", lambda: self._record(step, keyed, fresh), self.session.context, only_first=True
        )
        self._finished.forget()
        known.update({group.group.prompt.prompt_id: group for group in fresh})
        return [known[prompt.prompt_id] for prompt in batch]

    def _keeper(self, keyed: Sequence[tuple[int, Prompt]]) -> RolloutCallback:
        """What keeps the responses of a step on this rank until rank 0 has written all of them down."""
        epochs = {prompt.prompt_id: epoch for epoch, prompt in keyed}
        num_responses = self.session.settings.rollout.responses_per_prompt

        def keep(prompt: Prompt, index: int, rollout: Rollout) -> None:
            self._finished.add(epochs[prompt.prompt_id], prompt, index, rollout, num_responses=num_responses)

        return keep

    def _next(self, cursor: DataCursor) -> tuple[list[tuple[int, Prompt]], list[tuple[int, Prompt]]]:
        """(epoch, prompt) of what the cursor has passed now, and of the next step: the oldest, and no prompt twice."""
        per_step = self.session.settings.rl.prompts_per_step
        drawn: list[tuple[int, Prompt]] = []
        if self._pending is None:
            left = agree("read the rollout ledger", lambda: self._open_groups, self.session.context)
            drawn += caught_up(cursor, self._prompts, left)
            self._pending = [*drawn]
        if len({prompt.prompt_id for _, prompt in self._pending}) < per_step:  # a batch has as many, all different
            batch = next_prompts(cursor, self._prompts)
            drawn += batch
            self._pending += batch
        chosen: dict[str, tuple[int, Prompt]] = {}
        for epoch, prompt in self._pending:
            if len(chosen) < per_step:
                chosen.setdefault(prompt.prompt_id, (epoch, prompt))
        keyed = list(chosen.values())
        taken = {(epoch, prompt.prompt_id) for epoch, prompt in keyed}
        self._pending = [(epoch, prompt) for epoch, prompt in self._pending if (epoch, prompt.prompt_id) not in taken]
        return drawn, keyed

    def trained(self, step: int) -> None:
        """Note that the updates of a step are done; before its checkpoint.

        With `scheduling.rollout_only` there were none, and the groups stay promised to the step, to be replayed.
        """
        if self.session.settings.scheduling.rollout_only:
            return
        together("write the rollout ledger", lambda: self._trained(step), self.session.context, only_first=True)

    @contextmanager
    def publishing(self, version: int) -> Iterator[bool]:
        """Around a publish; the ranks that generate are the ones that publish, so nothing is in flight."""
        yield True

    @contextmanager
    def sharing_engines(self) -> Iterator[None]:
        """Around an evaluation; nothing else is generated meanwhile."""
        yield

    def _open(self) -> None:
        settings, session = self.session.settings, self.session
        source = settings.scheduling.replay_from
        if source is not None:
            self._reader = self._close.enter_context(LedgerReader(Path(source) / LEDGER_FILE))
            require_steps(self._reader, session.step + 1, session.total_steps)
            terms = run_terms(settings, session.chat)
            other = check_replay(self._reader, terms, session.step + 1, session.total_steps)
            if other:
                log.warning("replaying responses and grades that were made under other settings: %s", other)
            return
        with ExitStack() as opened:
            self._ledger = opened.enter_context(Ledger(session.root / LEDGER_FILE))
            # The order of the data alone says which groups a step has.
            found = reconcile_with_checkpoint(self._ledger, session, self._prompts, keep_next_step=False)
            # One that is refused is closed: its write-ahead log would harm the file that is put back in its place.
            self._close.push(opened.pop_all())
        self._open_groups = [] if settings.scheduling.rollout_only else found  # there they are recorded steps

    def _position(self) -> dict[str, Any] | None:
        if self._ledger is None:
            return None
        return position(self._ledger, self.session.step).to_json()

    def _replayed(self, step: int) -> list[tuple[RolloutGroup, tuple[Grade, ...]]]:
        assert self._reader is not None
        std = self.session.settings.algorithm.advantage_std
        # A run that trained on nothing numbered the same weights anew with each step; here they are those of the first.
        is_frozen = self._reader.fact(ROLLOUT_ONLY) == "true"
        version = self.session.settings.scheduling.replay_first_step - 1 if is_frozen else None
        groups = replay_step(self._reader, step, normalize_std=std, version=version)
        return [(group.group, group.grades) for group in groups]

    def _recalled(
        self, step: int, drawn: Sequence[tuple[int, Prompt]], keyed: Sequence[tuple[int, Prompt]]
    ) -> tuple[list[tuple[RolloutGroup, tuple[Grade, ...]]], list[RolloutGroup]]:
        """Reserve what was drawn, and take those of the step whose responses are all there and from its weights.

        Returns:
            Groups with their grades, and groups that are to be graded.
        """
        ledger = self._ledger
        assert ledger is not None
        # All that was drawn, in its order, also for later steps: the checkpoint names what is in flight by the ledger.
        num_responses = self.session.settings.rollout.responses_per_prompt
        ids = ledger.reserve([*drawn, *keyed], num_responses=num_responses)[len(drawn) :]
        graded, ungraded = [], []
        for group_id in ids:
            [stored] = ledger.load([group_id])
            is_current = stored.oldest_version == step - 1
            if stored.state in ("graded", "committed") and is_current:
                graded.append((stored.rollout_group(), tuple(stored.grades[i] for i in range(stored.num_responses))))
            elif stored.state == "generated" and is_current:
                ungraded.append(stored.rollout_group())
            elif stored.rollouts:
                ledger.replace_responses(group_id, {}, why=f"not sampled by the weights before step {step}")
        return graded, ungraded

    def _record(self, step: int, keyed: Sequence[tuple[int, Prompt]], fresh: Sequence[ScoredGroup]) -> None:
        """Write down what was generated or graded, and promise the whole batch to the step, in one transaction."""
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
                self._ledger.prune(min(step - keep, self.session.saved_step))

    def _scored(self, found: Sequence[tuple[RolloutGroup, tuple[Grade, ...]]]) -> list[ScoredGroup]:
        std = self.session.settings.algorithm.advantage_std
        return [scored_group(group, grades, normalize_std=std) for group, grades in found]
