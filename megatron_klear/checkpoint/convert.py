"""Hugging Face checkpoints to Megatron checkpoints, which any layout can load, and back, tensor by tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedObject
from pydantic import ValidationError

from megatron_klear.checkpoint import hf_directory, layout
from megatron_klear.checkpoint.conversion_progress import ConversionProgress
from megatron_klear.checkpoint.safetensors_stream import StoredTensor, TensorEntry, write_shards
from megatron_klear.checkpoint.torch_dist_stream import Chunk, TorchDistReader, write_torch_dist
from megatron_klear.config import Architecture, ModelSettings, padded_vocab_size, resolve_architecture
from megatron_klear.errors import CheckpointError, ConfigError, DataError
from megatron_klear.model.hf_names import TensorRule, hf_from_whole, shard_shape, tensor_rules, whole_from_hf

HF_FILES = "hf_files"
"""Folder of a checkpoint with the config, tokenizer and generation files that its weights came with."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_BLOCK_BYTES = 64 << 20
"""Rows of the vocabulary are stored in chunks of this size: its matrices are by far the largest tensors, and a
tensor-parallel rank that loads them reads only chunks with rows of its own."""

# Layers that keep extra state, with Transformer Engine or without. Megatron expects an entry for each, empty or not.
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    Attributes:
        out: the checkpoint or Hugging Face directory that was written.
        source: what was read.
        num_tensors: Hugging Face tensors.
        num_bytes: size of the weights that were written.
        notes: what the user should know about the result.
    """

    out: Path
    source: Path
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()


def hf_to_megatron(hf_dir: Path, out: Path, *, vocab_multiple: int = 128, dtype: str = "keep") -> Conversion:
    """Write `out/checkpoints/step_00000000`, a checkpoint without optimizer state that any layout can load.

    In memory are at most one layer's largest matrix and the tensors it is made of, or a block of the vocabulary.

    Args:
        hf_dir: config.json and safetensors files of a Qwen3 model.
        out: run directory.
        vocab_multiple: the vocabulary is padded to a multiple of this, as `model.vocab_multiple` will say.
        dtype: `bfloat16`, `float32`, or `keep` for that of the source.

    Raises:
        DataError: the source cannot be converted, or `out` already holds checkpoints; nothing was written.
        CheckpointError: writing failed; nothing is left of it.
    """
    arch = hf_directory.architecture_of(hf_dir)
    tensors = hf_directory.stored_tensors(hf_dir, arch)
    stacked = hf_directory.stacked_dtypes(arch, tensors) if dtype == "keep" else {}
    root = out / "checkpoints"
    if layout.finished_steps(root):
        raise DataError(f"{root} already holds checkpoints; choose another --out or remove them")
    chunks = list(_chunks(arch, tensors, vocab_multiple, lambda key: stacked.get(key) or _DTYPES[dtype]))
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    target = layout.writing_directory(root, 0)
    with _all_or_nothing(target, num_bytes):
        with ConversionProgress("writing", len(chunks), num_bytes, noun="chunks") as progress:
            write_torch_dist(
                target,
                chunks,
                empty_objects=_extra_state_keys(arch),
                common={},
                written=lambda chunk: progress.advance(1, chunk.num_bytes),
            )
        files = (hf_directory.CONFIG, *hf_directory.TOKENIZER_FILES, *hf_directory.OTHER_FILES)
        carried = hf_directory.copy_files(hf_dir, files, target / HF_FILES)
        _describe(target, arch, vocab_multiple, {chunk.dtype for chunk in chunks})
        names = layout.files_of(target)
        with ConversionProgress("reading back", len(names), _sizes(target, names), noun="files") as progress:
            layout.write_manifest(target, _checksums(target, names, progress))
        final = layout.publish(root, 0)
    notes = () if "tokenizer.json" in carried else (f"{hf_dir} has no tokenizer.json, so none was carried along",)
    return Conversion(out=final, source=hf_dir, num_tensors=len(tensors), num_bytes=num_bytes, notes=notes)


def _chunks(
    arch: Architecture,
    tensors: dict[str, StoredTensor],
    vocab_multiple: int,
    dtype_of: Callable[[str], torch.dtype],
) -> Iterator[Chunk]:
    """What is written, in forward order."""
    padded = padded_vocab_size(arch.vocab_size, vocab_multiple)
    for rule in tensor_rules(arch, layer_kind="te"):
        key = hf_directory.megatron_key(rule.name)
        dtype = dtype_of(key)
        sources = [tensors[name] for name in rule.hf_names]
        shape = shard_shape(rule, arch, 1, padded)
        if rule.kind == "vocabulary":
            rows = max(1, _BLOCK_BYTES // (shape[1] * dtype.itemsize))
            for start in range(0, padded, rows):
                stop = min(start + rows, padded)
                yield Chunk(
                    key=key,
                    whole_shape=shape,
                    offsets=(start, 0),
                    shape=(stop - start, shape[1]),
                    dtype=dtype,
                    read=partial(_vocabulary_block, rule, sources[0], arch, start, stop),
                )
            continue
        stacked = () if rule.layer is None else (arch.num_layers,)
        yield Chunk(
            key=key,
            whole_shape=(*stacked, *shape),
            offsets=(*(() if rule.layer is None else (rule.layer,)), *(0 for _ in shape)),
            shape=(*(1 for _ in stacked), *shape),
            dtype=dtype,
            read=partial(_whole, rule, sources, arch),
        )


def _whole(rule: TensorRule, sources: list[StoredTensor], arch: Architecture) -> torch.Tensor:
    return whole_from_hf(rule, [stored.whole() for stored in sources], arch, 0)


def _vocabulary_block(
    rule: TensorRule, source: StoredTensor, arch: Architecture, start: int, stop: int
) -> torch.Tensor:
    known = source.rows(min(start, arch.vocab_size), min(stop, arch.vocab_size))
    # A block of the vocabulary is a smaller vocabulary, padded to the size of the block.
    return whole_from_hf(rule, [known], arch, stop - start)


def _extra_state_keys(arch: Architecture) -> list[str]:
    keys = [
        ShardedObject(f"decoder.layers.{layer}._extra_state", None, (arch.num_layers,), (number,)).unique_key
        for layer in _STATEFUL
        for number in range(arch.num_layers)
    ]
    return [*keys, ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,)).unique_key]


def _describe(target: Path, arch: Architecture, vocab_multiple: int, dtypes: set[torch.dtype]) -> None:
    """Write settings and run state as the trainer does, of which only the model and the step are known."""
    model = {**dataclasses.asdict(arch), "vocab_multiple": vocab_multiple}
    names = [name for name, dtype in _DTYPES.items() if dtypes == {dtype}]
    model.update({"dtype": names[0]} if names else {})
    (target / layout.SETTINGS).write_text(yaml.safe_dump({"model": model}, sort_keys=False))
    (target / layout.RUN_STATE).write_text(json.dumps({"step": 0, "model_only": True}, indent=1) + "\n")


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    shard_gb: float = 5.0,
    dtype: str = "keep",
    tokenizer: Path | None = None,
) -> Conversion:
    """Write a Hugging Face directory from a checkpoint of any layout.

    In memory are at most one layer's largest matrix, the stored chunk that it is read from, and its parts.

    Args:
        checkpoint: a run directory, a directory of checkpoints, or a checkpoint; the newest whole one is used.
        out: directory to make; must not exist, or be empty.
        shard_gb: size of the largest safetensors file in 10**9 bytes.
        dtype: `bfloat16`, `float32`, or `keep` for that of the checkpoint.
        tokenizer: directory to take tokenizer files from, instead of those that the checkpoint carries.

    Raises:
        DataError: no whole checkpoint, or one that does not hold its model; nothing was written.
        CheckpointError: writing failed; nothing is left of it.
    """
    _require_free(out)
    if tokenizer is not None and not any((tokenizer / name).is_file() for name in hf_directory.TOKENIZER_FILES):
        raise DataError(f"{tokenizer}: no tokenizer files there; --tokenizer must name a Hugging Face directory")
    directory, notes = _whole_checkpoint(checkpoint)
    arch, model = _settings_of(directory)
    reader = _reader_of(directory, arch, padded_vocab_size(arch.vocab_size, model.vocab_multiple))
    entries = [
        TensorEntry(name=name, dtype=_DTYPES.get(dtype) or reader.dtypes[key], shape=shape)
        for rule in tensor_rules(arch, layer_kind="te")
        for key in [hf_directory.megatron_key(rule.name)]
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]
    num_bytes = sum(entry.num_bytes for entry in entries)
    hidden = out.absolute().with_name(f".writing_{out.absolute().name}")
    with _all_or_nothing(hidden, num_bytes):
        with ConversionProgress("writing", len(entries), num_bytes) as progress:
            blocks = _hf_blocks(arch, reader, entries, progress)
            write_shards(hidden, entries, shard_gb * 1e9, blocks)
        notes += _carry(directory, model, hidden, tokenizer)
        origin = _first_with(hf_directory.CONFIG, _origins(directory, model))
        hf_directory.write_config(hidden, arch, entries[0].dtype, origin)
        layout.flush_to_disk(hidden)
        hidden.replace(out)
        layout.flush_to_disk(out.absolute().parent)
    return Conversion(out=out, source=directory, num_tensors=len(entries), num_bytes=num_bytes, notes=tuple(notes))


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} already exists and is not an empty directory; choose another --out")


def _whole_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint that a path means, checked, and a note about every newer one that is damaged."""
    if (path / layout.MANIFEST).exists() or (path / ".metadata").exists():
        hf_directory.refuse(f"{path} is damaged and cannot be converted:", _damage(path))
        return path, []
    if not path.is_dir():
        raise DataError(f"{path}: no such directory; --checkpoint must name a run directory or a checkpoint")
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    notes: list[str] = []
    for step in layout.finished_steps(root):
        directory = layout.step_directory(root, step)
        problems = _damage(directory)
        if not problems:
            return directory, notes
        notes.append(f"{directory} is damaged and was passed over: {'; '.join(problems)}")
    hf_directory.refuse(f"{path}: none of the checkpoints is whole:", notes)
    raise DataError(f"{path}: no checkpoints there; --checkpoint must name a run directory or a checkpoint")


