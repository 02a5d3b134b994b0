"""The language-model loss of SFT (Eq. 8) and of correct rollouts (Eq. 13)."""

from __future__ import annotations

from torch import Tensor

from megatron_klear.algorithm.ratio import compute_dtype


def lm_token_loss(logprobs: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token, before any weighting or mean.

    Equation: the summand of Eqs. 8 and 13. Both print pi where log pi is meant: the sum of probabilities is not
    what maximum likelihood, nor any code that reproduces the paper, optimises. Their denominators are
    `sft_token_weights` and `lm_token_weights`.

    Args:
        logprobs: [...] log-probabilities of the target tokens, nats.

    Returns:
        [...] float32, or float64 for float64 `logprobs`; differentiable.
    """
    return -logprobs.to(compute_dtype(logprobs.dtype))
