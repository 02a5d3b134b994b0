"""Settings of FP8: Transformer Engine's recipes for the matrix products of the layers, and what they demand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_klear.config.fields import SECTION, NonNegative, Positive, Unit

if TYPE_CHECKING:
    from megatron_klear.config.architecture import Architecture
    from megatron_klear.config.checks import Problems
    from megatron_klear.config.schema import ParallelSettings, Settings

Recipe = Literal["none", "delayed", "tensorwise", "blockwise"]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Fp8Settings:
    """Matrix products of the layers in FP8, by Transformer Engine; embedding, head and attention stay in bfloat16."""

    recipe: Recipe = "none"
    """How scales are chosen: delayed from the largest values of earlier steps, tensorwise (current scaling) from the
    tensor itself, blockwise for blocks of 128 (E4M3 both ways); delayed and tensorwise use E5M2 for gradients."""

    first_layers_bf16: Annotated[int, Unit("layers"), NonNegative] = 0
    """Layers at the start that stay in bfloat16; not with the delayed recipe."""

    last_layers_bf16: Annotated[int, Unit("layers"), NonNegative] = 0
    """Layers at the end that stay in bfloat16; not with the delayed recipe."""

    parameters: bool = False
    """Store the layers' weights in FP8 and gather them so: half the traffic of bfloat16, which is then not in memory
    beside FP8. The optimizer keeps float32 weights either way; needs `parallel.distributed_optimizer`."""

    amax_history: Annotated[int, Unit("microbatches"), Positive] = 1024
    """delayed: how far back the largest values are remembered; they are stored in checkpoints."""

    @property
    def on(self) -> bool:
        """Whether anything is computed in FP8."""
        return self.recipe != "none"

    @property
    def multiple(self) -> int:
        """What sizes of products must be a multiple of: 16 for cuBLAS, a whole block for the blockwise recipe."""
        return {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}[self.recipe]


def check_precision(settings: Settings, architecture: Architecture | None, problems: Problems) -> None:
    """Check that FP8 can be computed as it is asked for, as far as that is known without looking at the hardware.

    Args:
        settings: the settings as a whole.
        architecture: the model; None when it is unknown.
        problems: collects what is wrong.
    """
    fp8, model, parallel = settings.fp8, settings.model, settings.parallel
    if not fp8.on:
        for name in ("first_layers_bf16", "last_layers_bf16", "parameters"):
            if getattr(fp8, name):
                problems.add(f"fp8.{name}", "needs a recipe; set fp8.recipe to delayed, tensorwise or blockwise")
        return
    _check_backends(settings, problems)
    if model.dtype != "bfloat16":
        problems.add("fp8.recipe", f"got {fp8.recipe}, which needs model.dtype=bfloat16, not {model.dtype}")
    if fp8.parameters and not parallel.distributed_optimizer:
        problems.add("fp8.parameters", "got true, needs parallel.distributed_optimizer=true")
    whole = {name: getattr(fp8, name) for name in ("first_layers_bf16", "last_layers_bf16") if getattr(fp8, name)}
    for name, count in whole.items():
        if fp8.recipe == "delayed":
            text = "and the delayed recipe covers all layers alike; set fp8.recipe=tensorwise or blockwise, or 0"
            problems.add(f"fp8.{name}", f"got {count}, {text}", "fp8.recipe")
        elif architecture is not None and count > architecture.num_layers // parallel.pp:
            per_stage = architecture.num_layers // parallel.pp
            problems.add(f"fp8.{name}", f"got {count}, and a pipeline stage has {per_stage} layers", "parallel.pp")
    if architecture is not None:
        _check_sizes(settings, architecture, parallel, problems)


def _check_backends(settings: Settings, problems: Problems) -> None:
    fp8, model = settings.fp8, settings.model
    if settings.run.device == "cpu":
        problems.add(
            "fp8.recipe",
            f"got {fp8.recipe}, which needs a GPU of compute capability 8.9 or above (H100, L40S, B200 ...), and "
            "run.device is cpu; set fp8.recipe=none",
            "run.device",
        )
    if model.layer_spec == "local":
        text = f"got {fp8.recipe}, which Transformer Engine computes, and model.layer_spec is local; set auto or te"
        problems.add("fp8.recipe", text, "model.layer_spec")
    elif model.layer_spec == "auto" and model.attention in ("flash", "sdpa", "cpu"):
        text = f"got {fp8.recipe}, and model.attention = {model.attention} takes the local layers; set model.attention="
        more = " or model.layer_spec=te" if model.attention == "flash" else ""
        problems.add("fp8.recipe", f"{text}auto{more}", "model.attention")


def _check_sizes(
    settings: Settings, architecture: Architecture, parallel: ParallelSettings, problems: Problems
) -> None:
    """Check that both sizes of every weight on a rank are multiples of what the recipe computes in."""
    fp8, tp = settings.fp8, parallel.tp
    head, groups = architecture.head_dim, architecture.num_query_groups
    sizes = {
        "model.hidden_size": (architecture.hidden_size, "hidden_size"),
        "model.ffn_hidden_size": (architecture.ffn_hidden_size / tp, "ffn_hidden_size / parallel.tp"),
        "model.num_attention_heads": (
            architecture.num_attention_heads * head / tp,
            "num_attention_heads * head_dim / parallel.tp",
        ),
        "model.num_query_groups": (
            (architecture.num_attention_heads + 2 * groups) * head / tp,
            "(num_attention_heads + 2 * num_query_groups) * head_dim / parallel.tp",
        ),
    }
    for path, (size, formula) in sizes.items():
        if size % fp8.multiple:
            problems.add(
                path,
                f"{formula} = {size:g} must be a multiple of {fp8.multiple} for fp8.recipe = {fp8.recipe}; "
                "change it, parallel.tp or the recipe",
                "fp8.recipe",
                "parallel.tp",
            )
