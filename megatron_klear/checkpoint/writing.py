"""Writes a Megatron distributed checkpoint in this process, in steps that fail on all ranks or on none.

The files are those of `megatron.core.dist_checkpointing.save` and are read by its `load`. That function itself is
not used: it hands the data to forked processes and waits for them without end if one is killed, and a failure of
rank 0 to write the common part leaves the other ranks waiting for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_klear.checkpoint.collective import cause_of, together
from megatron_klear.observe.readable import byte_size
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.records import ParallelContext

StateMaker = Callable[[], dict[str, Any]]


def write_sharded(make_state: StateMaker, directory: Path, context: ParallelContext) -> None:
    """Write a checkpoint into an existing, empty directory that all ranks share; a collective.

    Args:
        make_state: returns this rank's state dict of Megatron's sharded tensors, objects, and plain values, of which
            rank 0's are stored.
        directory: where to.
        context: the layout.

    Raises:
        CheckpointError: on all ranks, when it fails on any, for instance because there is no space left.
    """
    parts: list[dict[str, Any]] = []

    def prepare() -> None:
        with cuda_means_cpu():
            # Also checks that the ranks' shards fill every tensor exactly once.
            parts.extend(save_preprocess(make_state()))

    together("gather the state for a checkpoint", prepare, context)
    sharded, common = parts
    together("write a checkpoint", lambda: _require_space(sharded, directory, context), context)
    together("write a checkpoint", lambda: _write_common(common, directory), context, only_first=True)
    together("write a checkpoint", lambda: _write_shards(sharded, directory), context)
    described = CheckpointingConfig("torch_dist", 1)
    together("write a checkpoint", lambda: save_config(described, str(directory)), context, only_first=True)


def _require_space(sharded: dict[str, Any], directory: Path, context: ParallelContext) -> None:
    # Replicas are written once.
    mine = [e.data for e in nested_values(sharded) if isinstance(e, ShardedTensor) and is_main_replica(e.replica_id)]
    total = torch.tensor([float(sum(t.nbytes for t in mine))], dtype=torch.float64, device=context.device)
    dist.all_reduce(total)
    free = shutil.disk_usage(directory).free
    if free < float(total):
        raise OSError(
            f"{byte_size(float(total))} are needed and {byte_size(free)} are free in {directory.parent}; "
            "free some space or lower checkpoint.keep"
        )


def _write_common(common: dict[str, Any], directory: Path) -> None:
    with (directory / COMMON_STATE_FNAME).open("wb") as stream:
        torch.save(common, stream)


class _Writer(torch_checkpoint.FileSystemWriter):
    """Torch's writer; a failure to write says what the system said."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # Only the error itself reaches the other ranks, not what it was raised from.
            raise cause_of(error) from None


def _write_shards(sharded: dict[str, Any], directory: Path) -> None:
    with cuda_means_cpu():
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            # With more threads torch loses what fails in one of them.
            storage_writer=_Writer(directory, thread_count=1),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )
