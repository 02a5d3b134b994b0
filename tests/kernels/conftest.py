"""One thread, since the products here are tiny and other tests run beside them; the CUDA part, emulated or real."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
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
        return cuda_extension.extension(), device
    emulated = request.getfixturevalue("emulated_cuda")
    monkeypatch.setattr(cuda_extension, "extension", lambda: emulated)
    monkeypatch.setitem(backends._BACKENDS["linear_policy_loss"], "cuda", lambda device, dtype: None)
    return emulated, device
