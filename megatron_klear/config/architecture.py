"""The sizes of a Qwen3 model: named presets, a Hugging Face config.json, and overrides field by field.

Preset sizes are those of the published Qwen3 models' config.json files.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass as section

from megatron_klear.config.fields import SECTION, Heads, Layers, Positive, Unit, Width
from megatron_klear.config.yarn import Yarn, yarn_of_hf_config
from megatron_klear.errors import ConfigError

RecomputePolicy = Literal["none", "selective", "full"]
PresetName = Literal["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-tiny", "qwen3-tiny-tied"]


@section(frozen=True, kw_only=True, config=SECTION)
class ModelSettings:
    """The model: a preset or a Hugging Face directory, any of whose sizes can be overridden, and how it computes."""

    preset: PresetName | None = None
    """Named architecture, with random weights unless `model.hf_dir` or a checkpoint gives them."""

    hf_dir: Annotated[str | None, Field(min_length=1)] = None
    """Hugging Face directory (config.json and safetensors) to take architecture and first weights from."""

    num_layers: Layers = None
    """Transformer layers."""

    hidden_size: Width = None
    """Width of the residual stream."""

    ffn_hidden_size: Width = None
    """Width of the SwiGLU feed-forward layer."""

    num_attention_heads: Heads = None
    """Query heads."""

    num_query_groups: Heads = None
    """Key and value heads (GQA)."""

    head_dim: Width = None
    """Width of one attention head."""

    vocab_size: Annotated[int | None, Unit("tokens"), Positive] = None
    """Vocabulary, before padding."""

    max_position_embeddings: Annotated[int | None, Unit("tokens"), Positive] = None
    """Longest sequence the model may see."""

    rope_theta: Annotated[float | None, Field(gt=0)] = None
    """Base of the rotary position embedding."""

    rms_norm_eps: Annotated[float | None, Field(gt=0)] = None
    """Added to the mean square in every RMSNorm."""

    tie_embeddings: bool | None = None
    """Use the input embedding as the output matrix."""

    init_std: Annotated[float | None, Field(gt=0)] = None
    """Standard deviation of initial random weights."""

    vocab_multiple: Annotated[int, Unit("tokens"), Positive] = 128
    """The vocabulary is padded up to a multiple of this; `parallel.tp` must divide the padded size."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of weights and activations; the optimizer keeps float32 weights either way."""

    attention: Literal["auto", "te", "flash", "cudnn", "sdpa", "cpu"] = "auto"
    """Core attention. auto takes Transformer Engine's choice where its layers are used, else flash-attn where it is
    installed, else torch SDPA. te and cudnn need its layers (cudnn: its fused attention only); flash is flash-attn,
    in its layers with `model.layer_spec=te`; what is taken is printed at the start."""

    layer_spec: Literal["auto", "te", "local"] = "auto"
    """Megatron layer specification; auto is Transformer Engine where it is installed and a GPU is used."""

    recompute: RecomputePolicy = "none"
    """Activations to compute again in the backward pass: none, those of attention, or those of whole layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Everything that determines the shapes and the arithmetic of a Qwen3 model (see `ModelSettings` for meanings)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    init_std: float


ARCHITECTURE_FIELDS = tuple(f.name for f in dataclasses.fields(Architecture))

SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "tie_embeddings",
)
"""Fields that weights in `model.hf_dir` fix: nothing may contradict them."""


def _published(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=tied,
        init_std=0.02,
    )


_TINY = Architecture(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=4096,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    init_std=0.02,
)

PRESETS: dict[str, Architecture] = {
    "qwen3-0.6b": _published(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _published(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _published(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _published(36, 4096, 12288, 32, tied=False),
    "qwen3-tiny": _TINY,
    "qwen3-tiny-tied": dataclasses.replace(
        _TINY, num_layers=2, hidden_size=64, ffn_hidden_size=192, head_dim=16, tie_embeddings=True
    ),
}
assert set(PRESETS) == set(get_args(PresetName))

HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Keys of a Hugging Face config.json by field."""


