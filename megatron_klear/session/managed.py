"""Steps from engines of their own: the manager on rank 0 generates while all ranks train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.data import DataCursor, PromptData
from megatron_klear.parallel import FirstRank
from megatron_klear.records import Grade, Prompt, RolloutGroup, ScoredGroup
from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.endpoint import Endpoint
from megatron_klear.rollout.ledger import LEDGER_FILE, Ledger, position, scored_group, with_names_of_their_own
from megatron_klear.rollout.manager import Restart, RolloutManager, Sampling
from megatron_klear.session.ledger import reconcile_with_checkpoint
from megatron_klear.session.rollouts import Rollouts
from megatron_klear.session.session import Session

_POLL_SECONDS = 5.0
"""Longest time that other ranks wait in an exchange for rank 0, however long generation takes."""


class ManagedGroups:
    """Where a step's groups come from when engines run beside the trainer; the same interface as `RunLedger`.

    Args:
        session: the run; its checkpoints get the ledger's position.
        prompts: the data that steps are drawn from.
        rollouts: grades responses, on rank 0.
        endpoints: called on rank 0 once the engines have their first weights.
        restart: see `RolloutManager`.

    Raises:
        CheckpointError: the ledger cannot be used, or is not the one of the run's checkpoint.
    """

    def __init__(
        self,
        session: Session,
        prompts: PromptData,
        rollouts: Rollouts,
        endpoints: Callable[[], Sequence[Endpoint]],
        restart: Restart | None = None,
    ) -> None:
        self.session, self._prompts, self._rollouts = session, prompts, rollouts
        self._endpoints, self._restart = endpoints, restart
        self._close = ExitStack()
        self._ledger: Ledger | None = None
        self._manager: RolloutManager | None = None
        self._published = False
        self._first_rank = FirstRank(
            session.context,
            silence_seconds=session.settings.parallel.timeout_seconds,
            beat=session.heartbeat.renew,
        )
        together("open the rollout ledger", self._open, session.context, only_first=True)
        session.ledger_position = self._position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def groups(self, step: int, cursor: DataCursor, rollouts: Rollouts) -> list[ScoredGroup]:
        """The scored groups of a step, the same on every rank; waits for them without staying in an exchange.

        Args:
            step: to train.
            cursor: walks over the data; moved on as far as staleness lets generation run ahead.
            rollouts: not used here; grading has begun already.
        """
        context, settings = self.session.context, self.session.settings
        wanted: list[tuple[int, Prompt]] = []
        last = min(step + settings.scheduling.staleness, self.session.total_steps)
        while cursor.rows_taken < last * settings.rl.prompts_per_step:
            first = cursor.rows_taken
            rows = cursor.next_batch()
            wanted += [((first + i) // len(self._prompts), self._prompts.prompts[r]) for i, r in enumerate(rows)]
        with self.session.phase("generate"):
            together("reserve prompts", lambda: self._running.submit(wanted), context, only_first=True)
            found = None
            while found is None:
                found = agree("generate", lambda: self._take(step), context)
                if found is None:
                    self.session.stop_if_asked()
        std = settings.algorithm.advantage_std
        return [scored_group(group, grades, normalize_std=std) for group, grades in found]

    def trained(self, step: int) -> None:
        """Note that the updates of a step are done; before its checkpoint."""
        together("write the rollout ledger", lambda: self._running.trained(step), self.session.context, only_first=True)

    @contextmanager
    def publishing(self, version: int) -> Iterator[None]:
        """Around a publish: nothing is in flight while the weights change, and generation goes on with them after."""
        context = self.session.context
        if self._published:
            with self.session.phase("pause"):
                # Not in an exchange: where responses are not interrupted, this takes as long as the longest.
                self._first_rank.run(
                    "pause generation", lambda: self._running.pause_for_publish(self._first_rank.alive)
                )
        yield
        together("resume generation", lambda: self._resume(version), context, only_first=True)
        self._published = True

    @contextmanager
    def sharing_engines(self) -> Iterator[None]:
        """Around an evaluation: it and what is generated for training take turns at the engines."""
        with ExitStack() as shared:
            if self._manager is not None:
                shared.enter_context(self._manager.sharing_engines())
            yield

    @property
    def _running(self) -> RolloutManager:
        assert self._manager is not None, "prompts are wanted before the first publish"
        return self._manager

    def _open(self) -> None:
        self._ledger = self._close.enter_context(Ledger(self.session.root / LEDGER_FILE))
        reconcile_with_checkpoint(self._ledger, self.session, self._prompts)

    def _resume(self, version: int) -> None:
        if self._manager is not None:
            self._manager.resume(version)
            return
        settings, ledger = self.session.settings, self._ledger
        assert ledger is not None
        rollout = settings.rollout
        params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=self._rollouts.stop_token_ids,
        )
        self._manager = self._close.enter_context(
            RolloutManager(
                self._endpoints(),
                ledger,
                settings=settings.scheduling,
                sampling=Sampling(
                    params=params,
                    num_responses=rollout.responses_per_prompt,
                    seed=settings.run.seed,
                    vocab_size=self.session.arch.vocab_size,
                ),
                groups_per_step=settings.rl.prompts_per_step,
                grade=self._rollouts.grade,
                version=version,
                next_step=self.session.step + 1,
                restart=self._restart,
            )
        )

    def _take(self, step: int) -> list[tuple[RolloutGroup, tuple[Grade, ...]]] | None:
        groups = self._running.take(step, self.session.settings.rl.prompts_per_step, _POLL_SECONDS)
        if groups is None:
            return None
        named = with_names_of_their_own(groups)
        return [(g.rollout_group(), tuple(g.grades[i] for i in range(g.num_responses))) for g in named]

    def _position(self) -> dict[str, Any] | None:
        return None if self._ledger is None else position(self._ledger, self.session.step).to_json()
