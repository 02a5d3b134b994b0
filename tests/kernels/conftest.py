"""One thread, and where Triton kernels run: in its interpreter in a process of their own, or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The products here are tiny, and other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def triton_device(request: pytest.FixtureRequest) -> torch.device:
    """A device that Triton kernels run on; the same assertions hold on both."""
    return torch.device(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `interpreted` to the process that test_triton_interpreter.py starts for them.

    Triton decides when it is imported whether kernels are interpreted, so one process cannot do both.
    """
    if INTERPRETING:
        from tests.kernels.triton_interpreter_shims import install

        install()
        return
    here = Path(__file__).parent
    elsewhere = [item for item in items if here in item.path.parents and item.get_closest_marker("interpreted")]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in set(elsewhere)]
