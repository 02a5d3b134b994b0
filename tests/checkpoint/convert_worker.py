"""One of two gloo processes of test_convert_layouts.py: builds the real model in a layout and saves, loads, computes.

Arguments: rank, number of ranks, working directory with `jobs.json`. Results go to `rank<rank>.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from transformers import Qwen3ForCausalLM

from megatron_klear import parallel
from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.store import CheckpointStore
from megatron_klear.checkpoint.weights import load_model_weights
from megatron_klear.config import ModelSettings, OptimizerSettings, ParallelSettings, read_hf_architecture
from megatron_klear.errors import KlearError
from megatron_klear.model import (
    HeadRequest,
    Qwen3Model,
    build_qwen3,
    forward_microbatch,
    load_hf_weights,
    open_hf_directory,
)
from megatron_klear.records import PackedBatch, ParallelContext
from megatron_klear.trainer.optimizer import make_trainable

LENGTHS = (5, 17, 9)


def model_settings(job: dict[str, Any]) -> ModelSettings:
    sizes = dataclasses.asdict(read_hf_architecture(job["hf"]))
    return ModelSettings(**{**sizes, "dtype": job.get("dtype", "float32"), "layer_spec": "local"})


def build(job: dict[str, Any], context: ParallelContext, *, seed: int) -> Qwen3Model:
    """A model with random weights, padding rows of the vocabulary included."""
    torch.manual_seed(seed + context.world.rank)
    layout_ = ParallelSettings(**job["layout"])
    model = build_qwen3(read_hf_architecture(job["hf"]), model_settings(job), layout_, context)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def build_from_hf(job: dict[str, Any], context: ParallelContext) -> Qwen3Model:
    model = build(job, context, seed=1)
    arch = read_hf_architecture(job["hf"])
    load_hf_weights(model, arch, context, open_hf_directory(Path(job["hf"]), arch))
    return model


def save(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """Write a checkpoint with Megatron's own save, in this layout, with what an optimizer would add."""
    model = build_from_hf(job, context)
    root = Path(job["out"]) / "checkpoints"
    target = layout.writing_directory(root, 5)
    if context.world.rank == 0:
        target.mkdir(parents=True)
    dist.barrier()
    metadata = {"dp_cp_group": context.dp_cp.group}
    with parallel.cuda_means_cpu():
        state = dict(model.sharded_state_dict(metadata=metadata))
        moments = model.sharded_state_dict(prefix="optimizer.state.exp_avg.", metadata=metadata)
        state["optimizer"] = {"moments": moments, "step": 3}
        filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(state, str(target))
    if context.world.rank == 0:
        settings = {"run": {"seed": 1}, "model": {"preset": None, **dataclasses.asdict(model_settings(job))}}
        (target / layout.SETTINGS).write_text(yaml.safe_dump(settings))
        (target / layout.RUN_STATE).write_text(json.dumps({"step": 5}))
        layout.write_manifest(target, layout.checksums(target, layout.files_of(target)))
        layout.publish(root, 5)
    dist.barrier()
    return {}


def make_store(job: dict[str, Any], context: ParallelContext, model: Qwen3Model, root: Path) -> CheckpointStore:
    trainable = make_trainable(model, OptimizerSettings(), ParallelSettings(**job["layout"]), total_updates=10)
    settings = {"run": {"seed": 1}, "model": {"preset": None, **dataclasses.asdict(model_settings(job))}}
    return CheckpointStore(
        root,
        ddp=trainable.ddp,
        optimizer=trainable.optimizer,
        schedule=trainable.schedule,
        context=context,
        keep=2,
        settings_yaml=yaml.safe_dump(settings),
    )


