from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

from megatron_klear.rollout.slot_cache import SlotCache, slot_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def attention_by_loop(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scaling: float) -> np.ndarray:
    """One query head [D] over the visible keys and values [C, D], in float64."""
    scores = np.array([scaling * float(query @ key) for key in keys])
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values


def random_states(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (6, 1)])
def test_prefill_attention_is_causal(heads: int, key_heads: int, device: str) -> None:
    query, key, value = (
        random_states(2, heads, 5, 8),
        random_states(2, key_heads, 5, 8),
        random_states(2, key_heads, 5, 8),
    )
    output, _ = slot_attention(torch.nn.Module(), query.to(device), key.to(device), value.to(device), None, 0.35)
    q, k, v = query.numpy(), key.numpy(), value.numpy()
    for row, head, token in np.ndindex(2, heads, 5):
        group = head // (heads // key_heads)
        expected = attention_by_loop(q[row, head, token], k[row, group, : token + 1], v[row, group, : token + 1], 0.35)
        np.testing.assert_allclose(output[row, token, head].cpu().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (6, 1)])
def test_decode_attention_sees_each_row_up_to_its_own_length(heads: int, key_heads: int, device: str) -> None:
    lengths = [1, 7, 4]
    query, key, value = (
        random_states(3, heads, 1, 8),
        random_states(3, key_heads, 7, 8),
        random_states(3, key_heads, 7, 8),
    )
    mask = torch.zeros(3, 1, 1, 7, dtype=torch.float64)
    for row, length in enumerate(lengths):
        mask[row, ..., length:] = float("-inf")
    inputs = (tensor.to(device) for tensor in (query, key, value, mask))
    output, _ = slot_attention(torch.nn.Module(), *inputs, 0.35)
    q, k, v = query.numpy(), key.numpy(), value.numpy()
    for row, head in np.ndindex(3, heads):
        group, length = head // (heads // key_heads), lengths[row]
        expected = attention_by_loop(q[row, head, 0], k[row, group, :length], v[row, group, :length], 0.35)
        np.testing.assert_allclose(output[row, 0, head].cpu().numpy(), expected, atol=1e-5)


def test_slots_hold_what_each_sequence_wrote_through_growth_and_moves(fields: dict[str, Any]) -> None:
    config = Qwen3Config.from_dict(fields | {"num_hidden_layers": 1})
    cache = SlotCache(config, num_slots=4, dtype=torch.float32, device=torch.device("cpu"))
    rng = np.random.default_rng(0)
    prefill = torch.from_numpy(rng.normal(size=(2, 2, 5, 12)).astype(np.float32))
    cache.begin_prefill(0, torch.tensor([0, 0, 1, 1]), 5)
    cache.update(prefill, prefill + 1, 0)
    lengths = np.array([5, 3, 5, 2])  # rows 1 and 3 are shorter: the padded columns get overwritten
    written = [[prefill[p, :, column] for column in range(n)] for p, n in zip((0, 0, 1, 1), lengths, strict=True)]
    for step in range(200):
        count = len(lengths)
        new = torch.from_numpy(rng.normal(size=(count, 2, 1, 12)).astype(np.float32))
        position_ids, mask = cache.begin_decode(lengths)
        keys, values = cache.update(new, new + 1, 0)
        assert position_ids.flatten().tolist() == lengths.tolist()
        for row in range(count):
            written[row].append(new[row, :, 0])
            visible = mask[row, 0, 0] == 0
            assert visible.sum() == len(written[row])
            assert torch.equal(keys[row][:, visible], torch.stack(written[row], dim=1))
            assert torch.equal(values[row][:, visible], torch.stack(written[row], dim=1) + 1)
        lengths = lengths + 1
        if step == 100:  # rows 0 and 2 leave; row 3 takes the gap at 0
            cache.move(np.array([3]), np.array([0]))
            written, lengths = [written[3], written[1]], lengths[[3, 1]]
