"""Megatron checkpoints of any layout to Hugging Face directories, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError

from megatron_klear.checkpoint import hf_directory, layout
from megatron_klear.checkpoint.conversion import DTYPES, HF_FILES, Conversion, all_or_nothing, total_size
from megatron_klear.checkpoint.find import find_whole
from megatron_klear.checkpoint.safetensors_stream import TensorEntry, write_shards
from megatron_klear.checkpoint.torch_dist_stream import TorchDistReader
from megatron_klear.config import Architecture, ModelSettings, padded_vocab_size, resolve_architecture
from megatron_klear.config.yarn import Yarn, YarnSettings
from megatron_klear.errors import CheckpointError, ConfigError, DataError
from megatron_klear.model.hf_names import TensorRule, hf_from_whole, shard_shape, tensor_rules
from megatron_klear.observe.work_progress import WorkProgress

_ORIGIN_SETTINGS = (("checkpoint", "start_from"), ("model", "hf_dir"), ("tokenizer", "dir"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """What a checkpoint's settings say of it.

    Attributes:
        directory: the checkpoint.
        arch: its model.
        padded_vocab: rows of its vocabulary matrices.
        places: directories where config.json and what belongs to it may lie, the best first.
        tokenizer: the tokenizer that it was trained with, if it was trained.
        yarn: the scaled rotary embedding that its settings ask for, in evaluation at least.
    """

    directory: Path
    arch: Architecture
    padded_vocab: int
    places: list[Path]
    tokenizer: Path | None
    yarn: Yarn | None


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    shard_gb: float = 5.0,
    dtype: str = "keep",
    tokenizer: Path | None = None,
    yarn: YarnSettings | None = None,
) -> Conversion:
    """Write a Hugging Face directory from a checkpoint of any layout.

    In memory are at most one layer's largest matrix, the stored chunk that it is read from, and its parts.

    Args:
        checkpoint: a run directory, a directory of checkpoints, or a checkpoint; the newest whole one is used.
        out: directory to make; must not exist, or be empty.
        shard_gb: size of the largest safetensors file in 10**9 bytes.
        dtype: `bfloat16`, `float32`, or `keep` for that of the checkpoint.
        tokenizer: directory to take tokenizer files from, instead of those that the checkpoint carries.
        yarn: scaled rotary embedding for config.json; None takes what the settings in the checkpoint ask for.

    Raises:
        DataError: no whole checkpoint, or one that does not hold its model; nothing was written.
        CheckpointError: writing failed; nothing is left of it.
    """
    _require_free(out)
    if tokenizer is not None and not any((tokenizer / name).is_file() for name in hf_directory.TOKENIZER_FILES):
        raise DataError(f"{tokenizer}: no tokenizer files there; --tokenizer must name a Hugging Face directory")
    directory, notes = _whole_checkpoint(checkpoint)
    source = _trained(directory)
    arch, reader = source.arch, _reader_of(source)
    entries = [
        TensorEntry(name=name, dtype=DTYPES.get(dtype) or reader.dtypes[key], shape=shape)
        for rule in tensor_rules(arch, layer_kind="te")
        for key in [hf_directory.megatron_key(rule.name)]
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]
    num_bytes = sum(entry.num_bytes for entry in entries)
    hidden = out.absolute().with_name(f".writing_{out.absolute().name}")
    with all_or_nothing(hidden, num_bytes):
        with WorkProgress("writing", len(entries), num_bytes) as progress:
            write_shards(
                hidden,
                entries,
                shard_gb * 1e9,
                _hf_blocks(arch, reader, entries),
                written=lambda entry: progress.advance(1, entry.num_bytes),
            )
        notes += _carry(source, hidden, tokenizer)
        origin = _first_with(hf_directory.CONFIG, source.places)
        scaling = source.yarn if yarn is None else yarn.scaling(arch)
        hf_directory.write_config(hidden, arch, entries[0].dtype, origin, scaling)
        layout.flush_to_disk(hidden)
        hidden.replace(out)
        layout.flush_to_disk(out.absolute().parent)
    return Conversion(out=out, source=directory, num_tensors=len(entries), num_bytes=num_bytes, notes=tuple(notes))


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} already exists and is not an empty directory; choose another --out")


def _whole_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint that a path means, checked, and a note about every newer one that is damaged."""
    if not path.is_dir():
        raise DataError(f"{path}: no such directory; --checkpoint must name a run directory or a checkpoint")
    try:
        return find_whole(path, _damage)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def _damage(directory: Path) -> list[str]:
    try:
        expected = layout.read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    with WorkProgress("checking", len(expected), total_size(directory, expected), noun="files") as progress:

        def check(item: tuple[str, tuple[int, int]]) -> list[str]:
            found = layout.damage(directory, dict([item]))
            progress.advance(1, item[1][0])
            return found

        with ThreadPoolExecutor(4) as pool:
            return [problem for found in pool.map(check, expected.items()) for problem in found]


