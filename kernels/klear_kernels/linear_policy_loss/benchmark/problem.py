"""The inputs that every contestant gets, and float64 results on a sample of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms, token_losses
from megatron_klear.algorithm import PolicyObjective

LOGSUMEXP = 20.0
"""What trained language models have, about; it decides how far logits rounded to bfloat16 are off."""

LM_WEIGHT = 0.1
"""Of tokens with a positive advantage, as in Eq. 13. With a negative one the two terms could cancel, and a relative
error would measure that."""

_ROW_BLOCK, _WORD_BLOCK = 1024, 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """One size of the benchmark.

    Attributes:
        hidden: [N, H], requires a gradient.
        weight: [V, H], same dtype, requires a gradient.
        labels: int64 [N].
        terms: what the policy loss of each token depends on; float32 [N].
        lm_terms: the same for the plain language-model loss: policy_weight 0, lm_weight 1 / N.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    terms: PolicyTerms
    lm_terms: PolicyTerms

    @property
    def flop_per_product(self) -> float:
        """2 N H V: multiplications and additions of one product."""
        return 2.0 * self.hidden.shape[0] * self.hidden.shape[1] * self.weight.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Float64 results of the inputs as they are rounded.

    Attributes:
        logsumexp, logprobs: [N].
        rows, words: int64, the sampled tokens and words.
        grad_hidden, grad_weight: gradients of those tokens [rows, H] and words [words, H], by operation.
        rounded_hidden, rounded_weight: what exact logits give if the gradient of the logits and the result are
            rounded to the dtype of the inputs.
    """

    logsumexp: torch.Tensor
    logprobs: torch.Tensor
    rows: torch.Tensor
    words: torch.Tensor
    grad_hidden: dict[str, torch.Tensor]
    grad_weight: dict[str, torch.Tensor]
    rounded_hidden: dict[str, torch.Tensor]
    rounded_weight: dict[str, torch.Tensor]


def make_inputs(
    tokens: int, words: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[HeadInputs, Exact, int]:
    """Draw inputs with a log-sum-exp near LOGSUMEXP and labels from improbable to nearly certain.

    Returns the inputs, their exact results with 64 sampled tokens and words, and that number.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    labels = torch.randint(0, words, (tokens,), generator=generator, device=device)
    weight = torch.empty(words, hidden_size, dtype=dtype, device=device)
    for start in range(0, words, _WORD_BLOCK):
        weight[start : start + _WORD_BLOCK] = normal(min(_WORD_BLOCK, words - start), hidden_size) / hidden_size**0.5
    # The label's logit lies `lead` above the log-sum-exp of the other words, which the spread of logits decides.
    lead = torch.rand(tokens, generator=generator, device=device) * 14 - 6
    background = LOGSUMEXP - torch.nn.functional.softplus(lead)
    spread = (2 * (background - math.log(words)).clamp(min=0.5)).sqrt()
    hidden = torch.empty(tokens, hidden_size, dtype=dtype, device=device)
    for start in range(0, tokens, _ROW_BLOCK):
        part = slice(start, min(start + _ROW_BLOCK, tokens))
        own = weight[labels[part]].float()
        rows = normal(part.stop - part.start, hidden_size) * spread[part].unsqueeze(1)
        missing = background[part] + lead[part] - (rows * own).sum(1)
        hidden[part] = rows + own * (missing / own.square().sum(1)).unsqueeze(1)

    logsumexp, logprobs = _row_results(hidden, weight, labels)
    ones = torch.ones(tokens, device=device) / tokens
    advantages = normal(tokens)
    terms = PolicyTerms(
        old_logprobs=(logprobs + 0.3 * normal(tokens)).float(),
        advantages=advantages,
        policy_weight=ones,
        lm_weight=torch.where(advantages > 0, LM_WEIGHT * ones, 0.0),
        objective=PolicyObjective(kind="gppo"),
    )
    lm_terms = PolicyTerms(
        old_logprobs=terms.old_logprobs,
        advantages=terms.advantages,
        policy_weight=0 * ones,
        lm_weight=ones,
        objective=terms.objective,
    )
    inputs = HeadInputs(
        hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), labels=labels, terms=terms, lm_terms=lm_terms
    )
    samples = min(64, tokens, words)
    rows = torch.randperm(tokens, generator=generator, device=device)[:samples]
    some = torch.randint(0, words, (samples,), generator=generator, device=device)
    some[: samples // 2] = labels[rows[: samples // 2]]  # words that are labels, and words that mostly are not
    return inputs, _exact(inputs, logsumexp, logprobs, rows, some.unique()), samples


def _row_results(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and label log-probability [N] in float64, a block of logits at a time."""
    logsumexp = torch.full(labels.shape, -torch.inf, dtype=torch.float64, device=hidden.device)
    for first in range(0, weight.shape[0], _WORD_BLOCK):
        words = weight[first : first + _WORD_BLOCK].double()
        for start in range(0, labels.shape[0], _ROW_BLOCK):
            part = slice(start, start + _ROW_BLOCK)
            block = torch.logsumexp(hidden[part].double() @ words.t(), dim=1)
            logsumexp[part] = torch.logaddexp(logsumexp[part], block)
    label_logits = torch.empty_like(logsumexp)
    for start in range(0, labels.shape[0], _ROW_BLOCK):
        part = slice(start, start + _ROW_BLOCK)
        label_logits[part] = (hidden[part].double() * weight[labels[part]].double()).sum(1)
    return logsumexp, label_logits - logsumexp


def _exact(
    inputs: HeadInputs, logsumexp: torch.Tensor, logprobs: torch.Tensor, rows: torch.Tensor, words: torch.Tensor
) -> Exact:
    hidden, weight, labels = inputs.hidden.detach(), inputs.weight.detach(), inputs.labels
    all_rows = slice(0, labels.shape[0])
    upstream = {
        "policy": token_losses(logprobs, inputs.terms.select(all_rows, torch.float64))[2],
        "lm": token_losses(logprobs, inputs.lm_terms.select(all_rows, torch.float64))[2],
    }
    result: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("gh", "gw", "rh", "rw")}
    own_rows = hidden[rows].double()
    for operation, g in upstream.items():
        exact = torch.zeros_like(own_rows)
        rounded = torch.zeros_like(own_rows)
        for first in range(0, weight.shape[0], _WORD_BLOCK):
            block = weight[first : first + _WORD_BLOCK].double()
            probabilities = (own_rows @ block.t() - logsumexp[rows].unsqueeze(1)).exp()
            is_label = labels[rows].unsqueeze(1) - first == torch.arange(block.shape[0], device=labels.device)
            gradient = g[rows].unsqueeze(1) * (is_label.double() - probabilities)
            exact += gradient @ block
            rounded += gradient.to(hidden.dtype).double() @ block
        result["gh"][operation], result["rh"][operation] = exact, rounded.to(hidden.dtype).double()
        exact = torch.zeros(words.shape[0], hidden.shape[1], dtype=torch.float64, device=hidden.device)
        rounded = torch.zeros_like(exact)
        some = weight[words].double()
        for start in range(0, labels.shape[0], _ROW_BLOCK):
            part = slice(start, start + _ROW_BLOCK)
            block = hidden[part].double()
            probabilities = (block @ some.t() - logsumexp[part].unsqueeze(1)).exp()
            is_label = labels[part].unsqueeze(1) == words
            gradient = g[part].unsqueeze(1) * (is_label.double() - probabilities)
            exact += gradient.t() @ block
            rounded += gradient.to(hidden.dtype).double().t() @ block
        result["gw"][operation], result["rw"][operation] = exact, rounded.to(hidden.dtype).double()
    return Exact(
        logsumexp=logsumexp,
        logprobs=logprobs,
        rows=rows,
        words=words,
        grad_hidden=result["gh"],
        grad_weight=result["gw"],
        rounded_hidden=result["rh"],
        rounded_weight=result["rw"],
    )


def worst_row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest relative error of a row, in the Euclidean norm; infinite where it is not a number."""
    errors = (got.detach().double() - want).norm(dim=1) / want.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    worst = float(errors.max())
    return worst if math.isfinite(worst) else math.inf


def worst_logprob_error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Largest relative error of a log-probability, and largest error in nats."""
    difference = (got.detach().double() - want).abs()
    relative = float((difference / want.abs().clamp(min=torch.finfo(torch.float64).tiny)).max())
    nats = float(difference.max())
    return (relative if math.isfinite(relative) else math.inf), (nats if math.isfinite(nats) else math.inf)
