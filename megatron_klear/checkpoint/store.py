"""Saves and resumes a run: Megatron's distributed checkpoint plus the run's own state, all or nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException

from megatron_klear.checkpoint import hf_directory, layout, optimizer_state
from megatron_klear.checkpoint.collective import agree, damage_of, together
from megatron_klear.checkpoint.conversion import HF_FILES
from megatron_klear.checkpoint.find import find_whole
from megatron_klear.checkpoint.weights import load_model_weights
from megatron_klear.checkpoint.writing import write_sharded
from megatron_klear.errors import CheckpointError
from megatron_klear.model import Qwen3Model
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.records import ParallelContext

log = logging.getLogger(__name__)

_METADATA = {
    # Per parameter, so that it can be loaded in any layout,
    "distrib_optim_sharding_type": "fully_reshardable",
    # and gathered on one rank of a data-parallel group: on all of them it would fill the memory of the machine.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
"""How the optimizer's state is stored."""

_NOT_MODEL = ("optimizer", "schedule", "random_state")

RunState = dict[str, Any]
"""JSON-able state of the run: step, data cursor, policy version, counters."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        root: the run's `checkpoints` directory, on a file system that all ranks share.
        ddp, optimizer, schedule: what is saved and restored in place.
        context: the layout.
        keep: newest checkpoints to keep.
        settings_yaml: resolved settings, stored beside the weights.

    Attributes:
        hf_files: directory with the config, tokenizer and generation files that the run's first weights came with,
            None if there is none. They go into every checkpoint, since the first one is removed in time.
    """

    def __init__(
        self,
        root: Path,
        *,
        ddp: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        context: ParallelContext,
        keep: int,
        settings_yaml: str,
    ) -> None:
        self.root = root
        self.ddp = ddp
        self.optimizer = optimizer
        self.schedule = schedule
        self.context = context
        self.keep = keep
        self.settings_yaml = settings_yaml
        self.hf_files: Path | None = None
        optimizer_state.prepare(optimizer)

    def save(self, step: int, run_state: RunState) -> Path:
        """Write a checkpoint; on return it is whole, visible and on disk, and old ones beyond `keep` are gone.

        Args:
            step: names the checkpoint.
            run_state: the rest of the run's state; rank 0's is stored.

        Raises:
            CheckpointError: on all ranks; earlier checkpoints are all still there and nothing is left of this one.
        """
        target = layout.writing_directory(self.root, step)
        context = self.context
        try:
            together("make a directory for a checkpoint", lambda: self._prepare(target), context, only_first=True)
            together("see the directory of a checkpoint", lambda: layout.require_shared(target), context)
            write_sharded(lambda: self._sharded_state(is_loading=False), target, context)
            together("write a checkpoint", lambda: self._describe(target, run_state), context, only_first=True)
            self._write_checksums(target)
            together("finish a checkpoint", lambda: layout.publish(self.root, step), context, only_first=True)
        except CheckpointError as error:
            if context.world.rank == 0:
                layout.clean(self.root)
            dist.barrier()
            raise CheckpointError(
                f"{error}. Nothing was saved in {self.root}; earlier checkpoints there are untouched. When this is "
                "mended, start again to resume from the newest one."
            ) from error
        saved = layout.step_directory(self.root, step)
        if context.world.rank == 0:
            self._take_hf_files(saved)
            self._remove_old()
        dist.barrier()
        return saved

    def resume(self) -> RunState | None:
        """Restore the newest whole checkpoint in place and return its run state; None when there is none.

        Damaged checkpoints are passed over with a warning that says what is wrong with them; half-written ones are
        removed. Of a checkpoint that holds weights only (`tools/convert` makes them) the weights are taken, and None
        is returned since no run has begun.

        Raises:
            CheckpointError: there are checkpoints, but none is whole, or the newest does not fit the model.
        """
        together("clean up checkpoints", lambda: layout.clean(self.root), self.context, only_first=True)
        steps = agree("list checkpoints", lambda: layout.finished_steps(self.root), self.context)
        if not steps:
            return None
        directory = self._newest_whole(steps)
        if directory is None:
            raise CheckpointError(
                f"{self.root}: none of the {len(steps)} checkpoints is whole (see the warnings above); remove them and "
                "start anew, or point run.dir elsewhere"
            )
        state: RunState = agree(
            "read the state of the run", lambda: json.loads((directory / layout.RUN_STATE).read_text()), self.context
        )
        weights_only = bool(state.get("model_only"))
        if weights_only:
            weights = load_model_weights(self.ddp.module, directory, self.context)
            in_fp8 = self.ddp.module.config.fp8_param
            with cuda_means_cpu():
                self.optimizer.reload_model_params(state_dict=weights if in_fp8 else None)
        else:
            self._load(directory)
        self._take_hf_files(directory)
        if self.context.world.rank == 0:
            log.info("first weights from %s" if weights_only else "resuming from %s", directory)
        return None if weights_only else state

    def take_over(self, directory: Path) -> None:
        """Restore a checkpoint of another run in place: weights, optimizer, learning rate, random state.

        Raises:
            CheckpointError: it does not fit the model.
        """
        self._load(directory)
        self._take_hf_files(directory)

    def _newest_whole(self, steps: Sequence[int]) -> Path | None:
        for step in steps:
            directory = layout.step_directory(self.root, step)
            problems = damage_of(directory, self.context)
            if not problems:
                return directory
            if self.context.world.rank == 0:
                log.warning("checkpoint %s is damaged and is passed over: %s", directory, "; ".join(problems))
        return None

    def _prepare(self, target: Path) -> None:
        layout.clean(self.root)
        target.mkdir(parents=True)

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {**_METADATA, "dp_cp_group": self.context.dp_cp.group}
        model = self.ddp.module.sharded_state_dict(metadata=metadata)
        # The optimizer's state is keyed by the model's sharded tensors, so that both can be cut anew together.
        state: dict[str, Any] = {
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
            "schedule": self.schedule.state_dict(),
            "content_metadata": dict(_METADATA),
        }
        if state["optimizer"].get("param_state", state) is None:
            del state["optimizer"]["param_state"]  # another rank of this data-parallel group stores it
        state.update(model)
        rank, size = self.context.world.rank, self.context.world.size
        state["random_state"] = ShardedObject(self._random_state_key, _random_state(), (size,), (rank,), replica_id=0)
        return state

    @property
    def _random_state_key(self) -> str:
        return f"random_state_of_{self.context.world.size}"  # Megatron allows no slash in it

    def _describe(self, target: Path, run_state: RunState) -> None:
        (target / layout.RUN_STATE).write_text(json.dumps(run_state, indent=1) + "\n")
        (target / layout.SETTINGS).write_text(self.settings_yaml)
        if self.hf_files is not None:
            hf_directory.copy_files(self.hf_files, hf_directory.CARRIED_FILES, target / HF_FILES)

    def _take_hf_files(self, checkpoint: Path) -> None:
        if (checkpoint / HF_FILES).is_dir():
            self.hf_files = checkpoint / HF_FILES

    def _write_checksums(self, target: Path) -> None:
        """Every rank reads a share of the files; rank 0 writes the manifest."""
        rank, size = self.context.world.rank, self.context.world.size
        names = agree("list the files of a checkpoint", lambda: layout.files_of(target), self.context)
        mine: dict[str, tuple[int, int]] = {}
        together(
            "read back a checkpoint", lambda: mine.update(layout.checksums(target, names[rank::size])), self.context
        )
        parts: list[dict[str, tuple[int, int]] | None] = [None] * size
        dist.all_gather_object(parts, mine)
        sums = {name: pair for part in parts if part for name, pair in part.items()}
        together("write a checkpoint", lambda: layout.write_manifest(target, sums), self.context, only_first=True)

    def _remove_old(self) -> None:
        try:
            layout.remove_old(self.root, self.keep)
        except OSError as error:  # the new checkpoint is whole all the same
            log.warning("cannot remove old checkpoints in %s: %s", self.root, error)

    def _load(self, directory: Path) -> None:
        try:
            with cuda_means_cpu():
                state = self._sharded_state(is_loading=True)
                del state["content_metadata"]
                stored = load_sharded_metadata(str(directory))
                if not any(key.startswith(f"{self._random_state_key}/") for key in stored):
                    del state["random_state"]  # another number of ranks: random states cannot be matched to ranks
                names = set(state).difference(_NOT_MODEL)
                loaded = dist_checkpointing.load(state, str(directory))
                self.ddp.module.load_state_dict({name: loaded[name] for name in names})
                optimizer_state.restore(self.optimizer, loaded["optimizer"])
                self.schedule.load_state_dict(loaded["schedule"])
        except (CheckpointException, CheckpointingException, AssertionError, KeyError, ValueError) as error:
            # Its files are as they were written, so it is the checkpoint of something else.
            raise CheckpointError(
                f"{directory} cannot be loaded into this model and optimizer: {_in_one_line(error)}. If they were "
                "changed since it was written, change model settings and parallel.distributed_optimizer back, or "
                "choose another run.dir."
            ) from error
        if "random_state" in loaded:
            _set_random_state(loaded["random_state"])


def load_weights(directory: Path, model: Qwen3Model, context: ParallelContext) -> Path:
    """Fill a model with the weights of a checkpoint of any layout, from training or from `tools/convert`.

    A collective. The optimizer's and the run's state are left aside.

    Args:
        directory: a run directory or its checkpoints directory, of which the newest whole checkpoint is taken
            (damaged ones are passed over with a warning), or one checkpoint.
        model: the model, not wrapped, before an optimizer takes its weights.
        context: the layout.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: there is no whole checkpoint, or it does not hold this model.
    """
    found, notes = find_whole(directory, partial(damage_of, context=context))
    if context.world.rank == 0:
        for note in notes:
            log.warning("%s", note)
        log.info("weights from %s", found)
    load_model_weights(model, found, context)
    return found


def _in_one_line(error: BaseException) -> str:
    """The message without the traces of every rank that torch puts into it."""
    if isinstance(error, CheckpointException):
        error = next(cause for cause, _ in error.failures.values())
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
