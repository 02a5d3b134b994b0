"""One thread; where Triton kernels run, in its interpreter or on a GPU; the CUDA part, emulated or real."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What bindings.cpp offers, on CPU tensors; see emulated_cuda.py."""
    spec = importlib.util.spec_from_file_location("emulated_cuda", Path(__file__).with_name("emulated_cuda.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EmulatedCuda(module.compile_emulated(tmp_path_factory.mktemp("emulated_cuda")))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, torch.device]:
    """The compiled part and the device of its tensors: emulated on a CPU, and the real one where there is a GPU.

    Backend "cuda" of linear_policy_loss is offered on that device.
    """
    from klear_kernels import backends, cuda_extension

    device = torch.device(request.param)
    if device.type == "cuda":
        missing = cuda_extension.import_error()
        if missing is not None:  # it is optional: a machine with a GPU may have no nvcc
            pytest.skip(missing)
        return cuda_extension.extension(), device
    emulated = request.getfixturevalue("emulated_cuda")
    monkeypatch.setattr(cuda_extension, "extension", lambda: emulated)
    for refusals in backends._BACKENDS.values():
        monkeypatch.setitem(refusals, "cuda", lambda device, dtype: None)
    return emulated, device


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
