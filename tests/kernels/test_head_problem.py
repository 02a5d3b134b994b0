"""What cannot work is refused by the name of the argument, before any product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klear_kernels import linear_logprob


def call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(6, 3),
        "labels": torch.tensor([0, 5, -100, 2]),
    }
    arguments.update(changes)
    linear_logprob(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(1, 4, 3)}, ValueError, r"hidden: got shape \(1, 4, 3\)"),
        ({"weight": torch.zeros(6)}, ValueError, r"weight: got shape \(6,\)"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"labels: got shape \(4, 1\)"),
        ({"hidden": torch.zeros(4, 3).half()}, TypeError, r"hidden: got torch.float16, allowed bfloat16"),
        ({"weight": torch.zeros(6, 3).bfloat16()}, TypeError, r"weight: got torch.bfloat16, hidden is torch.float32"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, TypeError, r"labels: got torch.int32, allowed int64"),
        ({"weight": torch.zeros(6, 5)}, ValueError, r"weight: got hidden size 5, hidden has 3"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight: got no rows"),
        ({"weight": torch.zeros(6, 3, device="meta")}, ValueError, r"weight: got device meta"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels: got 5 tokens, hidden has 4"),
        ({"labels": torch.tensor([0, 6, 1, 1])}, ValueError, r"labels: got 6 at position 1, allowed 0 to 5"),
        ({"labels": torch.tensor([0, 1, 1, -1])}, ValueError, r"labels: got -1 at position 3"),
        ({"labels": torch.tensor([0, 5, 1, 1]), "vocab_size": 5}, ValueError, r"labels: got 5 at position 1"),
        ({"vocab_size": 7}, ValueError, r"vocab_size: got 7, allowed 1 to 6"),
        ({"vocab_size": 0}, ValueError, r"vocab_size: got 0"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0.0"),
        ({"temperature": float("nan")}, ValueError, r"temperature: got nan"),
        ({"softcap": 30.0}, ValueError, r"softcap: got 30.0, allowed None"),
        ({"hidden": [[0.0]]}, TypeError, r"hidden: got list, allowed a tensor"),
        ({"tp_group": object()}, ValueError, r"tp_group: got a group, but torch.distributed is not initialised"),
        ({"chunk_tokens": 0}, ValueError, r"chunk_tokens: got 0"),
        ({"backend": "cuda_of_tomorrow"}, ValueError, r"backend: got 'cuda_of_tomorrow', allowed on cpu: torch"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_unchanged_call_works() -> None:
    call()
    call(backend="torch", vocab_size=6, chunk_tokens=1, ignore_index=-100)
