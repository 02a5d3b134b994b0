"""A Hugging Face model directory: its tensors, its architecture, and the files that travel with the weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_klear.checkpoint.layout import flush_to_disk
from megatron_klear.checkpoint.safetensors_stream import DTYPES, INDEX, StoredTensor, read_header
from megatron_klear.config import Architecture, ModelSettings, read_hf_architecture, resolve_architecture
from megatron_klear.config.architecture import SHAPE_FIELDS
from megatron_klear.config.yarn import Yarn
from megatron_klear.data.end_tokens import tokenizer_end_id
from megatron_klear.errors import ConfigError, DataError
from megatron_klear.model.hf_config import hf_config
from megatron_klear.model.hf_names import tensor_rules
from megatron_klear.model.hf_stream import compare_hf_tensors

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
OTHER_FILES = ("generation_config.json", "LICENSE")
CARRIED_FILES = (CONFIG, *TOKENIZER_FILES, *OTHER_FILES)
"""What travels with the weights through checkpoints, for the way back."""

_MOST_LISTED = 40


def refuse(title: str, problems: list[str]) -> None:
    """Raise a DataError that lists problems, if there are any; very long lists are cut and the rest is counted."""
    if problems:
        lines = [f"  - {problem}" for problem in problems[:_MOST_LISTED]]
        if len(problems) > _MOST_LISTED:
            lines.append(f"  ... and {len(problems) - _MOST_LISTED} more")
        raise DataError("\n".join([title, *lines]))


def architecture_of(directory: Path) -> Architecture:
    """The architecture in a directory's config.json.

    Raises:
        DataError: there is none, or it is not of a model that is supported here.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; --hf must name a Hugging Face model directory")
    try:
        arch = read_hf_architecture(directory)
        return resolve_architecture(ModelSettings(**dataclasses.asdict(arch)))
    except ConfigError as error:
        problems = [problem.removeprefix("model.hf_dir: ").removeprefix("model.") for problem in error.problems]
        refuse(f"{directory} is not a Qwen3 model that can be converted:", problems)
        raise AssertionError("a ConfigError has problems") from error


def stored_tensors(directory: Path, arch: Architecture) -> dict[str, StoredTensor]:
    """The tensors of a directory's safetensors files by name; none of their data is read.

    Raises:
        DataError: damaged or missing files, or tensors that are missing, unexpected or misshapen, each by name.
    """
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    indexed = _indexed(directory)
    files = {directory / name for name in indexed.values()} if indexed else set(directory.glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory}: no *.safetensors files; the model's weights must be stored in that format")
    for file in sorted(files):
        if not file.is_file():
            problems.append(f"missing file: {file.name}, which {INDEX} names")
            continue
        try:
            header = read_header(file)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += [f"twice: {n} is in {found[n].file.name} and {file.name}" for n in header if n in found]
        found.update(header)
    if not problems:
        problems = compare_hf_tensors({name: stored.shape for name, stored in found.items()}, arch)
        problems += [
            f"number format: {name} is {stored.code}, must be one of {', '.join(DTYPES)}"
            for name, stored in found.items()
            if stored.code not in DTYPES
        ]
    refuse(f"{directory} cannot be converted:", problems)
    return found


def _indexed(directory: Path) -> dict[str, str]:
    """The index's map from tensor to file; empty without an index."""
    path = directory / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable index ({error})") from error


def stacked_dtypes(arch: Architecture, tensors: dict[str, StoredTensor]) -> dict[str, torch.dtype]:
    """The one number format of every tensor of the stacked layers, by Megatron key.

    Raises:
        DataError: layers that are stacked into one tensor are stored in several formats.
    """
    first: dict[str, str] = {}
    problems = []
    for rule in tensor_rules(arch, layer_kind="te"):
        key = megatron_key(rule.name)
        for name in rule.hf_names:
            reference = first.setdefault(key, name)
            if tensors[name].code != tensors[reference].code:
                problems.append(f"{name} is {tensors[name].code}, {reference} is {tensors[reference].code}")
    refuse(
        "--dtype keep needs one number format for tensors that are stacked; use --dtype bfloat16 or float32", problems
    )
    return {key: tensors[name].dtype for key, name in first.items()}


