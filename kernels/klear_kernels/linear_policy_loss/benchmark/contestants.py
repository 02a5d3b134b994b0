"""Who takes part: every backend of ours that runs here, full logits in torch, and the libraries that import.

Each computes one of three operations on the same inputs:

    logprob   log-probability of every label, no gradients               useful work: 2 N H V
    policy    GPPO loss plus LM loss, gradients of hidden and weight      6 N H V
    lm        LM loss alone, gradients of hidden and weight               6 N H V; scalar-only libraries can do this
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from klear_kernels.backends import backend_names, backend_refusal
from klear_kernels.linear_logprob.function import linear_logprob
from klear_kernels.linear_policy_loss.benchmark.problem import HeadInputs
from klear_kernels.linear_policy_loss.function import linear_policy_loss
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms
from megatron_klear.algorithm import policy_token_loss

OPERATIONS = ("logprob", "policy", "lm")
USEFUL_PRODUCTS = {"logprob": 1, "policy": 3, "lm": 3}
PRODUCTS = "products alone"
"""The floor: the operation's matrix products of the same shape, back to back, and nothing else."""

_FLOOR_ROWS = 8192


class Outcome(NamedTuple):
    """What a run hands back: log-probabilities [N] where it has them, and the gradients it was asked for."""

    logprobs: torch.Tensor | None = None
    grad_hidden: torch.Tensor | None = None
    grad_weight: torch.Tensor | None = None


