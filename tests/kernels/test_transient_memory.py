"""What a call takes beyond its inputs and results at the size of Qwen3-8B, measured on a GPU."""

from __future__ import annotations

import pytest
import torch

from klear_kernels import linear_logprob, linear_policy_loss
from megatron_klear.algorithm import PolicyObjective

TOKENS, WORDS, SIZE = 32768, 151936, 4096


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(TOKENS, SIZE, generator=generator, device=device).bfloat16()
    weight = torch.empty(WORDS, SIZE, dtype=torch.bfloat16, device=device).normal_(0, 0.05, generator=generator)
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator, device=device)
    # Once small: the first launch of each kernel, and the workspace of cuBLAS, are not the call's.
    linear_logprob(hidden[:64], weight, labels[:64], backend="triton")
    torch.cuda.synchronize()
    return hidden, weight, labels


def measured(before: int) -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_logprobs_take_at_most_300_mb(head: tuple[torch.Tensor, ...]) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_logprob(*head, backend="triton")
    assert measured(before) <= 300_000_000


@pytest.mark.gpu
def test_the_loss_and_both_gradients_take_at_most_3_gb(head: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels = head
    weight.requires_grad_()
    hidden.requires_grad_()
    weight.main_grad = torch.zeros(WORDS, SIZE, device=weight.device)
    column = torch.full((TOKENS,), 1.0 / TOKENS, device=weight.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = linear_policy_loss(
        hidden,
        weight,
        labels,
        torch.full_like(column, -12.0),
        torch.ones_like(column),
        column,
        column,
        objective=PolicyObjective(kind="gppo"),
        into_main_grad=True,
        backend="triton",
    )
    grad_hidden_bytes = hidden.numel() * hidden.element_size()
    assert measured(before) <= 3_000_000_000 + grad_hidden_bytes
    output.loss.backward()
    assert measured(before) <= 3_000_000_000 + grad_hidden_bytes
    assert weight.grad is None
    assert bool(weight.main_grad.any())
