"""One rank of the tensor-parallel tests: runs every case over gloo and saves what it got.

Usage: python tensor_parallel_worker.py RANK WORLD_SIZE DIRECTORY
Rank r writes DIRECTORY/rank{r}.pt, a dict: case name -> {"inputs": whole inputs, "outputs": this rank's results}.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from klear_kernels import linear_logprob, linear_policy_loss
from megatron_klear.algorithm import PolicyObjective

IGNORED = -100
SIZE = 8


def whole_inputs(case: dict[str, Any], world_size: int) -> dict[str, torch.Tensor]:
    """The inputs as one process would hold them, from the case's seed; equal on all ranks."""
    generator = torch.Generator().manual_seed(case["seed"])
    tokens, rows, words = case["tokens"], case["rows"] * world_size, case["words"]
    hidden = torch.randn(tokens, SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64) * 1.5
    low, high = case.get("labels", (0, words))
    labels = torch.randint(low, high, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < case.get("ignored", 0.25)] = IGNORED
    if case.get("tied"):
        weight[case["rows"]] = weight[1]  # the same word vector in both shards,
        weight[[1, case["rows"]]] *= 20  # and the largest logit of many tokens
    columns = torch.randn(6, tokens, generator=generator)
    return {
        "hidden": hidden.to(case["dtype"]),
        "weight": weight.to(case["dtype"]),
        "labels": labels,
        "old_logprobs": -1.0 - columns[0].abs(),
        "advantages": columns[1],
        "policy_weight": torch.where(columns[2] > 0.5, 0.0, columns[2].abs() / 10),
        "lm_weight": torch.where(columns[3] > 0.0, 0.0, columns[3].abs() / 10),
        "grad_logprobs": torch.where(columns[4] > 1.0, 0.0, columns[4]),
        "grad_entropy": columns[5],
    }


def own_part(case: dict[str, Any], inputs: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Any]:
    """This rank's hidden states and weight shard, with NaN in the rows of the padded vocabulary."""
    hidden, weight = inputs["hidden"], inputs["weight"].clone()
    weight[case["words"] :] = float("nan")
    if case["sequence_parallel"]:
        hidden = hidden.chunk(world_size)[rank] if hidden.shape[0] else hidden
    shard = weight[rank * case["rows"] : (rank + 1) * case["rows"]]
    needs = case.get("needs", ("hidden", "weight"))
    return {
        "hidden": hidden.clone().requires_grad_("hidden" in needs),
        "weight": shard.clone().requires_grad_("weight" in needs),
    }


def run_case(case: dict[str, Any], inputs: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Any]:
    own = own_part(case, inputs, rank, world_size)
    keywords: dict[str, Any] = {
        "tp_group": dist.group.WORLD,
        "vocab_size": case["words"],
        "temperature": case.get("temperature", 1.0),
        "sequence_parallel": case["sequence_parallel"],
        "chunk_tokens": case.get("chunk_tokens", 5),
        "backend": case.get("backend"),
    }
    if case["operation"] == "logprob":
        logprob_output = linear_logprob(own["hidden"], own["weight"], inputs["labels"], **keywords)
        dtype = logprob_output.logprobs.dtype
        total = (logprob_output.logprobs * inputs["grad_logprobs"].to(dtype)).sum()
        if case.get("entropy_gradient", True):
            total = total + (logprob_output.entropy * inputs["grad_entropy"].to(dtype)).sum()
        outputs = logprob_output._asdict()
    else:
        terms = [inputs[name] for name in ("old_logprobs", "advantages", "policy_weight", "lm_weight")]
        policy_output = linear_policy_loss(
            own["hidden"], own["weight"], inputs["labels"], *terms, objective=PolicyObjective(kind="gppo"), **keywords
        )
        total = policy_output.loss * 3.0
        outputs = policy_output._asdict()
    total.backward()
    return {
        **{name: tensor.detach() for name, tensor in outputs.items()},
        "grad_hidden": own["hidden"].grad,
        "grad_weight": own["weight"].grad,
    }


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name; words < rows * world size leaves padded rows at the end of the last shard(s)."""
    result: dict[str, dict[str, Any]] = {}
    for operation in ("logprob", "policy"):
        for sequence_parallel in (False, True):
            base = {
                "operation": operation,
                "sequence_parallel": sequence_parallel,
                "dtype": torch.float64,
                "tokens": 26,
                "rows": 12,
                "words": 21,
                "seed": 11,
            }
            prefix = f"{operation}-{'sp' if sequence_parallel else 'tp'}"
            result[f"{prefix}-padded"] = {**base, "temperature": 0.7}
            result[f"{prefix}-float32"] = {**base, "dtype": torch.float32, "chunk_tokens": None}
            result[f"{prefix}-all-targets-in-last-shard"] = {**base, "labels": (12, 21)}
            result[f"{prefix}-all-targets-in-first-shard"] = {**base, "labels": (0, 12)}
            result[f"{prefix}-last-shard-without-words"] = {**base, "words": 12, "seed": 12}
            result[f"{prefix}-largest-logit-in-both-shards"] = {**base, "words": 24, "tied": True}
            result[f"{prefix}-all-ignored"] = {**base, "ignored": 2.0}
            result[f"{prefix}-empty"] = {**base, "tokens": 0}
            result[f"{prefix}-weight-only"] = {**base, "needs": ("weight",)}
            result[f"{prefix}-hidden-only"] = {**base, "needs": ("hidden",)}
    result["logprob-tp-no-entropy-gradient"] = {**result["logprob-tp-padded"], "entropy_gradient": False}
    return result


def triton_cases() -> dict[str, dict[str, Any]]:
    """The cases that the Triton backend shares, in bfloat16, with more than one tile per shard."""
    chosen = (
        "padded",
        "last-shard-without-words",
        "largest-logit-in-both-shards",
        "all-ignored",
        "empty",
        "hidden-only",
    )
    result = {}
    for name, case in cases().items():
        if name.endswith(chosen):
            words = {"last-shard-without-words": 40, "largest-logit-in-both-shards": 80}.get(name.split("-", 2)[2], 71)
            sizes = {"rows": 40, "words": words, "chunk_tokens": 9}
            result[name] = {**case, **sizes, "dtype": torch.bfloat16, "backend": "triton"}
    return result


def main() -> None:
    rank, world_size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    saved = {}
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreting:
        from tests.kernels.triton_interpreter_shims import install

        install()
    for name, case in (triton_cases() if interpreting else cases()).items():
        inputs = whole_inputs(case, world_size)
        saved[name] = {"inputs": inputs, "outputs": run_case(case, inputs, rank, world_size)}
    try:
        linear_logprob(
            torch.zeros(4, SIZE),
            torch.zeros(3, SIZE),
            torch.zeros(4, dtype=torch.int64),
            tp_group=dist.group.WORLD,
            sequence_parallel=True,
        )
    except ValueError as error:
        saved["refusal"] = {"inputs": {}, "outputs": {"message": str(error)}}
    torch.save(saved, directory / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