def train(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """Write a checkpoint as training does, optimizer included."""
    root = Path(job["out"]) / "checkpoints"
    make_store(job, context, build_from_hf(job, context), root).save(5, {"step": 5})
    return {}


def resume(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """Start a run from a converted checkpoint, as training does."""
    reference = dict(build_from_hf(job, context).named_parameters())
    model = build(job, context, seed=2)
    state = make_store(job, context, model, Path(job["checkpoint"]).parent).resume()
    different = sorted(n for n, p in model.named_parameters() if not torch.equal(p, reference[n]))
    return {"state": state, "different": different}


def load(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """Load a checkpoint in this layout, with our function and with nothing but Megatron's; compare every parameter."""
    reference = dict(build_from_hf(job, context).named_parameters())
    ours = build(job, context, seed=2)
    load_model_weights(ours, Path(job["checkpoint"]), context)
    theirs = build(job, context, seed=3)
    with parallel.cuda_means_cpu():
        state = theirs.sharded_state_dict(metadata={"dp_cp_group": context.dp_cp.group})
        loaded = dist_checkpointing.load(dict(state), job["checkpoint"], strict="raise_unexpected")
        theirs.load_state_dict({name: loaded[name] for name in state})
    return {
        "names": sorted(reference),
        "ours": sorted(n for n, p in ours.named_parameters() if not torch.equal(p, reference[n])),
        "theirs": sorted(n for n, p in theirs.named_parameters() if not torch.equal(p, reference[n])),
    }


def refuse(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """Load a checkpoint of another model."""
    model = build(job, context, seed=2)
    try:
        load_model_weights(model, Path(job["checkpoint"]), context)
    except KlearError as error:
        return {"error": str(error)}
    return {"error": ""}


def keys(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """Keys and shapes that Megatron stores this model under."""
    with parallel.cuda_means_cpu():
        state = build(job, context, seed=2).sharded_state_dict(metadata={"dp_cp_group": context.dp_cp.group})
    found: dict[str, Any] = {}
    for entry in nested_values(state):
        for part in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
            if hasattr(part, "unique_key"):
                found[part.unique_key] = None
            else:
                found[part.key] = list(part.global_shape)
    return found


def logits(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """Largest difference from transformers, of logits and of logprobs, on packed sequences."""
    model = build(job, context, seed=2).eval()
    load_model_weights(model, Path(job["checkpoint"]), context)
    arch = read_hf_architecture(job["hf"])
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    ids, labels = (torch.randint(0, arch.vocab_size, (total,), generator=generator) for _ in range(2))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    zeros = torch.zeros(total)
    batch = PackedBatch(
        token_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
        cu_seqlens=ends,
        cu_seqlens_padded=ends,
        max_seqlen=max(LENGTHS),
        policy_weight=zeros,
        lm_weight=zeros + 1,
        advantages=zeros,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
    )
    seen: list[torch.Tensor] = []
    model.output_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().squeeze(1)))
    with torch.no_grad():
        answer = forward_microbatch(
            model, HeadRequest(batch=batch, objective=None), context, transformer_engine=model.layer_kind == "te"
        )
        weight = model.shared_embedding_or_output_weight() if arch.tie_embeddings else model.output_layer.weight
        ours = seen[0] @ weight[: arch.vocab_size].T
        reference = Qwen3ForCausalLM.from_pretrained(job["hf"], dtype=torch.float32).eval()
        theirs = torch.cat([reference(part[None]).logits[0] for part in ids.split(LENGTHS)])
    logprobs = torch.log_softmax(theirs, -1).gather(1, labels[:, None])[:, 0]
    return {
        "logits": float((ours - theirs).abs().max()),
        "logprobs": float((answer.logprobs - logprobs).abs().max()),
        "scale": float(theirs.abs().max()),
    }


def main() -> None:
    rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = str(size)  # where the layout is checked against it
    actions = {
        "save": save,
        "train": train,
        "resume": resume,
        "load": load,
        "refuse": refuse,
        "keys": keys,
        "logits": logits,
    }
    results = {}
    for number, job in enumerate(json.loads((directory / "jobs.json").read_text())):
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(directory / f"store{number}"), size), rank=rank, world_size=size
        )
        context = parallel.start(ParallelSettings(**job["layout"]))
        results[job["name"]] = actions[job["action"]](job, context)
        dist.barrier()
        parallel.stop()
    (directory / f"rank{rank}.json").write_text(json.dumps(results))


# A spawned helper of the checkpoint writer would import this module again.
if __name__ == "__main__":
    main()