def megatron_key(name: str) -> str:
    """A parameter's key in a Megatron checkpoint, where layers are stacked: its name without the layer number."""
    parts = name.split(".")
    return ".".join([*parts[:2], *parts[3:]]) if name.startswith("decoder.layers.") else name


def copy_files(source: Path, names: tuple[str, ...], target: Path) -> list[str]:
    """Copy those of the named files that exist, flushed to disk; returns their names."""
    present = [name for name in names if (source / name).is_file()]
    for name in present:
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
        flush_to_disk(target / name)
    return present


def write_config(
    target: Path, arch: Architecture, dtype: torch.dtype, origin: Path | None, yarn: Yarn | None = None
) -> None:
    """Write a config.json that describes exported weights.

    Args:
        target: directory to write to.
        arch: what was exported.
        dtype: number format of the exported weights.
        origin: directory whose config.json the model was trained from; it is copied as it is but for what training
            settings changed. Left aside when its shapes are another model's.
        yarn: scaled rotary embedding to be used with the weights; None leaves what `origin` says.
    """
    path = target / CONFIG
    config = _origin_config(origin, arch) if origin is not None else None
    if config is None:
        path.write_text(
            json.dumps(
                {**hf_config(arch, dtype=str(dtype).removeprefix("torch."), yarn=yarn), **_end_token(target)}, indent=2
            )
            + "\n"
        )
    else:
        assert origin is not None
        shutil.copyfile(origin / CONFIG, path)
        changed = _changes(config, arch, dtype, read_hf_architecture(origin))
        if yarn is not None:
            changed |= _scaled(config, arch, yarn)
        if changed:
            path.write_text(json.dumps({**config, **changed}, indent=2) + "\n")
    flush_to_disk(path)


def _origin_config(origin: Path, arch: Architecture) -> dict[str, Any] | None:
    try:
        theirs = read_hf_architecture(origin)
    except ConfigError:
        return None
    if any(getattr(theirs, name) != getattr(arch, name) for name in SHAPE_FIELDS):
        return None
    config: dict[str, Any] = json.loads((origin / CONFIG).read_text(encoding="utf-8"))
    return config


def _changes(config: dict[str, Any], arch: Architecture, dtype: torch.dtype, before: Architecture) -> dict[str, Any]:
    """Entries of an existing config.json that no longer hold."""
    ours: dict[str, Any] = {}
    for name, key in (("max_position_embeddings", "max_position_embeddings"), ("rms_norm_eps", "rms_norm_eps")):
        if getattr(arch, name) != getattr(before, name):
            ours[key] = getattr(arch, name)
    if arch.rope_theta != before.rope_theta:
        # transformers 5 moved it into rope_parameters.
        rope = config.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            ours["rope_parameters"] = {**rope, "rope_theta": arch.rope_theta}
        else:
            ours["rope_theta"] = arch.rope_theta
    name = str(dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in config and config[key] != name:
            ours[key] = name
    return ours


def _scaled(config: dict[str, Any], arch: Architecture, yarn: Yarn) -> dict[str, Any]:
    """Entries of an existing config.json that ask for YaRN, where its version of transformers looks for them."""
    ours: dict[str, Any] = {"max_position_embeddings": yarn.positions}
    if isinstance(config.get("rope_parameters"), dict):
        ours["rope_parameters"] = {**yarn.hf_scaling(), "rope_theta": arch.rope_theta}
    else:
        ours["rope_scaling"] = yarn.hf_scaling()
    return ours


def _end_token(directory: Path) -> dict[str, int]:
    """The end token of the tokenizer that lies in a directory, without which generation would never stop."""
    end = tokenizer_end_id(directory)
    return {} if end is None else {"eos_token_id": end}
