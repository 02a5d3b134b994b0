"""Keys and values of many sequences in preallocated slots, and the attention that reads them.

Active sequences always fill the first slots, each left-aligned: column c of a slot is position c of its sequence.
A decode step therefore works on plain views of the buffer, without gathering, padding or concatenating.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AttentionInterface, Qwen3Config
from transformers.cache_utils import Cache

ATTENTION_NAME = "klear_slots"
"""Name under which transformers finds `slot_attention`."""

_COLUMN_STEP = 64


class SlotCache(Cache):
    """A transformers cache of `num_slots` sequences of different lengths.

    Args:
        config: shapes of layers and heads.
        num_slots: most sequences at a time.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(self, config: Qwen3Config, *, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        heads = config.num_key_value_heads
        self._shape = (config.num_hidden_layers, 2, num_slots, heads, 0, config.head_dim)
        self._buffer = torch.zeros(self._shape, dtype=dtype, device=device)
        self._head_rows = torch.arange(num_slots * heads, device=device).view(num_slots, heads)
        self._prompt_of_row: torch.Tensor | None = None
        self._first_slot = 0
        self._num_active = 0
        self._num_columns = 0
        self._write_rows = torch.empty(0, dtype=torch.int64, device=device)

    def begin_prefill(self, first_slot: int, prompt_of_row: torch.Tensor, num_columns: int) -> None:
        """Make the next forward pass a prefill whose keys and values are copied into slots from `first_slot` on.

        Args:
            first_slot: slot of row 0.
            prompt_of_row: int64 [R], which sequence of the forward pass each of the R slots takes.
            num_columns: width of the forward pass.
        """
        self._reserve(num_columns)
        self._first_slot, self._prompt_of_row = first_slot, prompt_of_row

    def begin_decode(self, positions: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the next forward pass a decode step of the first B slots, one token each.

        Args:
            positions: int64 [B], position of the new token in each slot.

        Returns:
            position_ids int64 [B, 1] on the device; an additive mask [B, 1, 1, columns] that hides what lies behind.
        """
        self._prompt_of_row = None
        self._num_active = len(positions)
        self._num_columns = int(positions.max()) + 1
        self._reserve(self._num_columns)
        device, dtype = self._buffer.device, self._buffer.dtype
        position_ids = torch.from_numpy(positions.copy()).to(device).unsqueeze(1)
        self._write_rows = (self._head_rows[: self._num_active] * self._shape[4] + position_ids).view(-1)
        hidden = torch.arange(self._num_columns, device=device) > position_ids
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return position_ids, mask[:, None, None, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's new keys and values [B, heads, new tokens, head_dim]; returns what attention must see."""
        keys, values = self._buffer[layer_idx, 0], self._buffer[layer_idx, 1]
        if self._prompt_of_row is not None:
            slots = slice(self._first_slot, self._first_slot + len(self._prompt_of_row))
            width = key_states.shape[2]
            keys[slots, :, :width] = key_states[self._prompt_of_row]
            values[slots, :, :width] = value_states[self._prompt_of_row]
            return key_states, value_states
        head_dim = key_states.shape[-1]
        keys.view(-1, head_dim).index_copy_(0, self._write_rows, key_states.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self._write_rows, value_states.reshape(-1, head_dim))
        return keys[: self._num_active, :, : self._num_columns], values[: self._num_active, :, : self._num_columns]

    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy whole slots, so that the active ones stay in front; `sources` and `targets` are disjoint."""
        if len(sources):
            device = self._buffer.device
            source_rows, target_rows = (torch.from_numpy(rows).to(device) for rows in (sources, targets))
            self._buffer.index_copy_(2, target_rows, self._buffer.index_select(2, source_rows))

    def _reserve(self, num_columns: int) -> None:
        """Grow to at least `num_columns`, by half or more, so that copying stays a small share of the work."""
        layers, pair, slots, heads, columns, head_dim = self._shape
        if num_columns <= columns:
            return
        wanted = max(num_columns, columns + columns // 2)
        wanted = -(-wanted // _COLUMN_STEP) * _COLUMN_STEP
        # Zeros, not empty memory: a masked column still meets a weight of 0, and 0 * NaN would be NaN.
        grown = torch.zeros(
            (layers, pair, slots, heads, wanted, head_dim), dtype=self._buffer.dtype, device=self._buffer.device
        )
        grown[..., :columns, :] = self._buffer
        self._buffer, self._shape = grown, (layers, pair, slots, heads, wanted, head_dim)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form transformers calls: causal over the prompt without a mask, one token per row with one.

    The query heads that share a key head are treated as if they were its query positions, so keys and values are
    never repeated in memory while decoding.

    Args:
        query: [B, heads, tokens, head_dim].
        key, value: [B, key heads, columns, head_dim].
        attention_mask: None (prefill, tokens == columns), or additive [B, 1, 1, columns] (decode, tokens == 1).
        scaling: factor of the scores.

    Returns:
        [B, tokens, heads, head_dim], and None for the weights that are not kept.
    """
    rows, heads, tokens, head_dim = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None:
        key, value = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (key, value))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2), None
    query = query.reshape(rows, key.shape[1], groups, head_dim)
    if query.device.type == "cpu":
        # Measured: two batched products are up to five times as fast as the fused kernel for one query token.
        scores = torch.matmul(query, key.transpose(-1, -2)).mul_(scaling).add_(attention_mask)
        output = torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), value)
    else:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, tokens, heads, head_dim), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)
