"""`linear_policy_loss`: its arguments, its autograd function, and the hand-over to a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from klear_kernels.backends import load_backend
from klear_kernels.group_agreement import same_on_all_ranks
from klear_kernels.head_problem import HeadOptions, HeadProblem, check_head_inputs, described, head_problem
from klear_kernels.head_products import HeadGradients
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms
from klear_kernels.main_grad import MainGrad
from klear_kernels.softmax_rows import RowStatistics

if TYPE_CHECKING:
    from megatron_klear.algorithm import PolicyObjective


class PolicyLossOutput(NamedTuple):
    """The loss and what it is made of; float32 (float64 for float64 inputs).

    Attributes:
        loss: scalar, policy_loss + lm_loss; the only differentiable one.
        policy_loss: scalar, sum of policy_weight * policy loss of each token.
        lm_loss: scalar, sum of lm_weight * (-logprob).
        logprobs: [T], nats, exactly 0 at ignored labels.
        entropy: [T], nats, exactly 0 at ignored labels; None when not asked for.
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    lm_loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Everything the autograd function needs that autograd does not track."""

    options: HeadOptions
    terms: PolicyTerms
    for_hidden: bool
    for_weight: bool
    main_grad: MainGrad | None


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    policy_weight: torch.Tensor,
    lm_weight: torch.Tensor,
    *,
    objective: PolicyObjective,
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
) -> PolicyLossOutput:
    """Sum over tokens of policy_weight * policy loss + lm_weight * (-logprob), one chunk of logits at a time.

    The gradients of `hidden` and `weight` are formed chunk by chunk during the forward pass, since the
    coefficient of a token is known as soon as its logprob is; the backward pass only scales them. They are not
    formed under `torch.no_grad` or for inputs that need none. With `tp_group`, all its ranks call together with
    equal per-token arguments; each gets the whole loss, the full gradient of `hidden` and the gradient of its
    own weight shard. No gradient flows to the per-token arguments.

    Equation: 14, with the policy loss of the objective (Eqs. 3, 6, 11, 15 or 17) and the LM loss of Eq. 13 or 8.

    Args:
        hidden: [T, H], bfloat16, float32 or float64; [T / tp, H], this rank's slice, when `sequence_parallel`.
        weight: [V_local, H], same dtype; this rank's rows of the vocabulary.
        labels: int64 [T], global word ids or `ignore_index`.
        old_logprobs, advantages: [T], floating; read only where policy_weight is not 0.
        policy_weight, lm_weight: [T], floating, every mask and denominator folded in; 0 for no such term.
        objective: kind of the policy loss and its constants.
        tp_group, vocab_size, temperature, sequence_parallel, with_entropy, chunk_tokens, ignore_index, softcap,
            backend: as in `linear_logprob`; the entropy is a diagnostic and has no gradient here.
        into_main_grad: add the weight's gradient to `weight.main_grad` in place, as Megatron's own layers do, rather
            than return it. It is added during the forward pass, so each call made while gradients are recorded must be
            followed by its backward pass, and must not stand inside activation checkpointing, which runs it twice. An
            upstream gradient other than 1 is put right in the backward pass, at the cost of two more products.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes, devices, labels or numbers that do not fit together; on the first call with a `tp_group`,
            also what another of its ranks refused, or was given otherwise.
    """
    with same_on_all_ranks(
        tp_group,
        lambda: described(
            hidden,
            weight,
            labels,
            options,
            vocab_size=vocab_size,
            into_main_grad=into_main_grad,
            objective=objective,
        ),
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
            operation="linear_policy_loss",
            backend=backend,
        )
        terms = PolicyTerms(
            old_logprobs=old_logprobs,
            advantages=advantages,
            policy_weight=policy_weight,
            lm_weight=lm_weight,
            objective=objective,
        )
        _check_terms(terms, labels)
        main_grad = MainGrad.of(weight) if into_main_grad else None
    # Asked here: inside an autograd function gradients are always off.
    recording = torch.is_grad_enabled()
    call = _Call(
        options=options,
        terms=terms,
        for_hidden=recording and hidden.requires_grad,
        for_weight=recording and weight.requires_grad,
        main_grad=main_grad,
    )
    return PolicyLossOutput(*_LinearPolicyLoss.apply(hidden, weight, labels, call))


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, call: _Call
    ) -> tuple[torch.Tensor | None, ...]:
        backend = load_backend("linear_policy_loss", call.options.backend)
        problem = head_problem(hidden, weight, labels, call.options)
        trained, untrained = _split_rows(problem, call)
        with torch.autocast(hidden.device.type, enabled=False):  # the precision of the products is decided here
            result = backend.forward(
                trained,
                call.terms.select(trained.rows, problem.compute_dtype),
                for_hidden=call.for_hidden,
                for_weight=call.for_weight,
                main_grad=None if call.main_grad is None else call.main_grad.buffer,
            )
            rest = backend.statistics(untrained) if untrained.num_rows else None
        ctx.call, ctx.scale_in_main_grad = call, 1.0
        if call.for_weight and call.main_grad is not None:
            again = (hidden, weight, labels, trained.rows, result.grad_logprobs, *result.rows.tensors())
        else:
            again = ()
        ctx.save_for_backward(result.grad_hidden, result.grad_weight, *again)
        # Per-token losses are summed at once, in float64: the order of summation does not depend on the chunks.
        policy_loss = result.policy_loss.sum(dtype=torch.float64).to(problem.compute_dtype)
        lm_loss = result.lm_loss.sum(dtype=torch.float64).to(problem.compute_dtype)
        logprobs = trained.scatter(result.rows.logprobs)
        entropy = None if result.rows.entropy is None else trained.scatter(result.rows.entropy)
        if rest is not None:
            logprobs.index_copy_(0, untrained.rows, rest.logprobs)
            if entropy is not None and rest.entropy is not None:
                entropy.index_copy_(0, untrained.rows, rest.entropy)
        ctx.mark_non_differentiable(policy_loss, lm_loss, logprobs, *([] if entropy is None else [entropy]))
        return policy_loss + lm_loss, policy_loss, lm_loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, *again = ctx.saved_tensors
        # Out of place, so that a graph that is kept can be gone through again.
        grad_hidden = None if grad_hidden is None else grad_hidden * upstream
        grad_weight = None if grad_weight is None else grad_weight * upstream
        if again:
            missing = upstream - ctx.scale_in_main_grad
            ctx.scale_in_main_grad = 0.0  # a second backward pass of a kept graph finds nothing added for it
            if bool(missing != 0):  # reads one number back from the device
                _add_to_main_grad(ctx.call, missing, *again)
            grad_weight = ctx.call.main_grad.placeholder()
        return grad_hidden, grad_weight, None, None


def _add_to_main_grad(
    call: _Call,
    scale: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor,
    grad_logprobs: torch.Tensor,
    *statistics: torch.Tensor | None,
) -> None:
    """Add `scale` times the weight's gradient to its main_grad, from recomputed logits."""
    assert call.main_grad is not None
    problem = head_problem(hidden, weight, labels, call.options, kept)
    gradients = HeadGradients(problem, for_hidden=False, for_weight=True, main_grad=call.main_grad.buffer)
    rows, backend = RowStatistics.from_tensors(statistics), load_backend("linear_logprob", call.options.backend)
    with torch.autocast(hidden.device.type, enabled=False):
        backend.backward(problem, rows, grad_logprobs * scale, None, gradients)


def _split_rows(problem: HeadProblem, call: _Call) -> tuple[HeadProblem, HeadProblem]:
    """Rows whose gradient is needed, and rows that only report a logprob; the latter cost one product, not three."""
    rows = problem.rows
    is_trained = call.terms.is_trained()[rows]
    if not (call.for_hidden or call.for_weight):
        return problem, replace(problem, rows=rows[:0])
    return replace(problem, rows=rows[is_trained]), replace(problem, rows=rows[~is_trained])


def _check_terms(terms: PolicyTerms, labels: torch.Tensor) -> None:
    # Here, not at import: log-probabilities alone need nothing but torch.
    from megatron_klear.algorithm import PolicyObjective

    if not isinstance(terms.objective, PolicyObjective):
        raise TypeError(f"objective: got {type(terms.objective).__name__}, allowed a PolicyObjective")
    for name in ("old_logprobs", "advantages", "policy_weight", "lm_weight"):
        tensor: torch.Tensor = getattr(terms, name)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, allowed a tensor")
        if tensor.shape != labels.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, labels have {tuple(labels.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, allowed a floating dtype")
        if tensor.device != labels.device:
            raise ValueError(f"{name}: got device {tensor.device}, labels are on {labels.device}")
