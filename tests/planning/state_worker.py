"""One of four gloo processes of test_memory_exact.py: builds model, data-parallel wrapper and optimizer, and measures.

Arguments: rank, port, working directory with `jobs.json`. Bytes of the real tensors go to `rank<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_klear import parallel
from megatron_klear.config import ModelSettings, OptimizerSettings, ParallelSettings, resolve_architecture
from megatron_klear.model import build_qwen3
from megatron_klear.records import ParallelContext
from megatron_klear.trainer.optimizer import TrainableModel, make_trainable


def storages(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of whole storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measured(trainable: TrainableModel, dtype: str) -> dict[str, int]:
    """Bytes that stay after an update: what the planner counts."""
    weights = list(trainable.model.parameters())
    gradients = [buffer.grad_data for buffer in trainable.ddp.buffers]
    inner = trainable.optimizer.optimizer
    moments = [t for state in inner.state.values() for name, t in state.items() if name != "step"]
    held = [p for group in inner.param_groups for p in group["params"]]
    own = {t.untyped_storage().data_ptr() for t in weights}
    copies = [p for p in held if p.untyped_storage().data_ptr() not in own]
    assert bool(copies) == (dtype == "bfloat16" and bool(held))
    assert all(t.dtype == torch.float32 for t in [*moments, *copies])
    return {
        "weights": storages(weights),
        "gradients": storages(gradients),
        "optimizer": numbers([*moments, *copies]),
    }


def run(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    model = ModelSettings(**job["model"])
    sizes = ParallelSettings(**job["parallel"])
    built = build_qwen3(resolve_architecture(model), model, sizes, context)
    trainable = make_trainable(built, OptimizerSettings(lr=1e-3), sizes, total_updates=2)
    with parallel.cuda_means_cpu():
        trainable.ddp.zero_grad_buffer()
        for parameter in built.parameters():
            parameter.main_grad.normal_()
        trainable.optimizer.prepare_grads()
        trainable.optimizer.step()
    return {
        "stage": context.pp.rank,
        "shard": context.dp_cp.rank,
        "dp": context.dp.size,
        **measured(trainable, model.dtype),
    }


def main() -> None:
    rank, port, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    jobs = json.loads((directory / "jobs.json").read_text())
    os.environ |= {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for name, job in jobs.items():
        context = parallel.start(ParallelSettings(**job["parallel"], timeout_seconds=60.0))
        found[name] = run(job, context)
        parallel.reset_layout()
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    parallel.stop()


if __name__ == "__main__":
    main()
