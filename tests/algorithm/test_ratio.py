"""The clamped ratio and the autograd node under every policy loss."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_klear.algorithm import importance_ratio
from megatron_klear.algorithm.ratio import attach_gradient, clamped_log_ratio

INF = math.inf


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (-1.0, -1.5, 0.5),
        (-300.0, -100.0, -20.0),
        (-100.0, -300.0, 20.0),
        (-INF, -1.0, -20.0),
        (-1.0, -INF, 20.0),
        (-INF, -INF, 0.0),
        (0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratio(new: float, old: float, expected: float, dtype: torch.dtype) -> None:
    result = clamped_log_ratio(torch.tensor([new], dtype=dtype), torch.tensor([old], dtype=dtype))
    assert result.dtype == dtype
    assert result.item() == pytest.approx(expected, abs=1e-6)


def test_nan_stays_nan() -> None:
    nan, one = torch.tensor([math.nan]), torch.tensor([-1.0])
    assert importance_ratio(nan, one).isnan().all()
    assert importance_ratio(one, nan).isnan().all()


def test_narrow_dtypes_are_widened_first() -> None:
    # In bfloat16 the difference of -10.0 and -10.0625 rounds away; widened, nothing more is lost.
    new, old = torch.tensor([-10.0], dtype=torch.bfloat16), torch.tensor([-10.0625], dtype=torch.bfloat16)
    result = importance_ratio(new, old)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(math.exp(0.0625), rel=1e-6)


def test_detached_even_if_the_old_logprobs_want_gradients() -> None:
    new, old = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    assert not importance_ratio(new, old).requires_grad


def test_value_and_slope_are_independent() -> None:
    leaf = torch.tensor([-INF, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    value, slope = torch.tensor([5.0, 6.0, 7.0]).double(), torch.tensor([-1.0, 0.5, 0.0]).double()
    result = attach_gradient(leaf, value, slope)
    assert result.tolist() == [5.0, 6.0, 7.0]
    (result * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [-1.0, 5.0, 0.0]


def test_gradient_has_the_dtype_of_the_logprobs() -> None:
    leaf = torch.tensor([-1.0], dtype=torch.bfloat16, requires_grad=True)
    attach_gradient(leaf, torch.ones(1), torch.full((1,), 0.25)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.item() == 0.25


def test_works_under_vmap() -> None:
    leaf = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return attach_gradient(logprobs, torch.ones(2), torch.tensor([2.0, 3.0])).sum()

    assert torch.vmap(torch.func.grad(loss))(leaf).tolist() == [[2.0, 3.0], [2.0, 3.0]]
