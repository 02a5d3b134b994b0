"""The stand-in for CUDA: rewrites the word on a machine without it, and does nothing where it is there."""

from __future__ import annotations

import pytest
import torch

from megatron_klear.parallel import cpu_device, cuda_means_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there, so nothing stands in for it")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", torch.device("cuda"), torch.device("cuda", 1)])
def test_tensors_asked_for_on_cuda_are_made_on_the_cpu(device: object) -> None:
    with cuda_means_cpu():
        for made in (
            torch.zeros(3, device=device),
            torch.empty(2, 2, dtype=torch.int, device=device),
            torch.arange(4, device=device),
            torch.tensor([1.0, 2.0], device=device),
            torch.ones(2).to(device=device),
        ):
            assert made.device.type == "cpu"
    assert torch.arange(4).sum() == 6


def test_other_devices_and_values_are_left_alone() -> None:
    with cuda_means_cpu():
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        torch.testing.assert_close(torch.linspace(0, 1, 3), torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
    ],
)
def test_tensor_types_are_reported_as_cuda_inside_only(dtype: torch.dtype, name: str) -> None:
    tensor = torch.zeros(1, dtype=dtype)
    with cuda_means_cpu():
        assert tensor.type() == name
        assert tensor.type(torch.float64).dtype == torch.float64, "a conversion is still a conversion"
    assert tensor.type() == name.replace(".cuda", "")


def test_types_without_a_cuda_check_keep_their_name() -> None:
    with cuda_means_cpu():
        assert torch.zeros(1, dtype=torch.int64).type() == "torch.LongTensor"


def test_moving_to_cuda_gives_the_same_tensor() -> None:
    tensor = torch.arange(3)
    with cuda_means_cpu():
        assert tensor.cuda() is tensor


def test_gradients_pass_through() -> None:
    weight = torch.ones(3, requires_grad=True)
    with cuda_means_cpu():
        (weight * torch.tensor([1.0, 2.0, 3.0], device="cuda")).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 2.0, 3.0]


def test_outside_the_context_cuda_is_refused_as_ever() -> None:
    with cuda_means_cpu():
        pass
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_installed_functions_speak_of_the_cpu_and_keep_random_states() -> None:
    cpu_device.install()
    assert torch.device(torch.cuda.current_device()) == torch.device("cpu")
    torch.cuda.synchronize()
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    torch.testing.assert_close(torch.rand(4), first, rtol=0, atol=0)


def test_megatron_forks_its_random_states() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    cpu_device.install()
    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    outside = torch.get_rng_state()
    tracker.add("mine", 7)
    with cuda_means_cpu(), tracker.fork("mine"):
        first = torch.rand(3)
    torch.testing.assert_close(torch.get_rng_state(), outside, rtol=0, atol=0)
    with tracker.fork("mine"):
        second = torch.rand(3)
    assert not torch.equal(first, second), "the state goes on from fork to fork"
    torch.manual_seed(7)
    torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)


def test_where_cuda_is_there_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_device, "_installed", False)
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "manual_seed")}
    cpu_device.install()
    assert {name: getattr(torch.cuda, name) for name in before} == before
    assert cpu_device._installed is False
    with cuda_means_cpu():
        assert torch.zeros(1).type() == "torch.FloatTensor"
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")
