"""SGLang's deterministic inference on a CPU: a plugin of SGLang, loaded by servers that `sglang.deterministic` starts.

SGLang 0.5.23 has it for GPUs only: it refuses torch-native attention, its batch-invariant operators are Triton kernels,
and the random numbers of its seeded sampling come from a compiled CPU kernel that wants AMX. This plugin takes the
place of these three, by the hooks that SGLang offers plugins:

- every matrix product, attention and draw is computed for one token alone, by the same calls whatever else is in the
  batch and whether the token is part of a prompt, of a continued response, or newly drawn. So the logits of a token are
  a function of the tokens before it, bit by bit;
- the hash behind seeded sampling (MurmurHash3, 32 bit, of seed, position and column) is computed in torch.

It is found by its directory on PYTHONPATH, runs in SGLang's environment and imports nothing of ours. It is slow for
large models: weights are read once per token. It is there to show that a run repeats, and to look for what differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_MASK = 0xFFFFFFFF
_kept: list[Any] = []
"""Torch forgets kernels whose library object is gone."""


def register() -> None:
    """Register all hooks; called by SGLang in each of its processes."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    attention = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend"
    sampler = "sglang.srt.layers.sampler"
    HookRegistry.register(attention, attend_token_by_token, HookType.REPLACE)
    for name in ("sampling_from_probs_torch", "top_k_top_p_min_p_sampling_from_probs_torch"):
        HookRegistry.register(f"{sampler}.{name}", sample_row_by_row, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode", multiply_row_by_row, HookType.REPLACE
    )
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _kept.append(library)


def multiply_row_by_row(*_: Any, **__: Any) -> None:
    """Have torch compute each row of a matrix product on a CPU by itself; in place of `enable_batch_invariant_mode`."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced is the purpose
        library.impl("mm", rows_times_matrix, "CPU")
        library.impl("addmm", rows_times_matrix_and_bias, "CPU")
    _kept.append(library)


def rows_times_matrix(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Matrix product [M, K] x [K, N] by M products of a vector and the matrix, each with memory of its own.

    A kernel for whole matrices chooses its blocks, and with them the order of sums, by M.
    """
    across = matrix.t()
    found = [torch.mv(across, row.clone()) for row in rows]
    return torch.stack(found) if found else rows.new_empty(0, matrix.shape[1])


def rows_times_matrix_and_bias(
    bias: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    """`torch.addmm` on top of `rows_times_matrix`."""
    return beta * bias + alpha * rows_times_matrix(rows, matrix)


def attend_token_by_token(
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    *args: Any,
    **options: Any,
) -> torch.Tensor:
    """Attention of several new tokens per sequence as that many decoding steps; in place of `_run_sdpa_forward_extend`.

    Args:
        backend: SGLang's TorchNativeAttnBackend.
        query, output: [tokens, heads, channels].
        k_cache, v_cache: [places, kv heads, channels], the new tokens included.
        req_to_token: [requests, context], the places of each request's tokens.
        req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens: [sequences].
        args, options: passed on, but for the mask: a token comes with the keys up to its own only.
    """
    options = options | {"causal": False}
    start = 0
    for row, prefix, count in zip(
        req_pool_indices.split(1), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True
    ):
        for i in range(count):
            place = slice(start + i, start + i + 1)
            length = seq_lens.new_tensor([prefix + i + 1])
            backend._run_sdpa_forward_decode(
                query[place], output[place], k_cache, v_cache, req_to_token, row, length, *args, **options
            )
        start += count
    return output


def sample_row_by_row(original: Callable[..., torch.Tensor], probs: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Draw for one row of probabilities at a time: vectors and their tails take logarithms differently.

    Args:
        original: SGLang's function.
        probs: [rows, vocabulary].
        args, options: passed on; tensors with an entry per row are cut, too.
    """

    def cut(value: Any, row: int) -> Any:
        per_row = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == len(probs)
        return value[row : row + 1] if per_row else value

    drawn: Sequence[torch.Tensor] = [
        original(
            probs[row : row + 1].clone(),
            *(cut(value, row) for value in args),
            **{name: cut(value, row) for name, value in options.items()},
        )
        for row in range(len(probs))
    ]
    return torch.cat(list(drawn))


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bit, start 0) of the 16 bytes seed, position, column, as SGLang's Triton kernel has it.

    Args:
        seed: int64 or uint64 [rows].
        positions: integers [rows].
        columns: integers [columns].

    Returns:
        int64 [rows, columns] in [0, 2^32).
    """
    seeds = seed.to(torch.int64)
    state = torch.zeros(len(seeds), 1, dtype=torch.int64)
    for block in (seeds & _MASK, (seeds >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        state = _mixed(state, block.unsqueeze(1))
    state = _mixed(state, columns.to(torch.int64).unsqueeze(0) & _MASK) ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return state ^ (state >> 16)


def _mixed(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = (block * 0xCC9E2D51) & _MASK
    block = (_rotated(block, 15) * 0x1B873593) & _MASK
    return (_rotated(state ^ block, 13) * 5 + 0xE6546B64) & _MASK


def _rotated(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _MASK
