"""`linear_logprob`: its arguments, its autograd function, and the hand-over to a backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from klear_kernels.backends import load_backend
from klear_kernels.group_agreement import same_on_all_ranks
from klear_kernels.head_problem import HeadOptions, check_head_inputs, described, head_problem
from klear_kernels.head_products import HeadGradients
from klear_kernels.main_grad import MainGrad
from klear_kernels.softmax_rows import RowStatistics


class LogprobOutput(NamedTuple):
    """Per-token results, float32 [T] (float64 for float64 inputs), exactly 0 at ignored labels.

    Attributes:
        logprobs: log-probability of each label, in nats; differentiable.
        entropy: entropy of each row's distribution, in nats; differentiable; None when not asked for.
        logsumexp: log-sum-exp of the logits over the temperature; carries no gradient.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    logsumexp: torch.Tensor


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    sequence_parallel: bool = False,
    with_entropy: bool = True,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    into_main_grad: bool = False,
    backend: str | None = None,
) -> LogprobOutput:
    """Log-probability of each label under softmax(hidden @ weight.T / temperature), one chunk of logits at a time.

    Differentiable in `hidden` and `weight` for any upstream gradient on `logprobs` and `entropy`; the backward
    pass recomputes the logits. With `tp_group`, all its ranks call together with equal labels and, going back,
    equal upstream gradients; each gets the full gradient of `hidden` and the gradient of its own weight shard.

    Args:
        hidden: [T, H], bfloat16, float32 or float64; [T / tp, H], this rank's slice, when `sequence_parallel`.
        weight: [V_local, H], same dtype; this rank's rows of the vocabulary.
        labels: int64 [T], global word ids or `ignore_index`.
        tp_group: process group that the vocabulary is split over; None when it is whole.
        vocab_size: number of words; weight rows beyond it are padding and are never read. Default V_local * tp.
        temperature: divides the logits.
        sequence_parallel: hidden states are split over `tp_group` by tokens.
        with_entropy: also return the entropy.
        chunk_tokens: most rows of logits to hold; default from a byte budget. Results do not depend on it
            beyond rounding.
        ignore_index: label of tokens to leave out: results 0, gradients exactly 0.
        softcap: accepted so that it can be refused: capped logits are not computed here.
        into_main_grad: add the weight's gradient to `weight.main_grad` in place during the backward pass, as
            Megatron's own layers do, rather than return it.
        backend: name of a backend; default the best for the device and dtype.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes, devices, labels or numbers that do not fit together; on the first call with a `tp_group`,
            also what another of its ranks refused, or was given otherwise.
    """
    with same_on_all_ranks(
        tp_group,
        lambda: described(hidden, weight, labels, options, vocab_size=vocab_size, into_main_grad=into_main_grad),
    ):
        options = check_head_inputs(
            hidden,
            weight,
            labels,
            tp_group=tp_group,
            vocab_size=vocab_size,
            temperature=temperature,
            sequence_parallel=sequence_parallel,
            with_entropy=with_entropy,
            chunk_tokens=chunk_tokens,
            ignore_index=ignore_index,
            softcap=softcap,
            operation="linear_logprob",
            backend=backend,
        )
        main_grad = MainGrad.of(weight) if into_main_grad else None
    return LogprobOutput(*_LinearLogprob.apply(hidden, weight, labels, options, main_grad))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        options: HeadOptions,
        main_grad: MainGrad | None,
    ) -> tuple[torch.Tensor | None, ...]:
        problem = head_problem(hidden, weight, labels, options)
        with torch.autocast(hidden.device.type, enabled=False):  # the precision of the products is decided here
            rows = load_backend("linear_logprob", options.backend).forward(problem)
        ctx.save_for_backward(hidden, weight, labels, problem.rows, *rows.tensors())
        ctx.options, ctx.main_grad = options, main_grad
        ctx.set_materialize_grads(False)
        logsumexp = problem.scatter(rows.logsumexp)
        ctx.mark_non_differentiable(logsumexp)
        # clone: an output must not be the very tensor that was saved
        entropy = None if rows.entropy is None else problem.scatter(rows.entropy).clone()
        return problem.scatter(rows.logprobs).clone(), entropy, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, kept, *statistics = ctx.saved_tensors
        grad_logprobs, grad_entropy, _ = upstream
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        rows = RowStatistics.from_tensors(statistics)
        g = torch.zeros_like(rows.logprobs) if grad_logprobs is None else grad_logprobs[kept]
        h = None if grad_entropy is None else grad_entropy[kept]
        # A token that asks for no gradient costs no product (NaN counts as asking, so that it is seen).
        asking = (g.ne(0) if h is None else g.ne(0) | h.ne(0)).nonzero().squeeze(1)
        problem = head_problem(hidden, weight, labels, ctx.options, kept[asking])
        main_grad: MainGrad | None = ctx.main_grad
        gradients = HeadGradients(
            problem,
            for_hidden=ctx.needs_input_grad[0],
            for_weight=ctx.needs_input_grad[1],
            main_grad=None if main_grad is None else main_grad.buffer,
        )
        with torch.autocast(hidden.device.type, enabled=False):
            load_backend("linear_logprob", ctx.options.backend).backward(
                problem, rows.select(asking), g[asking], None if h is None else h[asking], gradients
            )
        grad_hidden, grad_weight = gradients.finish()
        if main_grad is not None and ctx.needs_input_grad[1]:
            grad_weight = main_grad.placeholder()
        return grad_hidden, grad_weight, None, None, None
