"""HTTP to one server: JSON in, JSON or a stream of JSON out, every way it can fail as an EndpointError."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from megatron_klear.records import EncodedJson
from megatron_klear.rollout.endpoint import EndpointError

_CONNECT_SECONDS = 10.0
_KEPT_SECONDS = 2.0
"""Of a connection without a request: a server closes one after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE), and a request that is
sent at that moment gets no answer, as if the server had died."""
_SHOWN_CHARACTERS = 400
_PIECE_BYTES = 2**18
_MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that say nothing against the request itself."""


class Refused(Exception):
    """A server understood a request and refuses it (status 4xx).

    Args:
        status: HTTP status.
        text: what it said.
    """

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text
        super().__init__(f"status {status}: {text}")


class Connection:
    """Requests to one server from one event loop.

    Args:
        name: of the engine, in messages.
        url: http://HOST:PORT.
    """

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url.rstrip("/")
        # No limit on connections: whoever sends bounds what is in flight. No proxies: engines are near.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEPT_SECONDS)
        self._client = httpx2.AsyncClient(trust_env=False, limits=limits)

    async def get(self, path: str, *, timeout_seconds: float) -> Any:
        """The JSON that a path answers.

        Raises:
            EndpointError: no answer, or none that is JSON.
            Refused: status 4xx.
        """
        return await self._exchange("GET", path, None, timeout_seconds)

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_seconds: float, setting: str = "") -> Any:
        """The JSON that a path answers to a JSON body.

        Args:
            path: of the request.
            body: one that is `EncodedJson` is sent as it is.
            timeout_seconds: longest silence of the server.
            setting: that this limit came from, for messages.

        Raises:
            EndpointError: no answer, or none that is JSON.
            Refused: status 4xx.
        """
        return await self._exchange("POST", path, body, timeout_seconds, setting)

    async def post_for_text(
        self, path: str, body: Mapping[str, Any], *, timeout_seconds: float, setting: str = ""
    ) -> str:
        """The text that a path answers; raises as `post` does."""
        return (await self._answer("POST", path, body, timeout_seconds, setting)).text

    async def status(self, path: str, *, timeout_seconds: float) -> int:
        """The HTTP status of a path, whatever it answers.

        Raises:
            EndpointError: no answer.
        """
        return (await self._sent("GET", path, None, timeout_seconds)).status_code

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a stream of server-sent events, up to its end mark; the caller limits the time.

        Raises:
            EndpointError: the connection failed, an event is no JSON object, or the stream has no end mark.
            Refused: status 4xx.
        """
        timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
        try:
            async with self._client.stream("POST", self.url + path, json=body, timeout=timeout) as response:
                if response.status_code >= 400:
                    await response.aread()
                    self._raise_for(path, response)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if not data or line.startswith(":"):
                        continue
                    if data == "[DONE]":
                        return
                    yield self._object(path, data)
        except httpx2.HTTPError as error:
            raise self._failed(path, error) from error
        except RuntimeError as error:
            raise self._closed(path, error) from error
        raise EndpointError(f"{self.name}: the answer to {path} stopped before its end", retry=True)

    async def close(self) -> None:
        """Close all connections; a second call does nothing."""
        await self._client.aclose()

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_seconds: float, setting: str = ""
    ) -> Any:
        response = await self._answer(method, path, body, timeout_seconds, setting)
        try:
            return response.json()
        except ValueError as error:
            raise self._malformed(f"{path} answered something that is no JSON: {_shown(response.text)}") from error

    async def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_seconds: float, setting: str = ""
    ) -> httpx2.Response:
        response = await self._sent(method, path, body, timeout_seconds, setting)
        self._raise_for(path, response)
        return response

    async def _sent(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_seconds: float, setting: str = ""
    ) -> httpx2.Response:
        timeout = httpx2.Timeout(timeout_seconds, connect=min(_CONNECT_SECONDS, timeout_seconds))
        content: dict[str, Any] = {"json": body}
        if isinstance(body, EncodedJson):
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body.data))}
            content = {"content": _pieces(body.data), "headers": headers}
        try:
            return await self._client.request(method, self.url + path, timeout=timeout, **content)
        except httpx2.HTTPError as error:
            limit = ", ".join(filter(None, [f"{timeout_seconds:g} s", setting]))
            raise self._failed(path, error, limit) from error
        except RuntimeError as error:
            raise self._closed(path, error) from error

    def _raise_for(self, path: str, response: httpx2.Response) -> None:
        status = response.status_code
        if status in _MAY_PASS:
            raise EndpointError(
                f"{self.name}: {path} answered status {status}: {_shown(response.text)}", retry=True
            )  # fmt: skip
        if status >= 300:
            raise Refused(status, _shown(_message(response.text)))

    def _object(self, path: str, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise self._malformed(f"{path} streamed something that is no JSON: {_shown(text)}") from error
        if not isinstance(value, dict):
            raise self._malformed(f"{path} streamed {_shown(text)}, expected an object")
        return value

    def _failed(self, path: str, error: httpx2.HTTPError, limit: str = "") -> EndpointError:
        if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout):
            return EndpointError(f"{self.name}: {path}: no answer in time ({limit})", retry=True)
        told = f"({type(error).__name__}: {error})"
        if not isinstance(error, httpx2.TransportError):  # an answer came, in an encoding that it is not in
            return self._malformed(f"malformed answer to {path} {told}")
        what = "no connection" if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) else "broken off"
        return EndpointError(f"{self.name}: {path}: {what} {told}", retry=True)

    def _closed(self, path: str, error: RuntimeError) -> Exception:
        """A server that has come back has connections of its own; whoever still uses the old ones asks again there."""
        if not self._client.is_closed:
            return error
        return EndpointError(f"{self.name}: {path}: its connections were closed", retry=True)

    def _malformed(self, what: str) -> EndpointError:
        return EndpointError(f"{self.name}: {what}", retry=True, malformed=True)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    """Bytes piece by piece: a socket's buffer may copy what it is given and cannot send at once."""
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]


def _message(text: str) -> str:
    """The message inside SGLang's JSON errors; the text itself when it is something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, dict):
        error = value.get("error", value)
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return str(error["message"])
    return text


def _shown(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[:_SHOWN_CHARACTERS] + "..."
