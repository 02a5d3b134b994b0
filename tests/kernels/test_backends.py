"""Which backend is chosen, and what is said of one that cannot run."""

from __future__ import annotations

import sys

import pytest
import torch

from klear_kernels import backends
from klear_kernels.backends import available_backends, choose_backend, load_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OPERATIONS = ("linear_logprob", "linear_policy_loss")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has an H100 and a triton that imports."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_triton_import_error", lambda: None)


@pytest.fixture(autouse=True)
def _not_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_is_preferred_for_bfloat16_on_a_gpu_and_only_there(hopper: None, operation: str) -> None:
    assert choose_backend(operation, None, CUDA, torch.bfloat16) == "triton"
    assert choose_backend(operation, "torch", CUDA, torch.bfloat16) == "torch"
    for dtype in (torch.float32, torch.float64):
        assert choose_backend(operation, None, CUDA, dtype) == "torch"
    assert choose_backend(operation, None, CPU, torch.bfloat16) == "torch"


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CUDA, torch.float32, "allowed on cuda: torch, or None; it multiplies bfloat16, the inputs are float32"),
        (CUDA, torch.float64, "it multiplies bfloat16, the inputs are float64"),
        (CPU, torch.bfloat16, "allowed on cpu: torch, or None; it runs on cuda devices, the inputs are on cpu"),
    ],
)
def test_triton_is_refused_with_the_reason(hopper: None, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ValueError, match=f"backend: got 'triton', .*{reason}"):
        choose_backend("linear_logprob", "triton", device, dtype)


def test_another_generation_of_device_takes_torch(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_backend("linear_policy_loss", None, CUDA, torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match=r"made for compute capability 9.0, the device has 8.0"):
        choose_backend("linear_policy_loss", "triton", CUDA, torch.bfloat16)


@pytest.mark.parametrize("missing", ["triton", "triton.tools.tensor_descriptor"])
def test_a_triton_that_does_not_import_is_no_error_unless_asked_for(
    hopper: None, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, missing, None)
    backends._triton_import_error.cache_clear()
    try:
        assert choose_backend("linear_logprob", None, CUDA, torch.bfloat16) == "torch"
        with pytest.raises(ValueError, match="triton cannot be imported"):
            choose_backend("linear_logprob", "triton", CUDA, torch.bfloat16)
    finally:
        backends._triton_import_error.cache_clear()


def test_the_interpreter_serves_cpu_tensors_only_on_request(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available_backends("linear_logprob", CPU, torch.bfloat16) == ("torch", "triton")
    assert choose_backend("linear_logprob", None, CPU, torch.bfloat16) == "torch"
    assert choose_backend("linear_logprob", "triton", CPU, torch.bfloat16) == "triton"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_torch_backend_loads(operation: str) -> None:
    assert load_backend(operation, "torch").__name__ == f"klear_kernels.{operation}.torch_backend"
