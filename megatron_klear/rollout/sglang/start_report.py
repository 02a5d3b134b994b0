"""What people are told of servers that are waited for: a start may take half an hour, and looks like one that hangs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe.readable import duration

log = logging.getLogger(__name__)

_EVERY_SECONDS = 30.0


@dataclass(slots=True)
class StartTally:
    """Servers that are being started together: how many are ready, and what is wrong with those that failed."""

    ready: int = 0
    problems: dict[int, str] = field(default_factory=dict)


def say_started(ports: Sequence[int], logs: Sequence[Path], settings: SglangSettings) -> None:
    """Log what has been started on this machine; it is long until there is more to tell."""
    several = "s" if len(ports) > 1 else ""
    chosen = "found free" if settings.port is None else "sglang.port"
    log.info(
        "starting %d SGLang server%s on this machine: port%s %s (%s), log%s %s%s, at most %s to be ready "
        "(sglang.start_seconds)",
        len(ports), several, several, ", ".join(map(str, ports)), chosen,
        several, logs[0], several and f" to {logs[-1].name}", duration(settings.start_seconds),
    )  # fmt: skip


class StartReport:
    """Logs now and then how many servers are ready, and passes on how many more have become so.

    Args:
        total: servers that are waited for.
        seconds: how long they are.
        setting: that this limit came from.
        verb: what those do that are ready.
        on_ready: called with how many more are ready, each time that some are.
    """

    def __init__(
        self,
        total: int,
        seconds: float,
        setting: str,
        *,
        verb: str = "are ready",
        on_ready: Callable[[int], None] = lambda more: None,
    ) -> None:
        self._total, self._verb, self._on_ready = total, verb, on_ready
        self._limit = f"{duration(seconds)} ({setting})"
        self._began = self._said = time.monotonic()
        self._ready = 0

    def note(self, ready: int, more: str = "") -> None:
        """Take how many are ready now; called several times a second.

        Args:
            ready: servers.
            more: said of the others in the log.
        """
        if ready > self._ready:
            self._on_ready(ready - self._ready)
            self._ready = ready
        now = time.monotonic()
        if now - self._said >= _EVERY_SECONDS and ready < self._total:
            self._said = now
            log.info(
                "%d of %d servers %s after %s of %s%s",
                ready, self._total, self._verb, duration(now - self._began), self._limit, more and f"; {more}",
            )  # fmt: skip
