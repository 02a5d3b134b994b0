"""The servers of a run as one engine for a caller that waits, and as callers for publishing weights."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError
from megatron_klear.observe import names
from megatron_klear.records import FloatArray, IntArray, Prompt, Rollout, RolloutGroup
from megatron_klear.rollout.endpoint import Endpoint, EndpointError
from megatron_klear.rollout.engine import ProgressCallback, RolloutCallback, RolloutProgress, SamplingParams
from megatron_klear.rollout.sglang.compatibility import EngineFacts, Expected, Unreachable, examine
from megatron_klear.rollout.sglang.connection import Connection, Refused
from megatron_klear.rollout.sglang.endpoint import SglangEndpoint
from megatron_klear.rollout.sglang.engine import EndpointPool
from megatron_klear.rollout.sglang.loop import LoopThread
from megatron_klear.rollout.sglang.progress import Progress
from megatron_klear.rollout.sglang.router import RoutedEndpoint, require_workers

_WAKE_SECONDS = 0.1
_Result = TypeVar("_Result")


class SglangCaller:
    """Control requests to one server while weights are published, for code that is not asynchronous.

    Args:
        loop: runs the requests.
        connection: to the server.
    """

    def __init__(self, loop: LoopThread, connection: Connection) -> None:
        self._loop = loop
        self._connection = connection

    @property
    def name(self) -> str:
        """Names the engine in messages."""
        return self._connection.name

    @property
    def url(self) -> str:
        """http://HOST:PORT."""
        return self._connection.url

    def start(
        self, path: str, body: Mapping[str, Any], *, timeout_seconds: float
    ) -> concurrent.futures.Future[tuple[int, str]]:
        """Send a POST at once; the future gives status and text, or raises RolloutError when no answer came."""
        return self._loop.start(self._post(path, body, timeout_seconds))

    async def _post(self, path: str, body: Mapping[str, Any], timeout_seconds: float) -> tuple[int, str]:
        try:
            text = await self._connection.post_for_text(
                path, body, timeout_seconds=timeout_seconds, setting="weight_sync.timeout_seconds"
            )
            return 200, text
        except Refused as refusal:
            return refusal.status, refusal.text


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectedEngine:
    """A server that serves our model.

    Attributes:
        endpoint: for generation.
        caller: for publishing weights.
        facts: what it says of itself.
    """

    endpoint: SglangEndpoint
    caller: SglangCaller
    facts: EngineFacts


