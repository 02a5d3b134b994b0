"""What FP8 changes in memory and traffic, recipe by recipe.

Read from Transformer Engine 2.14.1 and Megatron-Core 0.16.1; no run on a GPU has shown it yet.

Only the four matrices of a layer are in FP8 (`linear_qkv`, `linear_proj`, `linear_fc1`, `linear_fc2`). Norms in and
between them, embedding, head and layers kept in bfloat16 are not: Megatron enters Transformer Engine's
`fp8_model_init` and `fp8_autocast` layer by layer (`fp8_utils.get_fp8_context`), and of a module only what has an
`fp8_meta_index` is stored quantised, which vectors have not.

A quantised tensor has its numbers along rows, along columns, or both. With one scale per tensor (`delayed`,
`tensorwise`) Blackwell's products read one copy either way, while Hopper's need the transposed one too
(`csrc/quantizer.cpp`: a transpose only unless `nvte_is_non_tn_fp8_gemm_supported`). In blocks of 128 (`blockwise`) the
two are scaled otherwise, so that there are two on any device; Blackwell computes from them with MXFP8's products.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_klear.config import Settings
from megatron_klear.planning.parameters import Parameter, stage_parameters

_BLOCK = 128
_SCALE_BYTES = 4
_SCALES_MULTIPLE = 4
"""A row of scales of a matrix's blocks is padded to so many (`Float8BlockQuantizer.get_scale_shape`)."""


def copies(recipe: str, *, transposes: bool) -> int:
    """How often a tensor lies in memory that is multiplied both along its rows and along its columns.

    Args:
        recipe: of `fp8.recipe`, not `none`.
        transposes: whether the device's products need transposed copies (`Device.fp8_transposes`).
    """
    return 2 if transposes or recipe == "blockwise" else 1


def number_bytes(recipe: str) -> float:
    """Bytes per number of one copy of an activation: itself, and its share of the scale of 128 of them.

    One scale per tensor is left out.
    """
    return 1.0 + (_SCALE_BYTES / _BLOCK if recipe == "blockwise" else 0.0)


def weight_copies(settings: Settings, stage: int, *, transposes: bool) -> float:
    """Bytes of FP8 weights that a rank holds beside its parameters.

    Modules keep them from microbatch to microbatch (`get_weight_workspace`, with the name under which Megatron's
    `is_first_microbatch` has them cached). With `fp8.parameters` the copy along rows is the parameter itself, and only
    what is along columns comes to it (`post_all_gather_processing`), with all scales of blocks.
    """
    fp8 = settings.fp8
    if not fp8.on:
        return 0.0
    held = copies(fp8.recipe, transposes=transposes) - (1 if fp8.parameters else 0)
    total = 0.0
    for rows, columns in _shapes(stage_parameters(settings, stage)):
        total += held * rows * columns
        if fp8.recipe == "blockwise":
            total += _SCALE_BYTES * (_scales(rows, columns) + _scales(columns, rows))
    return total


def largest_values_bytes(settings: Settings, stage: int) -> int:
    """Bytes of the largest values of stored FP8 weights, which ranks that share the update reduce before they quantise.

    One for each weight, or for each of its blocks with their padding (`_cast_master_weights_to_fp8_*`).
    """
    if not settings.fp8.parameters:
        return 0
    shapes = list(_shapes(stage_parameters(settings, stage)))
    if settings.fp8.recipe != "blockwise":
        return _SCALE_BYTES * len(shapes)
    return _SCALE_BYTES * sum(_scales(rows, columns) for rows, columns in shapes)


def _shapes(parameters: Iterable[Parameter]) -> Iterable[tuple[int, int]]:
    return (parameter.fp8_shape for parameter in parameters if parameter.fp8_shape is not None)


def _scales(rows: int, columns: int) -> int:
    """Scales of a matrix's blocks, a row of blocks padded."""
    across = -(-columns // _BLOCK)
    return -(-rows // _BLOCK) * (-(-across // _SCALES_MULTIPLE) * _SCALES_MULTIPLE)
