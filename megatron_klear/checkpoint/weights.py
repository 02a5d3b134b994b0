"""Loads the weights of a checkpoint into a model, in whatever layout either of them is."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import CkptShardedMetadata, load_sharded_metadata

from megatron_klear.errors import CheckpointError
from megatron_klear.model import Qwen3Model
from megatron_klear.model.precision import note_loaded
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.records import ParallelContext


def load_model_weights(model: Qwen3Model, directory: Path, context: ParallelContext) -> dict[str, torch.Tensor]:
    """Fill this rank's part of a model from a checkpoint; optimizer and run state in it are left alone.

    A collective. Numbers are converted to the model's format. Extra state of layers (Transformer Engine's FP8
    scales) is taken if it is there.

    Args:
        model: the model, not wrapped.
        directory: a checkpoint, `step_NNNNNNNN`.
        context: the layout.

    Returns:
        What was loaded, by the model's names; a model that stores weights in FP8 has fewer digits of them.

    Raises:
        CheckpointError: weights of this model are missing in the checkpoint or have other shapes.
    """
    stored = load_sharded_metadata(str(directory))
    with cuda_means_cpu():
        wanted = model.sharded_state_dict(metadata={"dp_cp_group": context.dp_cp.group})
        problems = set()
        for name, entry in list(wanted.items()):
            if isinstance(entry, ShardedObject):
                if entry.unique_key not in stored:
                    del wanted[name]
                continue
            # Gate and up are a factory of two sharded tensors.
            for part in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
                problems.update(_mismatch(part, stored))
        if problems:
            raise CheckpointError("\n  - ".join([f"{directory} does not hold this model:", *sorted(problems)]))
        names = set(wanted)
        loaded = dist_checkpointing.load(wanted, str(directory))
        taken = {name: value for name, value in loaded.items() if name in names}
        absent = model.load_state_dict(taken, strict=False).missing_keys
        for name, parameter in model.named_parameters():
            if isinstance(taken.get(name), torch.Tensor):
                note_loaded(parameter, taken[name])
    absent = [name for name in absent if not name.endswith("_extra_state")]
    if absent:
        raise CheckpointError(f"{directory} does not hold all weights of this model; missing: {', '.join(absent)}")
    return {name: value for name, value in taken.items() if isinstance(value, torch.Tensor)}


def _mismatch(wanted: ShardedTensor, stored: CkptShardedMetadata) -> list[str]:
    shape = list(wanted.global_shape)
    if wanted.key not in stored:
        return [f"missing: {wanted.key} {shape}"]
    found = list(stored[wanted.key].global_shape)
    return [f"wrong shape: {wanted.key} is {found}, must be {shape}"] if found != shape else []
