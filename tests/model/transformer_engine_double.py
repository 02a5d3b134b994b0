"""A stand-in for Transformer Engine, which does not import without CUDA: its modules' interfaces with plain arithmetic.

It shows how Megatron-Core builds and calls the modules (names, shapes, packed sequences, which layers are in FP8), not
what Transformer Engine computes. Install it before anything of Megatron is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

CALLS: list[tuple[torch.nn.Module, Any]] = []
"""Every linear module that ran, with the FP8 recipe that was active."""
ATTENTION: list[dict[str, Any]] = []
"""Keywords of every call of core attention."""
_active: list[Any] = [None]
_ABSENT = "_SplitAlongDim"
"""What Megatron-Core looks for and Transformer Engine 2.14 no longer has."""


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        params_dtype: torch.dtype,
        save_original_input: bool = False,
        **options: Any,
    ):
        super().__init__()
        assert not bias
        self.save_original_input = save_original_input
        parts = options["tp_size"]
        rows, columns = (out_features // parts, in_features) if options["parallel_mode"] == "column" else (
            out_features, in_features // parts,
        )  # fmt: skip
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=params_dtype))
        self.options = options

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        CALLS.append((self, _active[-1]))
        return F.linear(x, self.weight)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str, **options: Any):
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=self.weight.dtype))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size: int, eps: float, params_dtype: torch.dtype, **options: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))
        self.eps, self.options = eps, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads: int, kv_channels: int, **options: Any):
        super().__init__()
        self.options = {"num_attention_heads": num_attention_heads, "kv_channels": kv_channels, **options}

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Any = None,
        *,
        qkv_format: str,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_kv: torch.Tensor,
        cu_seqlens_q_padded: torch.Tensor,
        cu_seqlens_kv_padded: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
    ) -> torch.Tensor:
        """Keywords as Transformer Engine 2.14 names them; any other is an error there too."""
        assert query_layer.dim() == 3, "THD has no batch dimension"
        ATTENTION.append({"format": qkv_format, "mask": attn_mask_type, "max": (max_seqlen_q, max_seqlen_kv),
                          "offsets": cu_seqlens_q.tolist(), "padded": cu_seqlens_q_padded.tolist()})  # fmt: skip
        outputs = []
        for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query_layer, key_layer, value_layer))
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)


@contextlib.contextmanager
def fp8_autocast(enabled: bool, fp8_recipe: Any, fp8_group: Any) -> Iterator[None]:
    _active.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        _active.pop()


class Recipe:
    def __init__(self, **options: Any):
        self.options = options


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class _Open(type):
    """Of classes that have every attribute, each such a class again."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Open(name, (), {})


class _Anything(types.ModuleType):
    """A module that has every name, each an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == _ABSENT:
            raise AttributeError(name)
        made = _Open(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "transformer_engine" or fullname.endswith(_ABSENT):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "transformer_engine":
            module.__version__ = "2.14.1"  # type: ignore[attr-defined]


def install() -> None:
    """Have `import transformer_engine` give the stand-in, in this process."""
    sys.meta_path.insert(0, _Finder())
    names = ("transformer_engine", "pytorch", "pytorch.fp8", "pytorch.cpu_offload", "common", "common.recipe")
    root, pytorch, fp8, cpu_offload, common, recipes = (
        importlib.import_module(name if name == names[0] else f"{names[0]}.{name}") for name in names
    )
    for made in (Linear, LayerNormLinear, RMSNorm, DotProductAttention, fp8_autocast):
        setattr(pytorch, made.__name__, made)
    fp8.fp8_autocast = fp8_autocast
    cpu_offload.get_cpu_offload_context = lambda *_, **__: (contextlib.nullcontext(), None)
    for made in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling):
        setattr(recipes, made.__name__, made)
    recipes.Format = types.SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID")
    root.pytorch, root.common, common.recipe = pytorch, common, recipes


def recipes_of(names: Sequence[str], modules: dict[torch.nn.Module, str]) -> dict[str, str]:
    """The recipe under which each named module ran, `none` in bfloat16."""
    ran = {modules[module]: type(recipe).__name__ if recipe is not None else "none" for module, recipe in CALLS}
    return {name: ran[name] for name in names}