def _damage(directory: Path) -> list[str]:
    try:
        expected = layout.read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    with ConversionProgress("checking", len(expected), _sizes(directory, expected), noun="files") as progress:

        def check(item: tuple[str, tuple[int, int]]) -> list[str]:
            found = layout.damage(directory, dict([item]))
            progress.advance(1, item[1][0])
            return found

        with ThreadPoolExecutor(4) as pool:
            return [problem for found in pool.map(check, expected.items()) for problem in found]


def _settings_of(directory: Path) -> tuple[Architecture, ModelSettings]:
    """The model that a checkpoint's settings describe."""
    path = directory / layout.SETTINGS
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        model = ModelSettings(**section)
        return resolve_architecture(model), model
    except ConfigError as error:
        raise DataError(f"{path}: does not describe a model:\n{error}") from error
    except (OSError, yaml.YAMLError, ValidationError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot read the model's settings ({error})") from error


def _reader_of(directory: Path, arch: Architecture, padded: int) -> TorchDistReader:
    """A reader of a checkpoint that holds exactly this model, whatever else it holds."""
    try:
        reader = TorchDistReader(directory)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    expected: dict[str, tuple[int, ...]] = {}
    for rule in tensor_rules(arch, layer_kind="te"):
        stacked = () if rule.layer is None else (arch.num_layers,)
        expected[hf_directory.megatron_key(rule.name)] = (*stacked, *shard_shape(rule, arch, 1, padded))
    held = {key: shape for key, shape in reader.shapes.items() if "optimizer." not in key}
    formats = [f"{dtype}".removeprefix("torch.") for dtype in (*_DTYPES.values(), torch.float16)]
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
    arch: Architecture, reader: TorchDistReader, entries: list[TensorEntry], progress: ConversionProgress
) -> Iterator[Iterable[torch.Tensor]]:
    """The data of every entry, in order, each in blocks of rows."""
    remaining = iter(entries)
    for rule in tensor_rules(arch, layer_kind="te"):
        key = hf_directory.megatron_key(rule.name)
        if rule.kind == "vocabulary":
            entry = next(remaining)
            yield (block.to(entry.dtype) for block in _vocabulary_rows(rule, arch, reader))
            progress.advance(1, entry.num_bytes)
            continue
        offsets: tuple[int, ...] = () if rule.layer is None else (rule.layer,)
        shape = reader.shapes[key][len(offsets) :]
        box = reader.read(key, (*offsets, *(0 for _ in shape)), (*(1 for _ in offsets), *shape))
        for part in hf_from_whole(rule, box.view(shape), arch):
            entry = next(remaining)
            yield [part.to(entry.dtype)]
            progress.advance(1, entry.num_bytes)


