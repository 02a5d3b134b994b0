"""Drawing tokens: reproducible randomness per response, temperature, nucleus and logprobs, for a batch at once."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray


def response_uniforms(seed: int, prompt_id: str, response_index: int, count: int) -> NDArray[np.float64]:
    """The uniform numbers in [0, 1) that decide the tokens of one response: entry t decides token t.

    They come from a counter-based generator (Philox) keyed by a digest of the arguments, so they do not depend on
    the batch, the slot or the process that generates the response, and a longer request starts with a shorter one.

    Args:
        count: how many, one per token.

    Returns:
        float64 [count].
    """
    digest = hashlib.blake2b(f"{seed}\n{response_index}\n{prompt_id}".encode(), digest_size=16).digest()
    # random_raw, because numpy promises that raw streams never change between its versions.
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.asarray(raw >> np.uint64(11), np.float64) * 2.0**-53


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits and one uniform number per row into tokens and their logprobs.

    The nucleus is the smallest set of most probable tokens whose probability reaches `top_p`; among equals the
    lower id is the more probable. The token is found by inverting the cumulative distribution, in float64.

    Args:
        logits: [B, V], any float dtype.
        uniforms: float64 [B] in [0, 1); not looked at when temperature is 0.
        temperature: divisor of the logits; 0 takes the most probable token.
        top_p: in (0, 1].

    Returns:
        tokens int64 [B]; logprobs float32 [B] under the softmax of logits / temperature over the whole vocabulary
        (temperature 1 when greedy), that is, before the nucleus is cut out.
    """
    logits = logits.float()
    if temperature == 0.0:
        tokens = logits.argmax(dim=-1, keepdim=True)
        return tokens.squeeze(-1), torch.log_softmax(logits, dim=-1).gather(-1, tokens).squeeze(-1)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probabilities = logprobs.double().exp_()
    if top_p < 1.0:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(dim=-1)
        last = (cumulative < top_p * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        picks = _invert(cumulative, uniforms, mass=cumulative.gather(-1, last))
        tokens = order.gather(-1, picks)
    else:
        cumulative = probabilities.cumsum(dim=-1)
        tokens = _invert(cumulative, uniforms, mass=cumulative[:, -1:])
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)


def _invert(cumulative: torch.Tensor, uniforms: torch.Tensor, *, mass: torch.Tensor) -> torch.Tensor:
    """First index [B, 1] whose cumulative probability exceeds uniforms * mass; entries of no width are never hit."""
    found = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * mass, right=True)
    # Only logits that are not finite lead past the end; the caller sees their logprob and refuses it.
    return found.clamp_(max=cumulative.shape[-1] - 1)