class SglangEngine:
    """Generates on running servers.

    Args:
        urls: one per server.
        settings: section `sglang`.
        expected: what they must serve.
        in_flight: responses that one server has at a time.
        spares_others: an interruption of all requests leaves alone those that others send to the same servers.
        least: how few servers must answer; None needs all of them.

    Attributes:
        engines: the servers.
        absent: what is wrong with those that gave no answer when they were connected, by number.
        is_in_use: whether a server still gets the weights that are published. One that does not is asked for nothing,
            and its endpoints' checks fail: it may hold the weights in use, and yet miss what follows.

    Raises:
        ConfigError: a server cannot be reached or does not serve our model; all of them in one message.
    """

    def __init__(
        self,
        urls: Sequence[str],
        settings: SglangSettings,
        expected: Expected,
        *,
        in_flight: int,
        spares_others: bool = False,
        least: int | None = None,
    ) -> None:
        self._settings, self._expected, self._spares_others = settings, expected, spares_others
        self.is_in_use: Callable[[SglangCaller], bool] = lambda caller: True
        self._progress: dict[str, Progress] = {}
        self._loop = LoopThread("sglang")
        try:
            self.engines, self.absent = self._loop.run(self._connect(urls, len(urls) if least is None else least))
            endpoints: list[Endpoint] = [engine.endpoint for engine in self.engines]
            if settings.router_url is not None:
                self._loop.run(require_workers(self._router(), urls))
                endpoints, in_flight = [self.routed_endpoint()], in_flight * len(urls)
            self._pool = EndpointPool(endpoints, in_flight=in_flight, retries=settings.retries)
            if settings.router_url is None:
                self._pool.is_in_use = lambda place: self.is_in_use(self.engines[place].caller)
        except BaseException:
            self._loop.close()
            raise

    @property
    def counts(self) -> dict[str, float]:
        """Requests so far that brought no sound answer, and those of them with a malformed one, as metrics."""
        return {names.REQUESTS_FAILED: self._pool.failures, names.REQUESTS_MALFORMED: self._pool.malformed}

    def use_version(self, version: int) -> None:
        """Note that weights of this version have been published to all servers; none but these may be sampled from."""
        self._pool.version = version
        # The router's endpoint is one of the pool's and of no engine: its requests name the version, too.
        for endpoint in {*(engine.endpoint for engine in self.engines), *self._pool.endpoints}:
            if isinstance(endpoint, SglangEndpoint):
                endpoint.use_version(version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        on_progress: ProgressCallback | None = None,
        on_rollout: RolloutCallback | None = None,
        finished: dict[tuple[str, int], Rollout] | None = None,
        waits_for_hanging: bool = True,
        waiting: Callable[[], None] | None = None,
    ) -> list[RolloutGroup]:
        """Draw `num_responses` responses to each prompt, in the order of `prompts`.

        Args:
            num_responses: M, at least 1.
            sampling: temperature, nucleus, length and stop tokens.
            seed: of the requests; give each step its own.
            on_progress: called from this thread, now and then and at the end.
            on_rollout: called from this thread with every response soon after it is complete.
            finished: responses by prompt and index. Those that it holds are not drawn again; those drawn are added, so
                that they outlive a failure of others.
            waits_for_hanging: whether servers are asked again where all of them hang.
            waiting: called from this thread while it waits, several times a second.

        Raises:
            RolloutError: a request that cannot be served, or that failed more often than `sglang.retries`.
        """
        news: list[RolloutProgress] = []
        complete: deque[tuple[Prompt, int, Rollout]] = deque()
        answer = self._pool.generate(
            prompts,
            num_responses=num_responses,
            sampling=sampling,
            seed=seed,
            on_progress=news.append,
            on_rollout=None if on_rollout is None else lambda *rollout: complete.append(rollout),
            finished=finished,
            waits_for_hanging=waits_for_hanging,
        )

        def between() -> None:
            while complete and on_rollout is not None:
                on_rollout(*complete.popleft())
            if on_progress is not None and news:
                on_progress(news[-1])
                news.clear()
            if waiting is not None:
                waiting()

        return self._run(answer, between)

    def score(self, engine: ConnectedEngine, token_ids: IntArray, *, timeout_seconds: float) -> FloatArray:
        """What a server says of a sequence; see `SglangEndpoint.score`.

        Raises:
            EndpointError: it gives no whole answer.
        """
        return self._loop.run(engine.endpoint.score(token_ids, timeout_seconds=timeout_seconds))

    def scores(
        self,
        endpoints: Sequence[SglangEndpoint],
        token_ids: IntArray,
        *,
        timeout_seconds: float,
        waiting: Callable[[], None],
    ) -> list[FloatArray | EndpointError]:
        """What several servers say of a sequence, asked at once; in their order, an error where there is no answer.

        Args:
            endpoints: of the servers.
            token_ids: int64 [T].
            timeout_seconds: of each.
            waiting: called from this thread while it waits, several times a second.
        """

        async def ask(endpoint: SglangEndpoint) -> FloatArray | EndpointError:
            try:
                return await endpoint.score(token_ids, timeout_seconds=timeout_seconds)
            except EndpointError as error:
                return error

        async def ask_all() -> list[FloatArray | EndpointError]:
            return list(await asyncio.gather(*(ask(endpoint) for endpoint in endpoints)))

        return self._run(ask_all(), waiting)

    def _run(self, coroutine: Coroutine[Any, Any, _Result], between: Callable[[], None]) -> _Result:
        future = self._loop.start(coroutine)
        try:
            while True:
                done, _ = concurrent.futures.wait([future], timeout=_WAKE_SECONDS)
                between()
                if done:
                    return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Close connections; the servers are not touched, and a second call does nothing."""
        self._loop.close()

    def connect(self, index: int, url: str) -> ConnectedEngine:
        """Judge a server that was started in the place of number `index`; it is used from `replace` on.

        Raises:
            ConfigError: it cannot be reached, or does not serve our model.
        """
        self._progress.pop(url.rstrip("/"), None)  # it may be compiling again
        return self._loop.run(self._examined(index, url))

    def replace(self, index: int, engine: ConnectedEngine) -> None:
        """Use another server in the place of number `index`; the connections to the old one are closed."""
        old = self.engines[index]
        self.engines = (*self.engines[:index], engine, *self.engines[index + 1 :])
        self._pool.endpoints[index] = engine.endpoint
        self._pool.hanging.discard(index)
        self._loop.run(old.endpoint.close())

    def another_endpoint(self, index: int) -> SglangEndpoint:
        """One more way to server number `index`, for a caller with an event loop of its own."""
        engine = self.engines[index]
        return self._endpoint(Connection(engine.endpoint.name, engine.caller.url), engine.facts, engine.caller)

    @property
    def most_running(self) -> int | None:
        """Requests that any of the servers generates for at a time; None when one does not tell."""
        counts = [engine.facts.most_running for engine in self.engines]
        return None if None in counts else min(count for count in counts if count is not None)

    def routed_endpoint(self) -> RoutedEndpoint:
        """One way to all servers, through the router, for a caller with an event loop of its own."""
        facts = self.engines[0].facts
        workers = [self.another_endpoint(index) for index in range(len(self.engines))]
        router = self._router()
        progress = self._progress.setdefault(router.url, Progress())
        return RoutedEndpoint(router, workers, progress=progress, **self._options(facts))

    @property
    def hanging(self) -> frozenset[int]:
        """Numbers of servers that brought no token in time in the last call of `generate`, and none since.

        They may answer everything else. Empty with a router, which does not tell which of them it is.
        """
        if self._settings.router_url is not None:
            return frozenset()
        idle = self._settings.idle_seconds
        return frozenset(i for i in self._pool.hanging if self.engines[i].endpoint.silence().seconds >= idle)

    def answering(self, version: int) -> list[int]:
        """Numbers of the servers that are alive and have weights of this version."""

        async def ask() -> list[int | BaseException]:
            return await asyncio.gather(*(e.endpoint.check() for e in self.engines), return_exceptions=True)

        return [index for index, found in enumerate(self._loop.run(ask())) if found == version]

    async def _connect(
        self, urls: Sequence[str], least: int
    ) -> tuple[tuple[ConnectedEngine, ...], dict[int, ConfigError]]:
        found = await asyncio.gather(
            *(self._examined(index, url) for index, url in enumerate(urls)), return_exceptions=True
        )
        engines = {index: result for index, result in enumerate(found) if isinstance(result, ConnectedEngine)}
        absent = {index: result for index, result in enumerate(found) if isinstance(result, Unreachable)}
        problems: list[str] = []
        for index, result in enumerate(found):
            if isinstance(result, ConfigError):
                if index not in absent or len(engines) < max(least, 1):
                    problems += result.problems
            elif isinstance(result, BaseException):
                raise result
        if problems:
            raise ConfigError(problems)
        for index in absent:  # they will have to hold weights as the others do, or are refused when they come
            engines[index] = self._connected(self._connection(index, urls[index]), next(iter(engines.values())).facts)
        return tuple(engines[index] for index in range(len(urls))), dict(absent)

    async def _examined(self, index: int, url: str) -> ConnectedEngine:
        connection = self._connection(index, url)
        return self._connected(connection, await examine(connection, self._expected))

    @staticmethod
    def _connection(index: int, url: str) -> Connection:
        return Connection(f"engine {index} ({url.rstrip('/')})", url)

    def _connected(self, connection: Connection, facts: EngineFacts) -> ConnectedEngine:
        caller = SglangCaller(self._loop, connection)
        return ConnectedEngine(endpoint=self._endpoint(connection, facts, caller), caller=caller, facts=facts)

    def _endpoint(self, connection: Connection, facts: EngineFacts, caller: SglangCaller) -> SglangEndpoint:
        progress = self._progress.setdefault(connection.url, Progress())
        return SglangEndpoint(
            connection, is_in_use=lambda: self.is_in_use(caller), progress=progress, **self._options(facts)
        )

    def _options(self, facts: EngineFacts) -> dict[str, Any]:
        return {
            "vocab_size": self._expected.vocab_size,
            "context_length": facts.context_length,
            "incremental": facts.incremental,
            "stream_interval": self._settings.stream_interval,
            "idle_seconds": self._settings.idle_seconds,
            "first_seconds": self._settings.start_seconds,
            "spares_others": self._spares_others,
        }

    def _router(self) -> Connection:
        url = self._settings.router_url
        assert url is not None
        return Connection(f"the router ({url.rstrip('/')})", url)