def _vocabulary_rows(rule: TensorRule, arch: Architecture, reader: TorchDistReader) -> Iterator[torch.Tensor]:
    """The rows of a vocabulary matrix, cut as they are stored, without padding."""
    for start, stop in reader.row_blocks(rule.name):
        stop = min(stop, arch.vocab_size)
        if start < stop:
            rows = reader.read(rule.name, (start, 0), (stop - start, arch.hidden_size))
            yield from hf_from_whole(rule, rows, arch)


def _origins(directory: Path, model: ModelSettings) -> list[Path]:
    """Where files that belong to the weights may lie: in the checkpoint, or where the run took its weights from."""
    return [directory / HF_FILES, *([Path(model.hf_dir)] if model.hf_dir else [])]


def _first_with(name: str, places: Iterable[Path]) -> Path | None:
    return next((place for place in places if (place / name).is_file()), None)


def _carry(directory: Path, model: ModelSettings, target: Path, tokenizer: Path | None) -> list[str]:
    """Copy tokenizer and generation files; returns notes on what could not be found."""
    origins = _origins(directory, model)
    for name in hf_directory.OTHER_FILES:
        if place := _first_with(name, origins):
            hf_directory.copy_files(place, (name,), target)
    if tokenizer is None:
        settings = yaml.safe_load((directory / layout.SETTINGS).read_text(encoding="utf-8"))
        trained_with = (settings.get("tokenizer") or {}).get("dir")
        places = [*origins[:1], *([Path(trained_with)] if trained_with else []), *origins[1:]]
        tokenizer = _first_with("tokenizer.json", places) or _first_with("vocab.json", places)
    if tokenizer is None:
        return ["no tokenizer files were found; give --tokenizer DIR to have them in the result"]
    hf_directory.copy_files(tokenizer, hf_directory.TOKENIZER_FILES, target)
    return []


def _sizes(directory: Path, names: Iterable[str]) -> int:
    return sum((directory / name).stat().st_size for name in names if (directory / name).is_file())


def _checksums(directory: Path, names: list[str], progress: ConversionProgress) -> dict[str, tuple[int, int]]:
    def one(name: str) -> tuple[int, int]:
        found = layout.checksum(directory / name)
        progress.advance(1, found[0])
        return found

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


@contextlib.contextmanager
def _all_or_nothing(hidden: Path, num_bytes: int) -> Iterator[None]:
    """Make a hidden directory to write to, and remove it, with the parents made for it, if the writing fails.

    Raises:
        CheckpointError: there is not enough space, or the system refused to write.
    """
    made = [parent for parent in hidden.parents if not parent.exists()]
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        free = shutil.disk_usage(hidden).free
        if math.ceil(num_bytes * 1.01) > free:
            raise OSError(f"{num_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{hidden.parent}: writing failed, nothing was kept: {error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()  # not those that hold something: the conversion succeeded