def padded_vocab_size(vocab_size: int, vocab_multiple: int) -> int:
    """Return `vocab_size` rounded up to a multiple of `vocab_multiple` (the same in every layout, so that a
    checkpoint can be resumed in another)."""
    return -(-vocab_size // vocab_multiple) * vocab_multiple


def read_hf_architecture(hf_dir: str | Path) -> Architecture:
    """Read the architecture from `config.json` of a Hugging Face Qwen3 directory.

    Where it asks for YaRN, positions are those that the model was trained on (see `read_hf_yarn`).

    Raises:
        ConfigError: missing or malformed file, another model family, or a feature that is not supported.
    """
    path, config = _read_hf_config(hf_dir)
    problems = [f"model.hf_dir: {path}: {text}" for text in _unsupported(config)]
    values: dict[str, Any] = {}
    for name, key in HF_KEYS.items():
        text = _hf_problem(config, key, bool if name == "tie_embeddings" else float if name == "rms_norm_eps" else int)
        if text:
            problems.append(f"model.hf_dir: {path}: {text}")
        values[name] = config.get(key)
    # transformers 5 moved rope_theta into rope_parameters.
    rope = config.get("rope_parameters")
    holder = rope if isinstance(rope, dict) and "rope_theta" in rope else config
    text = _hf_problem(holder, "rope_theta", float)
    if text:
        problems.append(f"model.hf_dir: {path}: {text}")
    if problems:
        raise ConfigError(problems)
    values["rope_theta"] = float(holder["rope_theta"])
    values["rms_norm_eps"] = float(values["rms_norm_eps"])
    values["init_std"] = float(config.get("initializer_range") or 0.02)
    yarn = yarn_of_hf_config(config)
    if yarn is not None:
        values["max_position_embeddings"] = yarn.original_positions
    return Architecture(**values)


def read_hf_yarn(hf_dir: str | Path) -> Yarn | None:
    """The YaRN that `config.json` of a Hugging Face directory asks for, if any; None also where there is no such file.

    Raises:
        ConfigError: malformed file.
    """
    return yarn_of_hf_config(_read_hf_config(hf_dir)[1]) if (Path(hf_dir) / "config.json").is_file() else None


def _read_hf_config(hf_dir: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(hf_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"model.hf_dir: cannot read {path}: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError([f"model.hf_dir: {path} is not valid JSON: {error}"]) from error
    if not isinstance(config, dict):
        raise ConfigError([f"model.hf_dir: {path} holds {type(config).__name__}, expected an object"])
    return path, config


def _hf_problem(config: dict[str, Any], key: str, kind: type) -> str | None:
    value = config.get(key)
    if value is None:
        return f"{key} is missing"
    if kind is bool:
        return None if isinstance(value, bool) else f"{key} is {value!r}, expected true or false"
    good = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool) and value > 0
    return None if good else f"{key} is {value!r}, expected a positive {'number' if kind is float else 'integer'}"


def _unsupported(config: dict[str, Any]) -> list[str]:
    """List what a config.json asks for and a dense Qwen3 of this package does not do."""
    found = []
    if config.get("model_type") != "qwen3":
        found.append(f"model_type is {config.get('model_type')!r}, expected 'qwen3'")
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act is {config['hidden_act']!r}, expected 'silu'")
    for key in ("attention_bias", "use_sliding_window"):
        if config.get(key):
            found.append(f"{key} is set, which is not supported")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else "default"
        if kind != "default" and yarn_of_hf_config(config) is None:
            found.append(
                f"{key} asks for {kind!r}, only the default rotary embedding and YaRN with a factor above 1, "
                "original_max_position_embeddings and no other constants are supported"
            )
    return found


def resolve_architecture(model: ModelSettings) -> Architecture:
    """Combine preset, `hf_dir` and overrides, the later ones winning.

    No file is read when every size is given, as in settings that `load_settings` returned.

    Raises:
        ConfigError: sizes are missing, contradict the weights in `hf_dir`, or contradict each other.
    """
    overrides = _overrides(model)
    values: dict[str, Any] = {}
    if len(overrides) < len(ARCHITECTURE_FIELDS):
        if model.preset is not None:
            values.update(dataclasses.asdict(PRESETS[model.preset]))
        if model.hf_dir is not None:
            weights = read_hf_architecture(model.hf_dir)
            problems = contradictions(model, weights)
            if problems:
                raise ConfigError(problems)
            values.update(dataclasses.asdict(weights))
    values.update(overrides)
    missing = [name for name in ARCHITECTURE_FIELDS if name not in values]
    if missing:
        raise ConfigError(
            [
                f"model.preset: no architecture; set model.preset (one of {', '.join(PRESETS)}), model.hf_dir, "
                f"or the missing sizes: {', '.join(f'model.{name}' for name in missing)}"
            ]
        )
    return _checked(Architecture(**values))


def without_absent_weights(model: ModelSettings) -> ModelSettings:
    """The same settings, without a `model.hf_dir` that is not on this machine; the preset then gives the sizes."""
    absent = model.hf_dir is not None and not (Path(model.hf_dir) / "config.json").is_file()
    return dataclasses.replace(model, hf_dir=None) if absent else model


def contradictions(model: ModelSettings, weights: Architecture) -> list[str]:
    """List where preset or overrides ask for other shapes than the weights in `model.hf_dir` have."""
    problems = []
    if model.preset is not None:
        for name in SHAPE_FIELDS:
            wanted, got = getattr(PRESETS[model.preset], name), getattr(weights, name)
            if wanted != got:
                problems.append(
                    f"model.preset: {model.preset} has {name} {wanted}, the weights in model.hf_dir have {got}; "
                    "leave out model.preset or point model.hf_dir elsewhere"
                )
    for name, wanted in _overrides(model).items():
        got = getattr(weights, name)
        if name in SHAPE_FIELDS and wanted != got:
            problems.append(f"model.{name}: got {wanted}, the weights in model.hf_dir have {got}; leave it out")
    return problems


def _overrides(model: ModelSettings) -> dict[str, Any]:
    return {name: getattr(model, name) for name in ARCHITECTURE_FIELDS if getattr(model, name) is not None}


def _checked(architecture: Architecture) -> Architecture:
    problems = []
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    if heads % groups:
        problems.append(
            f"model.num_query_groups: got {groups}, must divide model.num_attention_heads, which is {heads}"
        )
    if architecture.head_dim % 2:
        problems.append(f"model.head_dim: got {architecture.head_dim}, must be even for the rotary embedding")
    if problems:
        raise ConfigError(problems)
    return architecture
