"""Saves and resumes a run: Megatron's distributed checkpoint plus the run's own state, all or nothing."""

from __future__ import annotations

import json
import logging
import queue
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import FileSystemReader

from megatron_klear.checkpoint import layout
from megatron_klear.errors import CheckpointError
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.records import ParallelContext

log = logging.getLogger(__name__)

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state is stored per parameter, so that it can be loaded in any layout."""

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
        _allocate_adam_state(optimizer)

    def save(self, step: int, run_state: RunState) -> Path:
        """Write a checkpoint; on return it is whole, visible and on disk, and old ones beyond `keep` are gone.

        Args:
            step: names the checkpoint.
            run_state: the rest of the run's state; rank 0's is stored.

        Raises:
            CheckpointError: nothing was changed: earlier checkpoints are all still there.
        """
        target = layout.writing_directory(self.root, step)
        self._together("prepare the directory", lambda: self._prepare(target), only_first=True)
        with cuda_means_cpu():
            state = self._sharded_state(is_loading=False)
        self._together("check free space", lambda: self._require_space(state))
        try:
            self._together("write", lambda: self._write(state, target))
            self._together("write the run's state", lambda: self._write_run_state(target, run_state), only_first=True)
            self._write_checksums(target)
            self._together("finish", lambda: layout.publish(self.root, step), only_first=True)
        except CheckpointError:
            if self.context.world.rank == 0:
                shutil.rmtree(target, ignore_errors=True)
            raise
        if self.context.world.rank == 0:
            layout.remove_old(self.root, self.keep)
        dist.barrier()
        return layout.step_directory(self.root, step)

    def resume(self) -> RunState | None:
        """Restore the newest whole checkpoint in place and return its run state; None when there is none.

        Damaged or half-written checkpoints are passed over with a warning that says what is wrong with them.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        steps = self._agree(lambda: layout.finished_steps(self.root))
        for step in steps:
            directory = layout.step_directory(self.root, step)
            problems = self._damage(directory)
            if problems:
                if self.context.world.rank == 0:
                    log.warning("checkpoint %s is damaged and is passed over: %s", directory, "; ".join(problems))
                continue
            self._load(directory)
            state: RunState = self._agree(lambda d=directory: json.loads((d / layout.RUN_STATE).read_text()))
            if self.context.world.rank == 0:
                log.info("resuming from %s", directory)
            return state
        if steps:
            raise CheckpointError(
                f"{self.root}: none of the {len(steps)} checkpoints is whole (see the warnings above); remove them and "
                "start anew, or point run.dir elsewhere"
            )
        return None

    def _prepare(self, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {**_METADATA, "dp_cp_group": self.context.dp_cp.group}
        model = self.ddp.module.sharded_state_dict(metadata=metadata)
        # The optimizer's state is keyed by the model's sharded tensors, so that both can be cut anew together.
        state: dict[str, Any] = {
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
            "schedule": self.schedule.state_dict(),
        }
        state.update(model)
        rank, size = self.context.world.rank, self.context.world.size
        state["random_state"] = ShardedObject(
            f"random_state/of_{size}", torch.get_rng_state(), (size,), (rank,), replica_id=0
        )
        return state

    def _require_space(self, state: dict[str, Any]) -> None:
        needed = sum(t.numel() * t.element_size() for t in _tensors(state))
        everywhere = torch.tensor([float(needed)], dtype=torch.float64, device=self.context.device)
        dist.all_reduce(everywhere)
        free = shutil.disk_usage(self.root).free
        if free < float(everywhere):
            raise OSError(f"{float(everywhere) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free in {self.root}")

    def _write(self, state: dict[str, Any], target: Path) -> None:
        # Megatron hands results from its writers through a manager process that it spawns for asynchronous saves,
        # importing the main module anew. Saves are synchronous here, so a queue of this process does.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
        with cuda_means_cpu():
            dist_checkpointing.save(state, str(target), content_metadata=_METADATA)

    def _write_run_state(self, target: Path, run_state: RunState) -> None:
        (target / layout.RUN_STATE).write_text(json.dumps(run_state, indent=1) + "\n")
        (target / layout.SETTINGS).write_text(self.settings_yaml)

    def _write_checksums(self, target: Path) -> None:
        """Every rank reads a share of the files; rank 0 writes the manifest."""
        rank, size = self.context.world.rank, self.context.world.size
        names = self._agree(lambda: layout.files_of(target))
        parts: list[dict[str, tuple[int, int]] | None] = [None] * size
        mine: dict[str, tuple[int, int]] = {}
        self._together("read back", lambda: mine.update(layout.checksums(target, names[rank::size])))
        dist.all_gather_object(parts, mine)
        sums = {name: pair for part in parts if part for name, pair in part.items()}
        self._together("write the manifest", lambda: layout.write_manifest(target, sums), only_first=True)

    def _damage(self, directory: Path) -> list[str]:
        rank, size = self.context.world.rank, self.context.world.size
        try:
            expected = layout.read_manifest(directory)
            items = sorted(expected.items())[rank::size]
            mine = layout.damage(directory, dict(items))
        except CheckpointError as error:
            mine = [str(error)]
        parts: list[list[str] | None] = [None] * size
        dist.all_gather_object(parts, mine)
        return sorted({problem for part in parts if part for problem in part})

    def _load(self, directory: Path) -> None:
        with cuda_means_cpu():
            state = self._sharded_state(is_loading=True)
            if f"random_state/of_{self.context.world.size}" not in _object_keys(directory):
                del state["random_state"]  # another number of ranks: random states cannot be matched to ranks
            loaded = dist_checkpointing.load(state, str(directory))
            self.ddp.module.load_state_dict({k: v for k, v in loaded.items() if k in state and _is_model_key(k)})
            self.optimizer.load_state_dict(loaded["optimizer"])
            _separate_adam_steps(self.optimizer)
            self.schedule.load_state_dict(loaded["schedule"])
        if "random_state" in state:
            torch.set_rng_state(loaded["random_state"])

    def _agree(self, read: Callable[[], Any]) -> Any:
        """What rank 0 reads, on every rank; a failure there is raised everywhere."""
        found: list[Any] = [None]
        self._together("read", lambda: found.__setitem__(0, read()), only_first=True)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _together(self, what: str, action: Callable[[], object], *, only_first: bool = False) -> None:
        """Do something on all ranks (or rank 0) and raise on all of them if it fails anywhere."""
        problem = None
        if not only_first or self.context.world.rank == 0:
            try:
                action()
            except (OSError, RuntimeError, ValueError) as error:
                problem = f"rank {self.context.world.rank}: {error}"
        problems: list[str | None] = [None] * self.context.world.size
        dist.all_gather_object(problems, problem)
        found = [p for p in problems if p]
        if found:
            raise CheckpointError(
                f"cannot {what} a checkpoint in {self.root}: {'; '.join(found)}. Earlier checkpoints are untouched; "
                "free some space or change run.dir, then start again to resume from the newest one."
            )


def _allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Make torch's AdamW storable and loadable at any time; unlike the fused optimizers it keeps a `step` per parameter.

    Megatron reads that step before it saves or loads (so the state must exist, also before the first update) and
    does not store it among the tensors (so the step just restored from the group is passed through).
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW) or inner.state:
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            inner.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        part._set_main_param_and_optimizer_states = partial(
            _set_with_step, part._set_main_param_and_optimizer_states, part._get_main_param_and_optimizer_states
        )


def _separate_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Undo that Megatron gives all parameters one and the same `step` tensor.

    torch's AdamW adds 1 to it once per parameter, so after a resume the bias correction would be off by the number
    of parameters.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()


def _set_with_step(
    set_states: Callable[..., None],
    get_states: Callable[..., dict[str, torch.Tensor]],
    parameter: torch.nn.Parameter,
    tensors: dict[str, torch.Tensor],
) -> None:
    set_states(parameter, {"step": get_states(parameter)["step"], **tensors})


def _is_model_key(key: str) -> bool:
    return key not in ("optimizer", "schedule", "random_state")


def _object_keys(directory: Path) -> set[str]:
    """Names of the stored objects that are not tensors."""
    metadata = FileSystemReader(directory).read_metadata()
    return {key.split("/shard_")[0] for key in metadata.state_dict_metadata}


def _tensors(tree: object) -> list[torch.Tensor]:
    """All tensors that this rank would write."""
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in _tensors(value)]
    if isinstance(tree, list | tuple):
        return [t for value in tree for t in _tensors(value)]
    data = getattr(tree, "data", None)
    return [data] if isinstance(data, torch.Tensor) and not isinstance(tree, torch.Tensor) else []
