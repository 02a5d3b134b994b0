"""Floating-point operations that a Qwen3 needs for packed sequences; no torch, so that plans can be made without it.

Counted are the matrix products, two operations per multiply-add: the layers' projections, causal attention within each
sequence (a query meets the keys up to its own, so a sequence of L tokens has L * (L + 1) / 2 pairs) and the output
matrix. Norms, activations, rotary angles and the optimizer are left out, as usual: they are no products and below 1 %.
What an implementation does besides is no work of the model: padding, recomputed activations, the masked half of
attention tiles. So a run with `model.recompute=full` shows a lower utilisation, not the same one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_klear.config import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCount:
    """Floating-point operations by part.

    Attributes:
        projections: query, key, value, output and feed-forward products of all layers.
        attention: scores and weighted values of all layers.
        head: the product with the output matrix.
    """

    projections: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.projections + self.attention + self.head

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(
            projections=self.projections + other.projections,
            attention=self.attention + other.attention,
            head=self.head + other.head,
        )


def causal_pairs(lengths: Iterable[int]) -> int:
    """Pairs of a query and a key that it may look at, over sequences of these lengths in tokens."""
    return sum(length * (length + 1) // 2 for length in lengths)


def projection_parameters(arch: Architecture) -> int:
    """Weights of one layer that every token is multiplied with (norms left out)."""
    heads, groups, head_dim = arch.num_attention_heads, arch.num_query_groups, arch.head_dim
    attention = arch.hidden_size * head_dim * (heads + 2 * groups) + heads * head_dim * arch.hidden_size
    return attention + 3 * arch.hidden_size * arch.ffn_hidden_size


def forward_flops(arch: Architecture, lengths: Iterable[int]) -> FlopCount:
    """Operations of one forward pass that gives the logprob of every token but the first of each sequence.

    Args:
        arch: sizes of the model; `vocab_size` is the true one, without padding.
        lengths: tokens of each sequence, padding left out.
    """
    lengths = list(lengths)
    return _forward(arch, tokens=sum(lengths), sequences=len(lengths), pairs=causal_pairs(lengths))


def training_flops(arch: Architecture, lengths: Iterable[int], trained_tokens: int | None = None) -> FlopCount:
    """Operations of one forward and backward pass.

    Every product of the forward pass has two in the backward pass, for the gradients of its two factors; the head's
    are needed only for tokens with a loss.

    Args:
        arch: sizes of the model.
        lengths: tokens of each sequence, padding left out.
        trained_tokens: tokens with a loss; None for all that are predicted.
    """
    lengths = list(lengths)
    tokens, sequences = sum(lengths), len(lengths)
    trained = tokens - sequences if trained_tokens is None else trained_tokens
    pairs = causal_pairs(lengths)
    return training_flops_of_sums(arch, tokens=tokens, sequences=sequences, pairs=pairs, trained_tokens=trained)


def training_flops_of_sums(
    arch: Architecture, *, tokens: float, sequences: float, pairs: float, trained_tokens: float
) -> FlopCount:
    """`training_flops` from what the sequences add up to, as ranks can sum it.

    Args:
        arch: sizes of the model.
        tokens, sequences: how many.
        pairs: `causal_pairs` of the sequences.
        trained_tokens: tokens with a loss.
    """
    forward = _forward(arch, tokens=tokens, sequences=sequences, pairs=pairs)
    return FlopCount(
        projections=3.0 * forward.projections,
        attention=3.0 * forward.attention,
        head=forward.head + 4.0 * trained_tokens * arch.hidden_size * arch.vocab_size,
    )


def _forward(arch: Architecture, *, tokens: float, sequences: float, pairs: float) -> FlopCount:
    # One pair costs head_dim multiply-adds for its score and as many for its weighted value, in every query head.
    per_pair = 4.0 * arch.num_attention_heads * arch.head_dim
    return FlopCount(
        projections=2.0 * tokens * projection_parameters(arch) * arch.num_layers,
        attention=per_pair * pairs * arch.num_layers,
        head=2.0 * (tokens - sequences) * arch.hidden_size * arch.vocab_size,
    )
