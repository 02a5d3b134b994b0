"""RMSNorm: its formula, and the mark that Megatron's sequence parallelism looks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_klear.model.norm import RMSNorm


def config(**changes: Any) -> Any:
    return SimpleNamespace(**{"params_dtype": torch.float64, "sequence_parallel": False} | changes)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_formula(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 7, generator=generator, dtype=torch.float64)
    norm = RMSNorm(config(), 7, eps=eps)
    norm.requires_grad_(False)
    norm.weight.copy_(torch.rand(7, generator=generator) + 0.5)
    for i in range(5):
        for j in range(3):
            mean_square = sum(float(value) ** 2 for value in x[i, j]) / 7
            expected = [
                float(v) / (mean_square + eps) ** 0.5 * float(w) for v, w in zip(x[i, j], norm.weight, strict=True)
            ]
            torch.testing.assert_close(norm(x)[i, j].tolist(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("marked", [True, False])
def test_the_weight_says_whether_ranks_see_different_tokens(marked: bool) -> None:
    assert RMSNorm(config(sequence_parallel=marked), 4).weight.sequence_parallel is marked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_has_the_models_type_and_starts_at_one(dtype: torch.dtype) -> None:
    weight = RMSNorm(config(params_dtype=dtype), 4).weight
    assert weight.dtype == dtype
    assert weight.tolist() == [1.0] * 4
