"""Packed attention against a loop over tokens in float64, values and gradients, for every context-parallel rank."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_klear.model import attention
from megatron_klear.model.attention import PackedAttention, pick_backend
from megatron_klear.model.packed_layout import PackedLayout, plan_attention
from megatron_klear.packing import zigzag_indices

HEADS, GROUPS, DIM = 4, 2, 6
CPU = torch.device("cpu")
LENGTHS = {1: (5, 1, 40, 3, 33), 2: (4, 40, 8), 4: (16, 8, 48)}


def make_attention(cp_size: int, backend: str = "sdpa", **keywords: Any) -> PackedAttention:
    config = SimpleNamespace(kv_channels=DIM, klear_attention="sdpa", params_dtype=torch.bfloat16)
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: cp_size))
    made = PackedAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups, **keywords)  # type: ignore[arg-type]
    made.backend = backend  # type: ignore[assignment]
    return made


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: np.ndarray, scale: float) -> torch.Tensor:
    """Softmax attention written out: token by token, head by head."""
    rows = []
    for start, end in itertools.pairwise(offsets):
        for token in range(start, end):
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = torch.stack([(q[token, head] * k[t, group]).sum() * scale for t in range(start, token + 1)])
                weights = scores.exp() / scores.exp().sum()
                heads.append((weights[:, None] * v[start : token + 1, group]).sum(0))
            rows.append(torch.cat(heads))
    return torch.stack(rows)


def inputs(total: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(total, heads, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def all_ranks(
    monkeypatch: pytest.MonkeyPatch, cp_size: int, offsets: np.ndarray, tensors: list[torch.Tensor], **keywords: Any
) -> torch.Tensor:
    """Outputs of all ranks in the order of the whole pack; the gather between ranks is done by hand."""
    q, k, v = tensors
    shares = [torch.from_numpy(zigzag_indices(offsets, rank, cp_size)) for rank in range(cp_size)]
    gathered = torch.cat(shares)
    monkeypatch.setattr(attention, "_gather_keys_and_values", lambda key, value, group: (k[gathered], v[gathered]))
    core = make_attention(cp_size, **keywords)
    whole = torch.empty(len(gathered), HEADS * DIM, dtype=q.dtype)
    pieces = []
    for rank, mine in enumerate(shares):
        layout = PackedLayout(qkv_format="sbhd", plan=plan_attention(offsets, rank, cp_size, CPU))
        out = core(q[mine][:, None], k[mine][:, None], v[mine][:, None], None, packed_seq_params=layout)
        assert out.shape == (len(mine), 1, HEADS * DIM)
        pieces.append(out[:, 0])
    return whole.index_copy(0, gathered, torch.cat(pieces))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_values_and_gradients_equal_the_loop(cp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = np.concatenate([[0], np.cumsum(LENGTHS[cp_size])])
    tensors = inputs(int(offsets[-1]))
    found = all_ranks(monkeypatch, cp_size, offsets, tensors)
    wanted = by_hand(*tensors, offsets, 1 / math.sqrt(DIM))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    found_gradients = torch.autograd.grad(found, tensors, upstream)
    for found_gradient, wanted_gradient in zip(
        found_gradients, torch.autograd.grad(wanted, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(found_gradient, wanted_gradient, rtol=1e-11, atol=1e-12)


def test_the_scale_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = np.array([0, 6, 9])
    tensors = inputs(9)
    found = all_ranks(monkeypatch, 1, offsets, tensors, softmax_scale=0.7)
    torch.testing.assert_close(found, by_hand(*tensors, offsets, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_flash_attention_is_called_with_the_right_segments(cp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn needs a GPU; a loop with its signature and its documented meaning stands in for it."""

    def varlen(q: Any, k: Any, v: Any, *segments: Any, softmax_scale: float, causal: bool) -> torch.Tensor:
        cu_q, cu_k, max_q, max_k = segments
        assert causal
        assert cu_q.dtype == cu_k.dtype == torch.int32
        rows = []
        for i in range(len(cu_q) - 1):
            queries, keys, values = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
            assert len(queries) <= max_q
            assert len(keys) <= max_k
            shift = len(keys) - len(queries)  # aligned at the bottom right
            for t, query in enumerate(queries):
                scores = torch.einsum("hd,khd->hk", query, keys[: shift + t + 1].repeat_interleave(2, 1))
                weights = torch.softmax(scores * softmax_scale, dim=-1)
                rows.append(torch.einsum("hk,khd->hd", weights, values[: shift + t + 1].repeat_interleave(2, 1)))
        return torch.stack(rows)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    offsets = np.concatenate([[0], np.cumsum(LENGTHS[cp_size])])
    tensors = inputs(int(offsets[-1]))
    found = all_ranks(monkeypatch, cp_size, offsets, tensors, backend="flash")
    torch.testing.assert_close(found, by_hand(*tensors, offsets, 1 / math.sqrt(DIM)), rtol=1e-12, atol=1e-12)


def test_a_pack_without_a_layout_is_refused() -> None:
    q, k, v = (x[:, None] for x in inputs(3))
    for layout in (None, PackedLayout(qkv_format="thd")):
        with pytest.raises(ValueError, match="PackedLayout"):
            make_attention(1)(q, k, v, None, packed_seq_params=layout)


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "installed", "expected"),
    [
        ("auto", "cpu", torch.bfloat16, True, "sdpa"),
        ("flash", "cpu", torch.bfloat16, True, "sdpa"),
        ("auto", "cuda", torch.bfloat16, True, "flash"),
        ("auto", "cuda", torch.bfloat16, False, "sdpa"),
        ("auto", "cuda", torch.float32, True, "sdpa"),
        ("flash", "cuda", torch.bfloat16, True, "flash"),
        ("sdpa", "cuda", torch.bfloat16, True, "sdpa"),
        ("cpu", "cuda", torch.bfloat16, True, "sdpa"),
    ],
)
def test_the_backend_is_what_is_there(
    setting: str,
    device: str,
    dtype: torch.dtype,
    installed: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # None in sys.modules makes an import fail.
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace() if installed else None)
    assert pick_backend(setting, torch.device(device), dtype) == expected


def test_flash_asked_for_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError):
        pick_backend("flash", torch.device("cuda"), torch.bfloat16)
