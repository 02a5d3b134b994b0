"""Steps from engines of their own: the manager on rank 0 generates while all ranks train."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.data import DataCursor, PromptData
from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade, Prompt, RolloutGroup, ScoredGroup
from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.endpoint import Endpoint
from megatron_klear.rollout.ledger import (
    LEDGER_FILE,
    Ledger,
    position,
    scored_group,
    with_names_of_their_own,
)
from megatron_klear.rollout.manager import Restart, RolloutManager, Sampling
from megatron_klear.session.ledger import reconcile_with_checkpoint
from megatron_klear.session.metrics import since
from megatron_klear.session.recorded import Recorded
from megatron_klear.session.rollouts import Rollouts
from megatron_klear.session.session import Session
from megatron_klear.session.walk import caught_up, next_prompts

log = logging.getLogger(__name__)

_OTHER_FILES = 256
"""Files that a rank has open beside its connections to engines, with room to spare."""

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
        most_requests: called with `endpoints`: how many requests one generates for at a time, None if not known.
        servers_each: servers behind one endpoint.

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
        most_requests: Callable[[], int | None] = lambda: None,
        servers_each: int = 1,
    ) -> None:
        self.session, self._prompts, self._rollouts = session, prompts, rollouts
        self._endpoints, self._restart, self._most_requests = endpoints, restart, most_requests
        self._servers_each = servers_each
        self._close = ExitStack()
        self._ledger: Ledger | None = None
        self._manager: RolloutManager | None = None
        self._published = False
        self._counts: dict[str, float] = {}
        self._open_groups: list[tuple[int, str]] = []  # as the run found them
        self._ahead: int | None = None
        """Prompts that the cursor has passed and that are not trained; None before the first step."""
        together("open the rollout ledger", self._open, session.context, only_first=True)
        session.ledger_position = self._position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def groups(self, step: int, cursor: DataCursor, rollouts: Rollouts | Recorded) -> list[ScoredGroup]:
        """The scored groups of a step, the same on every rank; waits for them without staying in an exchange.

        Args:
            step: to train.
            cursor: walks over the data; moved on as far as staleness lets generation run ahead, and at the first step
                past all that the ledger has in flight: the manager goes on with it at once.
            rollouts: not used here; grading has begun already.
        """
        context, settings = self.session.context, self.session.settings
        wanted: list[tuple[int, Prompt]] = []
        if self._ahead is None:
            left = agree("read the rollout ledger", lambda: self._open_groups, context)
            wanted += caught_up(cursor, self._prompts, left)
            self._ahead = len(wanted)
        steps = min(settings.scheduling.staleness, self.session.total_steps - step) + 1
        # By prompts and not by steps: those before may have had another number of prompts.
        while self._ahead < steps * settings.rl.prompts_per_step:
            wanted += next_prompts(cursor, self._prompts)
            self._ahead += settings.rl.prompts_per_step
        with self.session.phase("generate", settings.rl.prompts_per_step) as advance:
            shown = 0
            together("reserve prompts", lambda: self._running.submit(wanted), context, only_first=True)
            found = None
            while found is None:
                found = agree("generate", lambda: self._take(step), context)
                self.session.heartbeat.renew()
                if found is None:
                    self.session.stop_if_asked()
                    if self._manager is not None:  # on the first rank, which shows progress
                        ready = min(max(shown, self._manager.num_ready(step)), settings.rl.prompts_per_step)
                        advance(ready - shown)
                        shown = ready
        self._ahead -= len(found)
        std = settings.algorithm.advantage_std
        return [scored_group(group, grades, normalize_std=std) for group, grades in found]

    def trained(self, step: int) -> None:
        """Note that the updates of a step are done; before its checkpoint."""
        together("write the rollout ledger", lambda: self._note(step), self.session.context, only_first=True)

    @contextmanager
    def publishing(self, version: int) -> Iterator[bool]:
        """Around a publish: nothing is in flight while the weights change, and generation goes on with them after.

        Yields:
            whether to publish; not where the run is asked to stop, perhaps while responses that are not interrupted are
            waited for: the step that was trained is then to be finished, and with it the run.
        """
        context = self.session.context
        if self._published and not self._is_paused(version):
            self.session.noted |= agree("count what was generated", self._news, context)
            yield False
            return
        yield True
        together("resume generation", lambda: self._resume(version), context, only_first=True)
        self._published = True

    def _is_paused(self, version: int) -> bool:
        """Wait until nothing is in flight, as long as the longest response takes; False when asked to stop before."""

        def is_to_stop() -> bool:
            # In the last step there is nothing to come back for, and what is in flight is all that is left.
            return version < self.session.total_steps and self.session.is_asked_to_stop()

        with self.session.phase("pause"):
            while not agree("pause", lambda: self._running.pause_for_publish(_POLL_SECONDS), self.session.context):
                self.session.heartbeat.renew()
                if is_to_stop():
                    return False
        return not is_to_stop()

    @contextmanager
    def sharing_engines(self) -> Iterator[None]:
        """Around an evaluation: it and what is generated for training take turns at the engines."""
        with ExitStack() as shared:
            if self._manager is not None:
                shared.enter_context(self._manager.sharing_engines())
            yield

    def _note(self, step: int) -> None:
        self._running.trained(step, saved_step=self.session.saved_step)

    @property
    def _running(self) -> RolloutManager:
        assert self._manager is not None, "prompts are wanted before the first publish"
        return self._manager

    def _open(self) -> None:
        with ExitStack() as opened:
            ledger = opened.enter_context(Ledger(self.session.root / LEDGER_FILE))
            # By completion a step that is trained again has the same groups as before.
            keep = self.session.settings.scheduling.order == "completion"
            self._open_groups = reconcile_with_checkpoint(ledger, self.session, self._prompts, keep_next_step=keep)
            self._ledger = ledger
            # One that is refused is closed: its write-ahead log would harm the file that is put back in its place.
            self._close.push(opened.pop_all())

    def _resume(self, version: int) -> None:
        if self._manager is not None:
            self._manager.resume(version)
            self.session.noted |= self._news()
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
        endpoints = self._endpoints()
        self._manager = self._close.enter_context(
            RolloutManager(
                endpoints,
                ledger,
                settings=replace(settings.scheduling, in_flight=self._in_flight(len(endpoints))),
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
                holds_in_flight=settings.weight_sync.pause_mode != "abort",
            )
        )

    def _news(self) -> dict[str, float]:
        """On the first rank: metrics of what was generated since this was last asked."""
        before, self._counts = self._counts, self._running.counts()
        return since(before, self._counts) | self._running.take_load()

    def _in_flight(self, engines: int) -> int:
        """Requests for one engine at a time: none that would only wait in it.

        One that waits there is bound to it, while another may have room; and how long it waits says nothing of it.
        """
        each, most = self.session.settings.scheduling.in_flight, self._most_requests()
        wanted = each * self._servers_each
        if most is not None and most < wanted:
            log.info(
                "an engine gets %d requests at a time: more would wait in it (scheduling.in_flight %d)",
                most // self._servers_each, each,
            )  # fmt: skip
            wanted = most
        return self._connections_each(wanted, engines)

    @staticmethod
    def _connections_each(wanted: int, engines: int) -> int:
        """Requests for an engine that the system's limit of open files leaves, each of which is a connection.

        Raises:
            RolloutError: not even one.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return wanted
        each = (limit - _OTHER_FILES) // engines
        if each >= wanted:
            return wanted
        text = f"{engines} engines with {wanted} requests each need more than the {limit} files that may be open here"
        if each < 1:
            raise RolloutError(f"{text} (ulimit -Hn); raise that limit, or use fewer engines")
        log.warning("%s (ulimit -Hn), so each gets %d at a time (scheduling.in_flight)", text, each)
        return each

    def _take(self, step: int) -> list[tuple[RolloutGroup, tuple[Grade, ...]]] | None:
        groups = self._running.take(step, self.session.settings.rl.prompts_per_step, _POLL_SECONDS)
        if groups is None:
            return None
        named = with_names_of_their_own(groups)
        return [(g.rollout_group(), tuple(g.grades[i] for i in range(g.num_responses))) for g in named]

    def _position(self) -> dict[str, Any] | None:
        if self._ledger is None:
            return None
        return position(self._ledger, self.session.step).to_json()
