"""Weight gradients added to Megatron's main_grad: right for any upstream, and as Megatron's hooks expect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klear_kernels import linear_logprob, linear_policy_loss
from klear_kernels.linear_policy_loss.reference import reference_policy_loss
from megatron_klear.algorithm import PolicyObjective

GPPO = PolicyObjective(kind="gppo")


def make_arguments(dtype: torch.dtype = torch.float64, tokens: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(15, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, 15, (tokens,), generator=generator)
    labels[::4] = -100
    columns = torch.rand(4, tokens, generator=generator, dtype=torch.float64)
    return [hidden, weight, labels, -3 * columns[0], columns[1] - 0.5, columns[2], columns[3]]


def exact_gradient(arguments: list[torch.Tensor]) -> torch.Tensor:
    return torch.autograd.grad(reference_policy_loss(*arguments, objective=GPPO).loss, arguments[1])[0]


def call(arguments: list[torch.Tensor], **settings: Any) -> torch.Tensor:
    return linear_policy_loss(*arguments, objective=GPPO, into_main_grad=True, chunk_tokens=7, **settings).loss


@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0, 0.0])
def test_any_upstream_gradient(upstream: float) -> None:
    arguments = make_arguments()
    want = exact_gradient(arguments)
    weight = arguments[1]
    weight.main_grad = torch.full_like(weight, 2.0).detach()
    (call(arguments) * upstream).backward()
    torch.testing.assert_close(weight.main_grad, 2.0 + upstream * want, rtol=1e-10, atol=1e-12)
    assert weight.grad is None


def test_two_microbatches_and_a_kept_graph() -> None:
    arguments = make_arguments()
    want = exact_gradient(arguments)
    weight = arguments[1]
    weight.main_grad = torch.zeros_like(weight).detach()
    first, second = call(arguments), call(arguments)  # both forward before either backward, as pipelines do
    second.backward(retain_graph=True)
    first.backward()
    torch.testing.assert_close(weight.main_grad, 2 * want, rtol=1e-10, atol=1e-12)
    second.backward(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(weight.main_grad, 2.5 * want, rtol=1e-10, atol=1e-12)


def test_nothing_is_added_where_no_gradient_is_recorded() -> None:
    arguments = make_arguments()
    weight = arguments[1]
    weight.main_grad = torch.zeros_like(weight).detach()
    with torch.no_grad():
        call(arguments)
    arguments[1] = weight.detach()
    arguments[1].main_grad = weight.main_grad
    call(arguments).backward()
    assert not weight.main_grad.any()


def test_logprobs_add_in_the_backward_pass() -> None:
    arguments = make_arguments()
    hidden, weight, labels = arguments[:3]
    want = torch.autograd.grad(linear_logprob(hidden, weight, labels).logprobs.square().sum(), weight)[0]
    weight.main_grad = torch.zeros_like(weight).detach()
    output = linear_logprob(hidden, weight, labels, into_main_grad=True)
    assert not weight.main_grad.any()
    output.logprobs.square().sum().backward()
    torch.testing.assert_close(weight.main_grad, want)
    assert weight.grad is None


@pytest.mark.parametrize("tied", [False, True])
def test_as_megatron_counts_it(tied: bool) -> None:
    """Its hook adds `grad` to `main_grad` unless the flag is up; a weight shared with an embedding always."""
    arguments = make_arguments(torch.bfloat16)
    weight = arguments[1]
    want = exact_gradient(
        [tensor.detach().double().requires_grad_() if i < 2 else tensor for i, tensor in enumerate(arguments)]
    )
    weight.main_grad = torch.zeros(weight.shape)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # as Megatron asserts when it overlaps the reduction
        if not parameter.grad_added_to_main_grad or parameter.zero_out_wgrad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    total = call(arguments)
    if tied:
        total = total + torch.nn.functional.embedding(torch.tensor([3]), weight).float().sum()
        want = want.clone()
        want[3] += 1.0
    total.backward()
    assert weight.grad_added_to_main_grad
    error = (weight.main_grad.double() - want).norm() / want.norm()
    assert float(error) < 1e-6  # nothing was rounded to bfloat16 on the way


@pytest.mark.parametrize(
    ("main_grad", "message"),
    [
        (None, "into_main_grad: weight has no main_grad"),
        (torch.zeros(15, 6, dtype=torch.bfloat16), r"weight.main_grad is torch.bfloat16 .* allowed torch.float32"),
        (torch.zeros(14, 6), r"weight.main_grad is torch.float32 \(14, 6\) .* allowed torch.float32 \(15, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(main_grad: torch.Tensor | None, message: str) -> None:
    arguments = make_arguments(torch.float32)
    arguments[1].main_grad = main_grad
    with pytest.raises(ValueError, match=message):
        call(arguments)
    with pytest.raises(ValueError, match=message):
        linear_logprob(*arguments[:3], into_main_grad=True)
