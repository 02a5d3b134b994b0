"""The start of a run's SGLang servers, or the search for those at `sglang.urls`, and what must hold of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_klear.config.server_options import longest_sequence
from megatron_klear.errors import ConfigError
from megatron_klear.model import hf_config
from megatron_klear.observe.readable import duration
from megatron_klear.parallel import FirstRank, Machines
from megatron_klear.rollout.sglang import (
    ConnectedEngine,
    Expected,
    FleetPlace,
    ServerFleet,
    SglangEngine,
    StartReport,
    shown,
    wait_until_answering,
)
from megatron_klear.session.fleets import MachineFleets, require_reachable
from megatron_klear.session.session import Session
from megatron_klear.weight_sync import EngineLayout, common_layout

log = logging.getLogger(__name__)

_SAMPLE_TEXTS = ("The quick brown fox, 12345.", "x^2 + y^2 = z^2\n", "<think>\n\u00fcber\u00a0\u65e5\u672c</think>")
_END_SECONDS = 10.0
"""How long a server of ours that gives no answer may take until its process has ended."""


class AskedToStop(Exception):
    """Servers that are still starting, or responses, are waited for no longer."""


class ServerStart:
    """Starts servers on every machine of the launch, or finds those at `sglang.urls`; made on every rank.

    Args:
        session: the run.
        machines: where servers are started.
        first_rank: commands them.
    """

    def __init__(self, session: Session, machines: Machines, first_rank: FirstRank) -> None:
        self._session, self._machines, self._first_rank = session, machines, first_rank
        self._resources = ExitStack()
        self.engine: SglangEngine | None = None
        """On the first rank, once they are started."""
        self.fleets: MachineFleets | None = None
        """Those that are ours; None where they are at `sglang.urls`."""
        if not session.settings.sglang.urls:
            self.fleets = MachineFleets(machines, self._fleet)
            self._resources.callback(self.fleets.close)

    @property
    def count(self) -> int:
        """Servers in all."""
        sglang = self._session.settings.sglang
        return len(sglang.urls) or sglang.servers * self._machines.count

    def start(self, on_ready: Callable[[int], None]) -> EngineLayout:
        """Start or find the servers; returns how they hold weights (a collective).

        Args:
            on_ready: called on the first rank with how many more are ready, each time that some are.

        Raises:
            ConfigError: on every rank: servers cannot be started or reached, or do not serve our model.
            RolloutError: on every rank: a server failed while starting.
            Preempted: on every rank: one was asked to stop meanwhile.
        """
        found = self._first_rank.run("start SGLang's servers", lambda: self._start(on_ready))
        if found is None:
            self._session.stop_if_asked()
        assert found is not None
        return EngineLayout(**found)

    def close(self) -> None:
        """End the servers that were started; a second call does nothing."""
        self._resources.close()

    def alive_unless_asked_to_stop(self) -> None:
        """On the first rank, while it waits.

        Raises:
            AskedToStop: any rank is asked to stop.
        """
        self._first_rank.alive()
        if self._first_rank.is_stop_asked_for():
            raise AskedToStop

    def layout_of(self, engine: ConnectedEngine) -> EngineLayout:
        """How a server holds weights."""
        facts, ours = engine.facts, self._session.settings.model.dtype
        if facts.dtype == "auto":
            log.warning(
                "%s: nothing here tells the data type of its weights (--dtype auto, and its model's config.json cannot "
                "be read); %s is assumed (model.dtype), and the first publish stops the run where that is wrong",
                engine.endpoint.name, ours,
            )  # fmt: skip
        return EngineLayout(
            tp=facts.tp,
            device="cuda" if facts.device == "cuda" else "cpu",
            dtype=ours if facts.dtype == "auto" else facts.dtype,
            quantized=facts.quantization is not None,
        )

    def _start(self, on_ready: Callable[[int], None]) -> dict[str, Any] | None:
        """On the first rank: how the servers hold weights; None if asked to stop before."""
        try:
            return self._started(on_ready)
        except AskedToStop:
            return None

    def _started(self, on_ready: Callable[[int], None]) -> dict[str, Any]:
        settings, arch, chat = self._session.settings, self._session.arch, self._session.chat
        encode = chat.hf
        with ExitStack() as on_failure:
            urls: Sequence[str] = settings.sglang.urls
            if self.fleets is not None:
                require_reachable(settings.sglang.host, self._machines.host_names)
                urls = self.fleets.start_all(self.alive_unless_asked_to_stop, self._least(), on_ready)
            else:
                self._wait_for_others(on_ready)
            samples = [(text, encode(text, add_special_tokens=False)["input_ids"]) for text in _SAMPLE_TEXTS]
            expected = Expected(
                vocab_size=arch.vocab_size,
                longest_sequence=longest_sequence(settings, self._session.entry),
                deterministic=settings.sglang.deterministic,
                tokenizer_samples=samples,
                sizes=served_config(self._session, settings.model.dtype),
                yarn=settings.yarn.in_servers(self._session.arch, self._session.entry),
                stop_ids=chat.stop_ids,
                verify=settings.weight_sync.verify,
                setting="sglang.urls" if self.fleets is None else "sglang.*",
            )
            try:
                engine = SglangEngine(
                    urls, settings.sglang, expected, in_flight=settings.rollout.batch_responses,
                    spares_others=settings.weight_sync.pause_mode != "abort", least=self._least(),
                )  # fmt: skip
            except ConfigError:
                if self.fleets is not None:  # a server that has ended is no mistake of the settings
                    self.fleets.require_running(_END_SECONDS, self._first_rank.alive)
                raise
            on_failure.callback(engine.close)
            for index, problem in engine.absent.items():
                started = "" if self.fleets is None else self.fleets.failed.get(index, "")
                log.warning("the run begins without engine %d: %s", index, started or problem.problems[0])
            layouts = [self.layout_of(e) for e in engine.engines]
            layout = common_layout(layouts, [e.endpoint.name for e in engine.engines])
            self.engine = engine
            self._resources.push(on_failure.pop_all())
        log.info("SGLang %s: %s", engine.engines[0].facts.version, ", ".join(urls))
        return asdict(layout)

    def _wait_for_others(self, on_ready: Callable[[int], None]) -> None:
        """Give servers at `sglang.urls` that are being started their time; those that do not answer are judged next."""
        sglang = self._session.settings.sglang
        urls, seconds, setting = sglang.urls, sglang.connect_seconds, "sglang.connect_seconds"
        if not seconds:
            return
        limit = f"{duration(seconds)} ({setting})"
        log.info("waiting up to %s for %d servers at sglang.urls: %s", limit, len(urls), shown(urls))
        report = StartReport(len(urls), seconds, setting, verb="answer", on_ready=on_ready)
        if left := wait_until_answering(urls, seconds, self.alive_unless_asked_to_stop, report):
            text = "%d of %d servers at sglang.urls do not answer after %s: %s"
            log.warning(text, len(left), len(urls), limit, ", ".join(left))

    def _least(self) -> int | None:
        """How few servers the run begins with, where the rollout manager can have the others brought back; or None."""
        settings = self._session.settings
        generates_beside = self._session.entry == "rl" and not settings.scheduling.rollout_only
        restores = settings.weight_sync.keep_on_disk and settings.sglang.router_url is None
        may_lack = generates_beside and restores and settings.sglang.placement != "colocated"
        return settings.scheduling.min_engines if may_lack else None

    def _fleet(self) -> ServerFleet:
        settings, machines = self._session.settings, self._machines
        chosen = settings.sglang.dtype
        return ServerFleet(
            settings.sglang,
            served_config(self._session, settings.model.dtype if chosen == "auto" else chosen),
            self._session.root,
            dtype=settings.model.dtype,
            on_cpu=self._session.context.device.type == "cpu",
            batch_responses=settings.rollout.batch_responses,
            longest_sequence=longest_sequence(settings, self._session.entry),
            weights=None if settings.model.hf_dir is None else Path(settings.model.hf_dir),
            place=FleetPlace(
                first_number=machines.number * settings.sglang.servers,
                address=machines.address if machines.count > 1 else "127.0.0.1",
                companions=machines.pids,
            ),
        )


def served_config(session: Session, dtype: str) -> dict[str, Any]:
    """The config.json of the model that servers are started with, and of weights for them."""
    return hf_config(session.arch, dtype=dtype, yarn=session.settings.yarn.in_servers(session.arch, session.entry))
