"""Where engines on several machines are told to meet the trainer."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klear.weight_sync.distributed_transport import address_for


class Probe:
    """A socket that would be reached from an address of ours that depends on where it connects to."""

    def __init__(self, family: socket.AddressFamily, *_: Any) -> None:
        self.family, self.target = family, ""

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def connect(self, address: tuple[str, int]) -> None:
        self.target = address[0]
        assert (":" in self.target) == (self.family == socket.AF_INET6)

    def getsockname(self) -> tuple[str, int]:
        if self.family == socket.AF_INET6:
            return ("::1" if self.target == "::1" else "fd00::1", 4000)
        return ("127.0.0.1" if self.target.startswith("127.") else "10.0.0.1", 4000)


@pytest.mark.parametrize(
    ("urls", "address"),
    [
        (["http://127.0.0.1:1"], "127.0.0.1"),
        (["http://127.0.0.1:1", "http://127.0.0.2:1"], "127.0.0.1"),
        # The first engine knows this machine as 127.0.0.1; the second one would look for the store on its own.
        (["http://127.0.0.1:1", "http://10.0.0.2:1"], "10.0.0.1"),
        (["http://10.0.0.3:1", "http://10.0.0.2:1"], "10.0.0.1"),
        (["http://[::1]:1"], "::1"),
        (["http://[::1]:1", "http://[fd00::2]:1"], "fd00::1"),
    ],
)
def test_the_address_is_one_that_engines_elsewhere_reach(
    urls: list[str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", Probe)
    engines: Any = SimpleNamespace(callers=[SimpleNamespace(url=url, name=url) for url in urls])
    assert address_for(engines) == address
