"""Process groups that begin and end with a test, so that it may start what it likes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_klear import parallel


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launch and no process group, before and after."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    parallel.stop()
    yield
    parallel.stop()
