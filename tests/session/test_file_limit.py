"""Each response in flight is a connection, and so an open file."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys

import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.session import managed
from megatron_klear.session.managed import ManagedGroups


def test_a_run_may_open_as_many_files_as_the_system_allows() -> None:
    script = (
        "import resource; from megatron_klear.session import launch\n"
        "hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "launch._raise_file_limit()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_requests_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(managed.resource, "getrlimit", lambda which: (1024, 1024))
    with caplog.at_level(logging.WARNING):
        assert ManagedGroups._connections_each(256, engines=3) == 256
        assert not caplog.records
        assert ManagedGroups._connections_each(256, engines=4) == (1024 - 256) // 4
    assert "4 engines with 256 requests each need more than the 1024 files" in caplog.text
    with pytest.raises(RolloutError, match=r"ulimit -Hn\); raise that limit"):
        ManagedGroups._connections_each(1, engines=1000)
    monkeypatch.setattr(managed.resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert ManagedGroups._connections_each(256, engines=1000) == 256
