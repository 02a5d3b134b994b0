"""SGLang's router in front of the servers: it shares out what is generated, and everything else goes past it.

What `sglang_router` 0.3.2 was seen to do: `/generate` goes through as it is, streams and refusals too, but for fields
that it does not know (`stream_interval`); it does not tell which server answered, and knows no `/abort_request`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from megatron_klear.errors import ConfigError
from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang.connection import Connection, Refused
from megatron_klear.rollout.sglang.endpoint import SglangEndpoint

_ASK_SECONDS = 30.0


class RoutedEndpoint(SglangEndpoint):
    """All servers behind a router as one endpoint: which of them has a request is the router's secret.

    So the rollout manager can judge them only together. Every answer still names the version of the weights that drew
    each token.

    Args:
        connection: to the router.
        workers: the servers themselves.
        options: as of `SglangEndpoint`.
    """

    def __init__(self, connection: Connection, workers: Sequence[SglangEndpoint], **options: Any) -> None:
        super().__init__(connection, **options)
        self._workers = tuple(workers)

    async def abort(self, request_id: str | None) -> None:
        """Interrupt a request, None all of them, at whichever server has it.

        Raises:
            EndpointError: a server could not be told.
        """
        if request_id is None and self._spares_others:
            await super().abort(None)  # which comes back here, with one after the other
            return
        told = await asyncio.gather(*(worker.abort(request_id) for worker in self._workers), return_exceptions=True)
        for failure in told:
            if isinstance(failure, BaseException):
                raise failure

    async def check(self) -> int:
        """Return the version of the weights that all servers have.

        Raises:
            EndpointError: a server is not alive, or they have different weights.
        """
        versions = await asyncio.gather(*(worker.check() for worker in self._workers))
        if len(set(versions)) > 1:
            told = ", ".join(f"{w.name}: {v}" for w, v in zip(self._workers, versions, strict=True))
            raise EndpointError(f"{self.name}: its servers have weights of different versions: {told}", retry=True)
        self.use_version(versions[0])
        return versions[0]

    async def close(self) -> None:
        """Release connections; a second call does nothing."""
        await asyncio.gather(super().close(), *(worker.close() for worker in self._workers))


async def require_workers(router: Connection, urls: Sequence[str]) -> None:
    """Require that a router sends requests to exactly these servers.

    Raises:
        ConfigError: it cannot be asked, or has others.
    """
    try:
        answer = await router.get("/workers", timeout_seconds=_ASK_SECONDS)
        found = sorted(str(worker["url"]).rstrip("/") for worker in answer["workers"])
    except (EndpointError, Refused, KeyError, TypeError) as error:
        text = str(error) if isinstance(error, EndpointError) else f"{router.name}: /workers answered {error}"
        raise ConfigError([f"sglang.router_url: {text}; it must be a running sglang_router"]) from error
    ours = sorted(url.rstrip("/") for url in urls)
    if found != ours:
        raise ConfigError(
            [f"sglang.router_url: {router.name} sends to {', '.join(found) or 'no server'}, and weights go to "
             f"{', '.join(ours)} (sglang.urls); both must name the same servers in the same way"]
        )  # fmt: skip
