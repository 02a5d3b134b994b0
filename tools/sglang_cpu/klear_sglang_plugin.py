"""A plugin of SGLang (entry point group sglang.srt.plugins) that lets its CPU attention decode whole batches at once.

SGLang's attention on torch alone takes one sequence after the other, four calls of torch for each, layer by layer; with
a small model that is more than half of a server's time. Here the batch's keys and values are gathered at once, the
shorter sequences padded and masked, and one call computes them all. What this does not know goes the old way.
"""

from __future__ import annotations

from typing import Any

TARGET = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode"
MOST_PADDED = 2**18
"""Elements of the padded keys of one piece of a batch: 1 MiB in float32, which a core's cache still holds. Measured on
sequences of 20 to 2,000 tokens, larger pieces were slower, beyond sixteen times slower than one sequence at a time."""


def register() -> None:
    """Called by SGLang in each of its processes before the server starts."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, decode, HookType.AROUND)


def decode(
    original: Any,
    backend: Any,
    query: Any,
    output: Any,
    k_cache: Any,
    v_cache: Any,
    req_to_token: Any,
    req_pool_indices: Any,
    seq_lens: Any,
    encoder_lens: Any = None,
    **options: Any,
) -> Any:
    """Attention of one new token of each sequence to its keys in the cache; shapes as in SGLang's own method.

    Args:
        original: SGLang's method.
        backend: its object.
        query, output: [sequences, heads, head_dim].
        k_cache, v_cache: [cache slots, key heads, head_dim].
        req_to_token: [requests, context] cache slot of each position of each request.
        req_pool_indices, seq_lens: [sequences] the request of each, and its length with the new token.
        encoder_lens, options: of kinds of attention that are left to `original`, but for the scale and grouped queries.
    """
    window = options.get("sliding_window_size")
    others = encoder_lens is not None or options.get("is_cross_attn") or (window is not None and window > -1)
    plain = k_cache.is_contiguous() and v_cache.is_contiguous() and query.dtype == k_cache.dtype == v_cache.dtype
    if others or not plain or query.device.type != "cpu":
        return original(
            backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, **options
        )
    longest = int(seq_lens.max())
    together = max(1, MOST_PADDED // (longest * k_cache.shape[1] * k_cache.shape[2]))
    for first in range(0, len(seq_lens), together):
        part = slice(first, first + together)
        output[part] = _attend(
            query[part], k_cache, v_cache, req_to_token[req_pool_indices[part]], seq_lens[part], options
        )
    return output


def _attend(query: Any, k_cache: Any, v_cache: Any, slots: Any, lengths: Any, options: dict[str, Any]) -> Any:
    import torch

    longest = int(lengths.max())
    is_there = torch.arange(longest) < lengths[:, None]
    # Beyond a request's length its row holds what others left there: any slot will do, masked as it is.
    slots = torch.where(is_there, slots[:, :longest], 0)
    # index_select of whole rows: indexing with two dimensions takes five times as long.
    keys, values = (
        cache.flatten(1).index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[1:]).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    found = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None],
        keys,
        values,
        attn_mask=is_there[:, None, None],
        scale=options.get("scaling"),
        enable_gqa=bool(options.get("enable_gqa")),
    )
    return found[:, :, 0]
