"""One rank of test_group_agreement.py: calls that differ between the ranks, each on a group of its own.

Usage: python disagreement_worker.py RANK WORLD_SIZE DIRECTORY
Rank r writes DIRECTORY/rank{r}.pt: case -> what the call raised, or "" where it worked, and counts of exchanges.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from klear_kernels import linear_logprob, linear_policy_loss
from megatron_klear.algorithm import PolicyObjective

SIZE, ROWS, TOKENS = 4, 6, 8


def call(group: dist.ProcessGroup, policy: bool = False, **changes: Any) -> None:
    """A call that works on two ranks, but for the changes."""
    hidden = changes.pop("hidden", torch.ones(TOKENS, SIZE))
    weight = changes.pop("weight", torch.ones(ROWS, SIZE))
    labels = changes.pop("labels", torch.arange(TOKENS))
    if policy:
        objective = changes.pop("objective", PolicyObjective(kind="gppo"))
        terms = [torch.ones(labels.shape[0])] * 4
        linear_policy_loss(hidden, weight, labels, *terms, objective=objective, tp_group=group, **changes)
    else:
        linear_logprob(hidden, weight, labels, tp_group=group, **changes)


CHANGES_ON_RANK_1: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "tokens": {"hidden": torch.ones(TOKENS - 1, SIZE), "labels": torch.arange(TOKENS - 1)},
    "labels": {"labels": torch.arange(TOKENS).flip(0)},
    "weight rows": {"weight": torch.ones(ROWS + 1, SIZE)},
    "sequence parallel": {"sequence_parallel": True, "hidden": torch.ones(TOKENS // 2, SIZE)},
    "gradients": {"weight": torch.ones(ROWS, SIZE, requires_grad=True)},
    "chunks": {"chunk_tokens": 3},
    "objective": {"policy": True, "objective": PolicyObjective(kind="clip")},
    "refused by one": {"labels": torch.full((TOKENS,), 99)},
    "backend of one": {"backend": "cuda_of_tomorrow"},
}


def main() -> None:
    rank, world_size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    saved: dict[str, Any] = {}
    for name, changes in CHANGES_ON_RANK_1.items():
        group = dist.new_group(list(range(world_size)))
        try:
            call(group, **(changes if rank == 1 else {"policy": changes.get("policy", False)}))
            saved[name] = ""
        except (TypeError, ValueError) as error:
            saved[name] = f"{type(error).__name__}: {error}"
    exchanges: list[int] = []
    original = dist.all_gather_object

    def counting(*arguments: Any, **keywords: Any) -> None:
        exchanges.append(1)
        original(*arguments, **keywords)

    dist.all_gather_object = counting
    group = dist.new_group(list(range(world_size)))
    for _ in range(3):
        call(group)
        call(group, policy=True)
    saved["exchanges in six calls"] = len(exchanges)
    torch.save(saved, directory / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
