"""Core attention for packed sequences without Transformer Engine, on any device, with context parallelism.

Backends, chosen by what is there: `flash` (flash-attn's variable-length kernel, CUDA), `sdpa` (torch's scaled
dot product attention over buckets of similar length). On a CPU, SDPA is torch's blocked CPU kernel.
Under context parallelism keys and values are gathered over the group; each rank keeps its own queries.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_klear.model.packed_layout import AttentionPlan, PackedLayout

AttentionBackend = Literal["flash", "sdpa"]


def pick_backend(setting: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend for a setting of `auto`, `flash`, `sdpa` or `cpu` on this device and installation.

    flash-attn computes in half precision only, so float32 models get SDPA.
    """
    if setting in ("sdpa", "cpu") or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if device.type == "cuda":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            if setting == "flash":
                raise
            return "sdpa"
        return "flash"
    return "sdpa"


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack.

    Takes and returns Megatron's [tokens, 1, heads, head_dim]; keys and values have one head per query group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        assert config.kv_channels is not None
        self.layer_number = max(1, layer_number)
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.backend = pick_backend(getattr(config, "klear_attention", "auto"), device, config.params_dtype)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedLayout | None = None,
    ) -> torch.Tensor:
        """Attend; shapes: query [T, 1, heads, d], key and value [T, 1, groups, d], result [T, 1, heads * d]."""
        if packed_seq_params is None or packed_seq_params.plan is None:
            raise ValueError("PackedAttention needs the PackedLayout of the microbatch (packed_layout())")
        plan = packed_seq_params.plan
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.cp_group.size() > 1:
            key, value = _gather_keys_and_values(key, value, self.cp_group)
        if self.backend == "flash":
            out = _flash(query, key, value, plan, self.softmax_scale)
        else:
            out = _sdpa(query, key, value, plan, self.softmax_scale)
        return out.reshape(out.size(0), 1, -1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """No parameters, nothing to store."""
        return {}


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scale: float) -> torch.Tensor:
    outputs = []
    for bucket in plan.buckets:
        batch, length = bucket.query_index.shape
        query = _rows(q, bucket.query_index)
        key, value = _rows(k, bucket.key_index), _rows(v, bucket.key_index)
        grouped = q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bucket.mask, is_causal=bucket.mask is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).reshape(batch * length, q.size(1), v.size(2)))
    return torch.cat(outputs).index_select(0, plan.scatter)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [T, heads, d] picked by [B, L] into SDPA's [B, heads, L, d]."""
    picked = x.index_select(0, index.reshape(-1))
    return picked.view(*index.shape, x.size(1), x.size(2)).transpose(1, 2)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    if plan.key_index is not None:
        k, v = k.index_select(0, plan.key_index), v.index_select(0, plan.key_index)
    # flash-attn (2.1 and newer) aligns the causal mask at the end of the keys, as segments need it.
    out: torch.Tensor = flash_attn_varlen_func(
        q, k, v, plan.query_offsets, plan.key_offsets, plan.max_query, plan.max_key, softmax_scale=scale, causal=True
    )
    return out


def _gather_keys_and_values(
    key: torch.Tensor, value: torch.Tensor, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all context-parallel ranks, in rank order along the tokens; one collective."""
    both: torch.Tensor = _GatherTokens.apply(torch.cat([key, value], dim=1), group)
    return both[:, : key.size(1)], both[:, key.size(1) :]


class _GatherTokens(torch.autograd.Function):
    """All-gather along the tokens; the gradient is summed over ranks and scattered back."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        local = local.contiguous()
        full = local.new_empty(group.size() * local.size(0), *local.shape[1:])
        torch.distributed.all_gather_into_tensor(full, local, group=group)
        return full

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        full = grads[0].contiguous()
        local = full.new_empty(full.size(0) // ctx.group.size(), *full.shape[1:])
        torch.distributed.reduce_scatter_tensor(local, full, group=ctx.group)
        return local, None
