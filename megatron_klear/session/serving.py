"""SGLang's servers as the engine of a run: the first rank commands them, all ranks publish to them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear.config.server_options import longest_sequence
from megatron_klear.errors import KlearError, WeightSyncError
from megatron_klear.parallel import FirstRank, Machines
from megatron_klear.records import FloatArray, IntArray, Prompt, Rollout, RolloutGroup, TrainSequence
from megatron_klear.rollout import ProgressCallback, RolloutCallback, SamplingParams
from megatron_klear.rollout.endpoint import Endpoint, EndpointError
from megatron_klear.rollout.manager import Restart
from megatron_klear.rollout.sglang import ConnectedEngine
from megatron_klear.session.closing import told_at_once
from megatron_klear.session.engine_memory import EngineMemory
from megatron_klear.session.handover import Handover
from megatron_klear.session.others import ServersOfOthers
from megatron_klear.session.probe import Probe
from megatron_klear.session.restarting import EngineRestarts
from megatron_klear.session.server_start import AskedToStop, ServerStart
from megatron_klear.session.session import Session
from megatron_klear.session.sharing import choose_sharing
from megatron_klear.session.transports import choose_transport
from megatron_klear.weight_sync import (
    EngineCaller,
    EngineGroup,
    Publisher,
    PublishReport,
    Transport,
    WeightFiles,
    common_layout,
    restore,
)

log = logging.getLogger(__name__)

_PROBE_TOKENS = 64
_ATTEMPTS = 4
"""How often an evaluation is begun when its servers are lost."""
_WAKE_SECONDS = 0.5
_Result = TypeVar("_Result")


class ServedEngine:
    """Generates on SGLang's servers; every rank holds one, and its methods are collectives.

    Servers are started on every machine of the launch, or those at `sglang.urls` used. Those that were started end with
    the trainer's processes on their machine at the latest.

    Args:
        session: the run.
        machines: where servers are started.

    Raises:
        ConfigError: on every rank: servers cannot be started or reached, or do not serve our model.
        RolloutError: on every rank: a server failed while starting.
    """

    def __init__(self, session: Session, machines: Machines) -> None:
        self.session, self._machines = session, machines
        settings = session.settings
        self._first_rank = FirstRank(
            session.context,
            silence_seconds=settings.parallel.timeout_seconds,
            beat=session.heartbeat.renew,
            is_asked_to_stop=lambda: session.stop.received,
        )
        self._start = ServerStart(session, machines, self._first_rank)
        self._resources = ExitStack()
        self._resources.callback(self._start.close)
        self._group: EngineGroup | None = None
        self._files: WeightFiles | None = None
        self._restarts: EngineRestarts | None = None
        self._is_managed = False
        self._counts: dict[str, float] = {}
        self._probe: Probe | None = None
        transport: Transport | None = None
        colocated = settings.sglang.placement == "colocated"
        self._handover = Handover(session, self._first_rank) if colocated else None
        count = self._start.count
        with session.phase("start engines", count) as advance, ExitStack() as on_failure, told_at_once():
            on_failure.callback(self._resources.close)
            if self._handover is not None:
                self._handover.make_room()
            layout = self._start.start(advance)
            on_failure.pop_all()
        self._layout = layout
        self._engine, self._fleets = self._start.engine, self._start.fleets
        self._sharing = choose_sharing(session, machines, layout) if colocated else None
        memory: EngineMemory | None = None
        if self._engine is not None:
            absent = self._engine.absent
            callers = [engine.caller for index, engine in enumerate(self._engine.engines) if index not in absent]
            group = EngineGroup(callers, settings.weight_sync.timeout_seconds, waiting=self._first_rank.alive)
            transport, self._files = choose_transport(
                session,
                group,
                layout,
                are_ours=self._fleets is not None,
                urls=[engine.caller.url for engine in self._engine.engines],
                sharing=self._sharing,
                ranks_of=self._ranks_of,
            )
            self._group = group
            if settings.sglang.router_url is None:
                self._engine.is_in_use = lambda caller: caller in group.callers
            if colocated:
                group.on_lost = self._end
                memory = EngineMemory(group, self._first_rank.alive, self._first_rank.is_stop_asked_for)
            if self._files is not None:
                turn = None if memory is None else memory.turn
                asked = settings.sglang.restart_requests
                others = ServersOfOthers(settings.sglang.urls, None if asked is None else Path(asked))
                fleet = self._fleets or others
                self._restarts = EngineRestarts(fleet, self._engine, group, self._bring_up, turn)
                group.least = 0  # one that is lost in a publish is brought back when it is missed
                self._resources.callback(self._restarts.close)
        if self._handover is not None:
            self._handover.engines_started(memory)
        self._publisher = Publisher(
            self._group,
            transport,
            layout,
            head_dim=session.arch.head_dim,
            context=session.context,
            first_rank=self._first_rank,
            bucket_bytes=settings.weight_sync.bucket_bytes,
            pause_mode=settings.weight_sync.pause_mode,
            verify_mode=settings.weight_sync.verify,
            check_logprobs=self._check_logprobs,
            sharing=self._sharing,
            before_generation=(lambda: None) if self._handover is None else self._handover.resume_cache,
        )

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first publish."""
        return self._publisher.version

    @property
    def proof(self) -> Literal["checksum", "logprobs"]:
        """How the weights in use were proved; the same on every rank."""
        return "logprobs" if self._publisher.expected is None else "checksum"

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Publish a full set of weights.

        Raises:
            WeightSyncError: on every rank; see `Publisher.publish`.
        """
        if self._handover is None:  # else it is the trainer's turn, and no server may start
            self._first_rank.run("see whether the servers live", self._bring_back_before_a_publish)

        def publish() -> PublishReport:
            with self._no_server_joins():
                return self._publisher.publish(named_tensors, version=version)

        report = publish() if self._handover is None else self._handover.to_engines(publish)
        if self._engine is not None:
            assert self._group is not None
            self._engine.use_version(version)
            proof = f"proved by {report.proof}" if self._group.callers else "kept for servers that start; none answers"
            log.info(
                "published version %d: %.1f MB in %.2f s, %s",
                report.version, report.num_bytes / 1e6, report.seconds, proof,
            )  # fmt: skip

    def _no_server_joins(self) -> AbstractContextManager[None]:
        if self._restarts is None:
            return nullcontext()
        return self._restarts.publishing(self._first_rank.alive, is_urgent=self._first_rank.is_stop_asked_for)

    @property
    def holds_weights(self) -> bool:
        """Whether the servers have published weights, and keep them while the ranks compute."""
        return self.policy_version >= 0 and self._handover is None

    def keep_weights(self, *, version: int) -> None:
        """Give the published weights a new version, where nothing was trained since (a collective).

        Raises:
            WeightSyncError: on every rank: a server gives no answer.
        """
        self._first_rank.run("see whether the servers live", self._bring_back_before_a_publish)
        self._publisher.keep(version)
        if self._engine is not None:
            self._engine.use_version(version)

    def hand_to_trainer(self) -> None:
        """The ranks are about to compute: engines that share GPUs with them give up their memory (a collective).

        Raises:
            WeightSyncError: on every rank: an engine fails, and cannot be done without.
        """
        if self._handover is not None:
            self._handover.to_trainer()

    def expect_manager(self) -> None:
        """Let publishes, the first one, too, go on without servers that give no answer: the rollout manager will judge.

        With `weight_sync.keep_on_disk` it has them brought back with these weights, and ends the run when too few serve
        for too long; without it `scheduling.min_engines` must be left.
        """
        settings = self.session.settings
        if self._group is not None and settings.sglang.router_url is None:
            self._group.least = settings.scheduling.min_engines if self._restarts is None else 0

    def endpoints(self) -> list[Endpoint]:
        """On the first rank: ways to all servers for the rollout manager, which judges them from now on."""
        assert self._engine is not None
        self._is_managed = True
        if self.session.settings.sglang.router_url is not None:
            return [self._engine.routed_endpoint()]
        if self._restarts is not None:
            return self._restarts.endpoints()
        return [self._engine.another_endpoint(index) for index in range(len(self._engine.engines))]

    @property
    def servers_each(self) -> int:
        """Servers behind one endpoint: behind a router all of them."""
        sglang = self.session.settings.sglang
        return 1 if sglang.router_url is None else len(sglang.urls)

    def most_requests(self) -> int | None:
        """On the first rank: requests that an endpoint generates for at a time; None when that is not known."""
        assert self._engine is not None
        most = self._engine.most_running
        return None if most is None else most * self.servers_each

    @property
    def restart(self) -> Restart | None:
        """How the rollout manager has a lost server started anew; None where that cannot be done."""
        return None if self._restarts is None else self._restarts.restart

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        on_progress: ProgressCallback | None = None,
        on_rollout: RolloutCallback | None = None,
    ) -> list[RolloutGroup] | None:
        """Draw `num_responses` responses to each prompt; every rank gets all groups, in the order of `prompts`.

        None on every rank, soon, where any of them is asked to stop meanwhile. The first rank's `on_progress` and
        `on_rollout` are called.

        Raises:
            RolloutError: on every rank; see `SglangEngine.generate`.
        """
        draw = partial(
            self._drawn, prompts, num_responses=num_responses, sampling=sampling, seed=seed, on_progress=on_progress,
            on_rollout=on_rollout,
        )  # fmt: skip

        def generate() -> list[RolloutGroup] | None:
            try:
                return draw(waiting=self._start.alive_unless_asked_to_stop)
            except AskedToStop:
                return None

        return self.for_all("generate", generate)

    def failed_requests(self) -> dict[str, float]:
        """On the first rank: requests of `generate` without a sound answer since this was last asked, as metrics."""
        if self._engine is None:
            return {}
        before, self._counts = self._counts, self._engine.counts
        return {name: count - before.get(name, 0.0) for name, count in self._counts.items()}

    def for_all(self, what: str, action: Callable[[], _Result]) -> _Result:
        """Do `action` on the first rank, while the others wait outside of any collective; every rank gets its result.

        Args:
            what: names the action in messages.
            action: calls `alive` now and then; its result can be pickled.

        Raises:
            KlearError: what the action raised, on every rank.
        """
        result: list[_Result | None] = [None]

        def act() -> None:
            result[0] = action()

        self._first_rank.run(what, act)
        dist.broadcast_object_list(result, src=0)
        return cast(_Result, result[0])

    def alive(self) -> None:
        """Note that the first rank is alive; called by actions of `for_all` while they wait."""
        self._first_rank.alive()

    def close(self) -> None:
        """End the servers that were started; a second call does nothing."""
        self._publisher.close()
        self._resources.close()

    def _drawn(self, prompts: Sequence[Prompt], *, waiting: Callable[[], None], **how: Any) -> list[RolloutGroup]:
        """On the first rank: responses; those that are missing again when servers were lost and are brought back."""
        assert self._engine is not None
        finished: dict[tuple[str, int], Rollout] = {}
        can_come_back = self._restarts is not None if self._is_managed else self._brings_back
        draw = partial(self._engine.generate, prompts, finished=finished, waits_for_hanging=not can_come_back)
        if self._handover is not None:  # it is the engines' turn now, and was not before the publish
            self._bring_back_lost(waiting)
        for left in reversed(range(_ATTEMPTS)):
            try:
                return draw(waiting=waiting, **how)
            except EndpointError as error:
                if not can_come_back or not error.retry or left == 0:
                    raise
                log.warning("%s; asking again when a server answers", error)
                if self._is_managed:
                    self._wait_for_server(error, waiting)
                else:
                    self._bring_back_lost(waiting)
        raise AssertionError("the last attempt returns or raises")

    @property
    def _brings_back(self) -> bool:
        """Whether lost servers are started anew here, and not by the manager."""
        has_weights = self._files is not None and self._files.newest is not None
        return has_weights and self._restarts is not None and not self._is_managed

    def _bring_back_before_a_publish(self) -> None:
        try:
            self._bring_back_lost(self._start.alive_unless_asked_to_stop)
        except AskedToStop:
            log.warning("asked to stop; no server is waited for")

    def _bring_back_lost(self, waiting: Callable[[], None]) -> None:
        """On the first rank, where no manager does it: start lost servers anew, with the weights in use.

        Raises:
            KlearError: none is left, and the first that was lost does not come back.
        """
        if not self._brings_back:
            return
        assert self._engine is not None
        assert self._restarts is not None
        alive = set(self._engine.answering(self.policy_version))
        working, failure = alive - self._engine.hanging, None
        lost = set(range(len(self._engine.engines))) - working
        for index in sorted(lost, key=lambda index: (index not in alive, index)):  # who answers is there sooner
            if working and not self._restarts.may_come_back(index):
                continue
            why = "brings no tokens" if index in alive else "does not answer"
            try:
                self._restarts.restart_here(index, why, waiting, self.session.settings.sglang.start_seconds)
                working.add(index)
            except KlearError as error:
                failure = failure or error
                log.warning("%s", error)
        if failure is not None and not working:
            raise failure

    def _wait_for_server(self, error: EndpointError, waiting: Callable[[], None]) -> None:
        assert self._engine is not None
        deadline = time.monotonic() + self.session.settings.scheduling.start_seconds
        while self._engine.hanging.issuperset(self._engine.answering(self.policy_version)):
            if time.monotonic() > deadline:
                raise error
            waiting()
            time.sleep(_WAKE_SECONDS)

    def _bring_up(self, engine: ConnectedEngine, waiting: Callable[[], None]) -> None:
        """Give a server that was started anew the weights of the last publish, and prove them as those were proved."""
        published, version = None if self._files is None else self._files.newest, self.policy_version
        if published is None:
            raise WeightSyncError(f"{engine.endpoint.name}: there are no weights for it before the first publish")
        common_layout([self._layout, self._start.layout_of(engine)], ["the engines at the start", engine.endpoint.name])
        settings, expected = self.session.settings.weight_sync, self._publisher.expected
        group = EngineGroup([engine.caller], settings.timeout_seconds, waiting=waiting)
        sent_to_tp = None if self._fleets is not None else self._layout.tp

        def prove() -> None:
            assert self._engine is not None
            assert self._probe is not None
            self._probe.prove(self._engine, [engine], group, settings, waiting)

        engine.endpoint.use_version(version)
        restore(group, published, version=version, expected=expected, prove=prove, sent_to_tp=sent_to_tp)

    def _ranks_of(self, caller: EngineCaller) -> range:
        """The trainer's ranks on the GPUs of an engine, on its machine."""
        assert self._engine is not None
        assert self._fleets is not None
        machine, number = self._fleets.place(
            next(i for i, engine in enumerate(self._engine.engines) if engine.caller is caller)
        )
        tp = self.session.settings.sglang.server_tp
        return self._machines.ranks[machine][number * tp : (number + 1) * tp]

    def _end(self, caller: EngineCaller) -> None:
        """End the server of an engine that gave no answer, for the memory that it may hold on the trainer's GPUs."""
        assert self._engine is not None
        assert self._fleets is not None
        for index, engine in enumerate(self._engine.engines):
            if engine.caller is caller:
                log.warning("%s is ended, for its memory", caller.name)
                ended = self._fleets.stop(index)
                if ended is None:
                    continue
                log.warning("%s %s", caller.name, ended)
                if self._restarts is not None:
                    self._restarts.note_end(index, ended)

    def _check_logprobs(self) -> None:
        """Compare the engines' log-probabilities of a probe sequence with the trainer's (a collective)."""
        length = min(_PROBE_TOKENS, longest_sequence(self.session.settings, self.session.entry))
        rng = np.random.default_rng(self.session.settings.run.seed)
        tokens = rng.integers(0, self.session.arch.vocab_size, length)
        ours = self.session.trainer.token_logprobs([_to_score(tokens)], temperature=1.0)[0]
        probe = self._probe = Probe(token_ids=tokens, logprobs=ours)

        def compare() -> None:
            assert self._engine is not None
            assert self._group is not None
            self._engine.use_version(self.policy_version)
            left = [engine for engine in self._engine.engines if engine.caller in self._group.callers]
            probe.prove(self._engine, left, self._group, self.session.settings.weight_sync, self._first_rank.alive)

        self._first_rank.run("compare log-probabilities", compare)


def _to_score(tokens: IntArray) -> TrainSequence:
    zeros: FloatArray = np.zeros(len(tokens), dtype=np.float32)
    return TrainSequence(
        sequence_id="probe",
        token_ids=tokens,
        policy_weight=zeros,
        lm_weight=zeros,
        advantages=zeros,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
    )
