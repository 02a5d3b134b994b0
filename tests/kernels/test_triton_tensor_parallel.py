"""The Triton backend on two real gloo processes, interpreted, against the whole head in one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.tensor_parallel_ranks import run_ranks
from tests.kernels.test_tensor_parallel import expected

WORLD_SIZE = 2
ROWS = 40
VARIANTS = {
    "padded": 71,
    "last-shard-without-words": 40,
    "largest-logit-in-both-shards": 80,  # and labels hundreds of nats below it: rows of the loss are done again
    "all-ignored": 71,
    "empty": 71,
    "hidden-only": 71,
}
NAMES = [f"{kind}-{split}-{name}" for kind in ("logprob", "policy") for split in ("tp", "sp") for name in VARIANTS]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("triton_tensor_parallel"), WORLD_SIZE, TRITON_INTERPRET="1")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    norm = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / norm if norm else float(got.double().norm())


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_whole_head_in_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    words = VARIANTS[name.split("-", 2)[2]]
    inputs = ranks[0][name]["inputs"]
    outputs = [rank[name]["outputs"] for rank in ranks]
    want = expected(name, inputs, words)
    logits = (inputs["hidden"].double() @ inputs["weight"].double().t()).abs().flatten().tolist()
    # float32 logits of that size, and references off by as much: old log-probabilities here say nothing of the new
    rounding = 2 * max(logits, default=0.0) * 2.0**-22
    for key in want.keys() - {"grad_hidden", "grad_weight"}:
        assert torch.equal(outputs[0][key], outputs[1][key]), f"{key} differs between ranks"
        torch.testing.assert_close(outputs[0][key].double(), want[key], rtol=1e-5, atol=1e-5 + rounding)
    parts = [output["grad_hidden"] for output in outputs]
    if "-sp-" in name and inputs["hidden"].shape[0]:
        grad_hidden = torch.cat(parts)
    else:
        assert torch.equal(parts[0], parts[1])
        grad_hidden = parts[0]
    # exponentials, scaled hidden states, the result, and (of the loss) the result times 3: each rounded once
    assert relative_error(grad_hidden, want["grad_hidden"]) <= 4 * 2.0**-9
    if name.endswith("hidden-only"):
        assert all(output["grad_weight"] is None for output in outputs)
        return
    grad_weight = torch.cat([output["grad_weight"] for output in outputs])
    assert grad_weight.shape[0] == ROWS * WORLD_SIZE
    assert not grad_weight[words:].any()
    assert relative_error(grad_weight, want["grad_weight"]) <= 4 * 2.0**-9


def test_every_case_of_the_worker_is_checked(ranks: list[dict[str, Any]]) -> None:
    assert set(ranks[0]) == {*NAMES, "refusal"}


def test_some_rows_were_out_of_range_of_their_reference(ranks: list[dict[str, Any]]) -> None:
    """So that both ranks had to agree on doing them again."""
    inputs = ranks[0]["policy-tp-largest-logit-in-both-shards"]["inputs"]
    trained = (inputs["labels"] >= 0) & ((inputs["policy_weight"] != 0) | (inputs["lm_weight"] != 0))
    logprobs = ranks[0]["policy-tp-largest-logit-in-both-shards"]["outputs"]["logprobs"]
    guess = torch.where(inputs["policy_weight"] != 0, inputs["old_logprobs"], 0.0)
    outside = trained & ((guess - logprobs).abs() > 31.0)
    assert 3 <= int(outside.sum()) < int(trained.sum())
