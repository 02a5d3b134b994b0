"""This process's share of a vocabulary-parallel head, and the exchanges between the shares.

Every exchange is entered by all ranks of the group in the same order, so whatever decides how many
exchanges there are (rows computed, chunk size, which gradients are wanted) must be equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Newer torch renamed these two and warns about the old names; Megatron-Core's range of torch has both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Which words of the vocabulary this rank holds.

    Attributes:
        group: tensor-parallel process group, or None for a head that is not split.
        rank, size: place in the group.
        rows: V_local, rows of the weight shard with its padding.
        valid_rows: leading rows of the shard that are words; the rest is padding and is never read.
        sequence_parallel: hidden states come and go as this rank's contiguous slice of the tokens.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    rows: int
    valid_rows: int
    sequence_parallel: bool

    @classmethod
    def of(
        cls, rows: int, *, vocab_size: int | None, group: dist.ProcessGroup | None, sequence_parallel: bool
    ) -> VocabShard:
        """Locate this rank's shard; `rows` is V_local, `vocab_size` the number of words in all shards.

        Raises:
            ValueError: the vocabulary does not fit the shards, or this process is not in the group.
        """
        if group is not None and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("tp_group: got a group, but torch.distributed is not initialised")
        size = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        if rank < 0:
            raise ValueError("tp_group: this process is not a member of the group")
        words = rows * size if vocab_size is None else vocab_size
        if not 0 < words <= rows * size:
            raise ValueError(
                f"vocab_size: got {words}, allowed 1 to {rows * size} ({size} shards of {rows} weight rows); "
                "pass the true vocabulary size and the process group that the weight is split over (tp_group)"
            )
        valid_rows = min(max(words - rank * rows, 0), rows)
        return cls(
            group=group, rank=rank, size=size, rows=rows, valid_rows=valid_rows, sequence_parallel=sequence_parallel
        )

    @property
    def start(self) -> int:
        """Global id of the first word of the shard."""
        return self.rank * self.rows

    def max_(self, values: torch.Tensor) -> torch.Tensor:
        """Replace `values` by their maximum over the shards."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Replace `values` by their sum over the shards."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def start_sum_(self, values: torch.Tensor) -> Callable[[], object]:
        """Begin to replace `values` by their sum over the shards; call what is returned before reading them."""
        if self.size == 1:
            return lambda: None
        work = dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group, async_op=True)
        finish: Callable[[], object] = work.wait
        return finish

    def gather_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden states of all tokens [T, H], given this rank's slice when sequence-parallel."""
        if not self.sequence_parallel or self.size == 1:
            return hidden
        tokens = hidden.new_empty(hidden.shape[0] * self.size, hidden.shape[1])
        _all_gather(tokens, hidden.contiguous(), group=self.group)
        return tokens

    def reduce_scatter_tokens(self, gradient: torch.Tensor) -> torch.Tensor:
        """Sum [T, H] over the shards and return this rank's slice [T / tp, H]."""
        if self.size == 1:
            return gradient
        own = gradient.new_empty(gradient.shape[0] // self.size, gradient.shape[1])
        _reduce_scatter(own, gradient, group=self.group)
        return own
