"""Hugging Face checkpoints to Megatron checkpoints that any layout can load, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_klear.checkpoint import hf_directory, layout
from megatron_klear.checkpoint.conversion import DTYPES, HF_FILES, Conversion, all_or_nothing, total_size
from megatron_klear.checkpoint.safetensors_stream import StoredTensor
from megatron_klear.checkpoint.torch_dist_stream import Chunk, write_torch_dist
from megatron_klear.config import Architecture, padded_vocab_size
from megatron_klear.errors import DataError
from megatron_klear.model.hf_names import TensorRule, shard_shape, tensor_rules, whole_from_hf
from megatron_klear.observe.work_progress import WorkProgress

_BLOCK_BYTES = 16 << 20
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
    chunks = list(_chunks(arch, tensors, vocab_multiple, lambda key: stacked.get(key) or DTYPES[dtype]))
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    target = layout.writing_directory(root, 0)
    with all_or_nothing(target, num_bytes):
        with WorkProgress("writing", len(chunks), num_bytes, noun="chunks") as progress:
            write_torch_dist(
                target,
                chunks,
                empty_objects=_extra_state_keys(arch),
                common={},
                written=lambda chunk: progress.advance(1, chunk.num_bytes),
            )
        carried = hf_directory.copy_files(hf_dir, hf_directory.CARRIED_FILES, target / HF_FILES)
        _describe(target, arch, vocab_multiple, {chunk.dtype for chunk in chunks})
        names = layout.files_of(target)
        with WorkProgress("reading back", len(names), total_size(target, names), noun="files") as progress:
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
    names = [name for name, dtype in DTYPES.items() if dtypes == {dtype}]
    model.update({"dtype": names[0]} if names else {})
    (target / layout.SETTINGS).write_text(yaml.safe_dump({"model": model}, sort_keys=False))
    (target / layout.RUN_STATE).write_text(json.dumps({"step": 0, "model_only": True}, indent=1) + "\n")


def _checksums(directory: Path, names: list[str], progress: WorkProgress) -> dict[str, tuple[int, int]]:
    def one(name: str) -> tuple[int, int]:
        found = layout.checksum(directory / name)
        progress.advance(1, found[0])
        return found

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