Run = Callable[[HeadInputs], Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to compute operations.

    Attributes:
        name: as in the table.
        kind: "ours", "ours in place" (the weight's gradient is added to a main_grad), "peer" or "floor".
        runs: by operation.
        executed_products: products of 2 N H V that it computes, by operation, as its source has it.
        package: what to install where it is missing.
        missing: why it cannot take part, or None.
        prepare: called before each run, untimed.
    """

    name: str
    kind: str
    runs: Mapping[str, Run]
    executed_products: dict[str, int]
    package: str = ""
    missing: str | None = None
    prepare: Callable[[HeadInputs], None] = lambda inputs: None


def contestants(device: torch.device, dtype: torch.dtype, *, with_entropy: bool = False) -> list[Contestant]:
    """Everyone, those that cannot take part on `device` with `dtype` included, with the reason.

    `with_entropy` has ours compute the entropy too, which no other does.
    """
    return [
        _products(),
        *_ours(device, dtype, with_entropy),
        *_ours_in_place(device, dtype, with_entropy),
        *_torch_itself(),
        _torch_function(),
        *_cut(),
        _liger(),
        _quack(),
    ]


def _terms_of(inputs: HeadInputs, operation: str) -> PolicyTerms:
    return inputs.terms if operation == "policy" else inputs.lm_terms


def _products() -> Contestant:
    def run(inputs: HeadInputs, *, backward: bool) -> Outcome:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        rows = min(_FLOOR_ROWS, hidden.shape[0])
        logits = torch.empty(rows, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            torch.mm(part, weight.t(), out=logits[: part.shape[0]])
            if backward:
                torch.mm(logits[: part.shape[0]], weight, out=grad_hidden[start : start + rows])
                torch.mm(logits[: part.shape[0]].t(), part, out=grad_weight)
        return Outcome()

    forward, both = functools.partial(run, backward=False), functools.partial(run, backward=True)
    runs = {"logprob": forward, "policy": both, "lm": both}
    return Contestant(name=PRODUCTS, kind="floor", runs=runs, executed_products=USEFUL_PRODUCTS)


def _ours(device: torch.device, dtype: torch.dtype, with_entropy: bool) -> list[Contestant]:
    def logprob(inputs: HeadInputs, *, backend: str) -> Outcome:
        with torch.no_grad():
            output = linear_logprob(
                inputs.hidden, inputs.weight, inputs.labels, with_entropy=with_entropy, backend=backend
            )
        return Outcome(output.logprobs)

    result = []
    for name in backend_names("linear_policy_loss"):
        runs: dict[str, Run] = {}
        if name in backend_names("linear_logprob"):
            runs["logprob"] = functools.partial(logprob, backend=name)
        for operation in ("policy", "lm"):
            runs[operation] = functools.partial(
                _loss, backend=name, operation=operation, with_entropy=with_entropy, in_place=False
            )
        missing = backend_refusal("linear_policy_loss", name, device, dtype)
        result.append(
            Contestant(name=f"klear {name}", kind="ours", runs=runs, executed_products=USEFUL_PRODUCTS, missing=missing)
        )
    return result


def _ours_in_place(device: torch.device, dtype: torch.dtype, with_entropy: bool) -> list[Contestant]:
    """As the trainer calls them: the weight's gradient is added to the buffer that Megatron keeps for it."""

    def clear(inputs: HeadInputs) -> None:
        inputs.weight.main_grad = torch.zeros_like(inputs.weight, dtype=torch.float32)  # type: ignore[attr-defined]

    return [
        Contestant(
            name=f"klear {name} main_grad",
            kind="ours in place",
            runs={
                operation: functools.partial(
                    _loss, backend=name, operation=operation, with_entropy=with_entropy, in_place=True
                )
                for operation in ("policy", "lm")
            },
            executed_products=USEFUL_PRODUCTS,
            missing=backend_refusal("linear_policy_loss", name, device, dtype),
            prepare=clear,
        )
        for name in backend_names("linear_policy_loss")
    ]


def _loss(inputs: HeadInputs, *, backend: str, operation: str, with_entropy: bool, in_place: bool) -> Outcome:
    terms, weight = _terms_of(inputs, operation), inputs.weight
    output = linear_policy_loss(
        inputs.hidden,
        weight,
        inputs.labels,
        terms.old_logprobs,
        terms.advantages,
        terms.policy_weight,
        terms.lm_weight,
        objective=terms.objective,
        with_entropy=with_entropy,
        into_main_grad=in_place,
        backend=backend,
    )
    if not in_place:
        return Outcome(output.logprobs, *torch.autograd.grad(output.loss, (inputs.hidden, weight)))
    (grad_hidden,) = torch.autograd.grad(output.loss, (inputs.hidden,))
    grad_weight: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
    del weight.main_grad  # type: ignore[attr-defined]  # others need the memory
    return Outcome(output.logprobs, grad_hidden, grad_weight)


def _through_logprobs(logprobs_of: Callable[..., torch.Tensor], operation: str) -> Run:
    """An operation by way of differentiable log-probabilities [N], as a library's user would write it."""

    def run(inputs: HeadInputs) -> Outcome:
        if operation == "logprob":
            with torch.no_grad():
                return Outcome(logprobs_of(inputs.hidden, inputs.weight, inputs.labels))
        terms = _terms_of(inputs, operation)
        logprobs = logprobs_of(inputs.hidden, inputs.weight, inputs.labels).float()
        loss = -(terms.lm_weight * logprobs).sum()
        if operation == "policy":
            values = policy_token_loss(logprobs, terms.old_logprobs, terms.advantages, terms.objective)
            loss = loss + (terms.policy_weight * values).sum()
        return Outcome(logprobs, *torch.autograd.grad(loss, (inputs.hidden, inputs.weight)))

    return run


def _through_scalar(mean_loss: Callable[..., torch.Tensor]) -> Run:
    """The LM loss, by way of a library's mean over the tokens."""

    def run(inputs: HeadInputs) -> Outcome:
        loss = mean_loss(inputs.hidden, inputs.weight, inputs.labels)
        return Outcome(None, *torch.autograd.grad(loss, (inputs.hidden, inputs.weight)))

    return run


def full_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities through all logits at once, widened to float32 as trainers do."""
    logits = (hidden @ weight.t()).float()
    return torch.log_softmax(logits, dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(full_logprobs)


def _compiled_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _compiled()(hidden, weight, labels)


def _torch_itself() -> list[Contestant]:
    return [
        Contestant(
            name=name,
            kind="peer",
            runs={operation: _through_logprobs(function, operation) for operation in OPERATIONS},
            executed_products=USEFUL_PRODUCTS,
        )
        for name, function in (("torch full logits", full_logprobs), ("torch.compile full logits", _compiled_logprobs))
    ]


def _torch_function() -> Contestant:
    # Exists from torch 2.13 on, and works in chunks only when given options.
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)

    def mean_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert function is not None
        assert options is not None
        return function(hidden, weight, labels, options=options())

    return Contestant(
        name="F.linear_cross_entropy",
        kind="peer",
        runs={"lm": _through_scalar(mean_loss)},
        executed_products={"lm": 3},
        package="torch",
        missing=None if function and options else f"torch {torch.__version__} does not have it",
    )


def _imported(module: str, name: str) -> tuple[Any, str | None]:
    """An attribute of a module, or why there is none."""
    try:
        return getattr(importlib.import_module(module), name), None
    except ModuleNotFoundError as error:
        return None, f"not installed ({error.name})"
    except Exception as error:  # foreign code, and some of it looks for a GPU when imported
        return None, f"does not import: {type(error).__name__}: {error}"


def _cut() -> list[Contestant]:
    function, missing = _imported("cut_cross_entropy", "linear_cross_entropy")
    result = []
    for name, threshold in (("cut-cross-entropy", "high"), ("cut-cross-entropy unfiltered", None)):

        def logprobs_of(
            hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, threshold: Any = threshold
        ) -> torch.Tensor:
            return -function(hidden, weight, labels, reduction="none", filter_eps=threshold)

        result.append(
            Contestant(
                name=name,
                kind="peer",
                runs={operation: _through_logprobs(logprobs_of, operation) for operation in OPERATIONS},
                executed_products={"logprob": 1, "policy": 4, "lm": 4},
                package="cut-cross-entropy",
                missing=missing,
            )
        )
    return result


def _liger() -> Contestant:
    function, missing = _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")

    def logprobs_of(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -function(hidden, weight, labels, reduction="none", accum_dtype=torch.float32)

    def mean_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return function(hidden, weight, labels, reduction="mean", accum_dtype=torch.float32)

    return Contestant(
        name="liger-kernel",
        kind="peer",
        runs={
            "logprob": _through_logprobs(logprobs_of, "logprob"),
            "policy": _through_logprobs(logprobs_of, "policy"),
            "lm": _through_scalar(mean_loss),
        },
        executed_products={"logprob": 1, "policy": 4, "lm": 3},
        package="liger-kernel",
        missing=missing,
    )


def _quack() -> Contestant:
    function, missing = _imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy")

    def mean_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return function(hidden, weight, labels, reduction="mean")

    return Contestant(
        name="QuACK",
        kind="peer",
        runs={"lm": _through_scalar(mean_loss)},
        executed_products={"lm": 3},
        package="quack-kernels",
        missing=missing,
    )
