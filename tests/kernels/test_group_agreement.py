"""Two real gloo processes that are given different arguments: both are told, and neither waits for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kernels.tensor_parallel_ranks import run_ranks

SAME = "all ranks of the group must be given the same"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    worker = Path(__file__).with_name("disagreement_worker.py")
    return run_ranks(tmp_path_factory.mktemp("disagreement"), 2, worker=worker)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("temperature", f"temperature: rank 0 of tp_group got 1.0, rank 1 got 0.7; {SAME}"),
        ("tokens", "labels: rank 0 of tp_group got 8 tokens with checksum 168, rank 1 got 7 tokens with checksum 112"),
        ("labels", "labels: rank 0 of tp_group got 8 tokens with checksum 168, rank 1 got 8 tokens with checksum 84"),
        ("weight rows", "weight: rank 0 of tp_group got torch.float32 (6, 4), requires_grad False, rank 1 got "
                        "torch.float32 (7, 4), requires_grad False"),
        ("sequence parallel", "hidden: rank 0 of tp_group got torch.float32 (8, 4)"),
        ("gradients", "weight: rank 0 of tp_group got torch.float32 (6, 4), requires_grad False, rank 1 got "
                      "torch.float32 (6, 4), requires_grad True"),
        ("chunks", "chunk_tokens: rank 0 of tp_group got None, rank 1 got 3"),
        ("objective", "objective: rank 0 of tp_group got PolicyObjective(kind='gppo'"),
    ],
)  # fmt: skip
def test_both_ranks_are_told_the_argument(ranks: list[dict[str, Any]], case: str, message: str) -> None:
    assert ranks[0][case] == ranks[1][case]
    assert ranks[0][case].startswith(f"ValueError: {message}")


@pytest.mark.parametrize(
    ("case", "refusal"),
    [
        ("refused by one", "labels: got 99 at position 0, allowed 0 to 11 or ignore_index (-100)"),
        ("backend of one", "backend: got 'cuda_of_tomorrow', allowed on cpu: torch, or None"),
    ],
)
def test_what_one_rank_refuses_the_other_is_told(ranks: list[dict[str, Any]], case: str, refusal: str) -> None:
    assert ranks[1][case] == f"ValueError: {refusal}"
    assert ranks[0][case] == f"ValueError: tp_group: rank 1 refused its input: {refusal}"


def test_only_the_first_call_of_a_group_compares(ranks: list[dict[str, Any]]) -> None:
    assert [rank["exchanges in six calls"] for rank in ranks] == [1, 1]