def _trained(directory: Path) -> _Trained:
    path = directory / layout.SETTINGS
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = ModelSettings(**settings["model"])
        arch = resolve_architecture(model)
        yarn = YarnSettings(**(settings.get("yarn") or {})).scaling(arch)
    except ConfigError as error:
        raise DataError(f"{path}: does not describe a model:\n{error}") from error
    except (OSError, yaml.YAMLError, ValidationError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot read the model's settings ({error})") from error
    names = ((settings.get(section) or {}).get(key) for section, key in _ORIGIN_SETTINGS)
    started_from, hf_dir, tokenizer = (Path(name) if isinstance(name, str) else None for name in names)
    # The checkpoint itself, others of its run, and the run that it started from.
    runs = [
        directory.parent,
        *([started_from, started_from.parent, started_from / "checkpoints"] if started_from else []),
    ]
    places = [directory / HF_FILES]
    places += [found for run in runs for found in sorted(run.glob(f"step_*/{HF_FILES}"), reverse=True)]
    places += [hf_dir] if hf_dir else []
    padded = padded_vocab_size(arch.vocab_size, model.vocab_multiple)
    return _Trained(directory=directory, arch=arch, padded_vocab=padded, places=places, tokenizer=tokenizer, yarn=yarn)


def _reader_of(source: _Trained) -> TorchDistReader:
    """A reader of a checkpoint that holds exactly this model, whatever else it holds."""
    directory, arch, padded = source.directory, source.arch, source.padded_vocab
    try:
        reader = TorchDistReader(directory)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    expected: dict[str, tuple[int, ...]] = {}
    for rule in tensor_rules(arch, layer_kind="te"):
        stacked = () if rule.layer is None else (arch.num_layers,)
        expected[hf_directory.megatron_key(rule.name)] = (*stacked, *shard_shape(rule, arch, 1, padded))
    held = {key: shape for key, shape in reader.shapes.items() if "optimizer." not in key}
    formats = [f"{dtype}".removeprefix("torch.") for dtype in (*DTYPES.values(), torch.float16)]
    problems = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in held]
    problems += [f"unexpected: {key} {list(held[key])}" for key in sorted(set(held) - set(expected))]
    problems += [
        f"wrong shape: {key} is {list(held[key])}, must be {list(shape)}"
        for key, shape in expected.items()
        if key in held and held[key] != shape
    ]
    problems += [
        f"number format: {key} is {reader.dtypes[key]}, must be one of {', '.join(formats)}"
        for key in expected
        if key in held and str(reader.dtypes[key]).removeprefix("torch.") not in formats
    ]
    hf_directory.refuse(f"{directory} does not hold the model that its {layout.SETTINGS} describes:", problems)
    return reader


def _hf_blocks(
    arch: Architecture, reader: TorchDistReader, entries: list[TensorEntry]
) -> Iterator[Iterable[torch.Tensor]]:
    """The data of every entry, in order, each in blocks of rows."""
    remaining = iter(entries)
    for rule in tensor_rules(arch, layer_kind="te"):
        key = hf_directory.megatron_key(rule.name)
        if rule.kind == "vocabulary":
            entry = next(remaining)
            yield (block.to(entry.dtype) for block in _vocabulary_rows(rule, arch, reader))
            continue
        offsets: tuple[int, ...] = () if rule.layer is None else (rule.layer,)
        shape = reader.shapes[key][len(offsets) :]
        box = reader.read(key, (*offsets, *(0 for _ in shape)), (*(1 for _ in offsets), *shape))
        for part in hf_from_whole(rule, box.view(shape), arch):
            entry = next(remaining)
            yield [part.to(entry.dtype)]


def _vocabulary_rows(rule: TensorRule, arch: Architecture, reader: TorchDistReader) -> Iterator[torch.Tensor]:
    """The rows of a vocabulary matrix, cut as they are stored, without padding."""
    for start, stop in reader.row_blocks(rule.name):
        stop = min(stop, arch.vocab_size)
        if start < stop:
            rows = reader.read(rule.name, (start, 0), (stop - start, arch.hidden_size))
            yield from hf_from_whole(rule, rows, arch)


def _first_with(name: str, places: Iterable[Path]) -> Path | None:
    return next((place for place in places if (place / name).is_file()), None)


def _carry(source: _Trained, target: Path, tokenizer: Path | None) -> list[str]:
    """Copy tokenizer and generation files; returns notes on what could not be found."""
    for name in hf_directory.OTHER_FILES:
        if place := _first_with(name, source.places):
            hf_directory.copy_files(place, (name,), target)
    if tokenizer is None:
        # What the run was given goes before what came with its weights: training may have needed other tokens.
        places = [*([source.tokenizer] if source.tokenizer else []), *source.places]
        tokenizer = _first_with("tokenizer.json", places) or _first_with("vocab.json", places)
    if tokenizer is None:
        return ["no tokenizer files were found; give --tokenizer DIR to have them in the result"]
    hf_directory.copy_files(tokenizer, hf_directory.TOKENIZER_FILES, target)
    return []
