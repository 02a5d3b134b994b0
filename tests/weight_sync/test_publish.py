"""Two ranks of a trainer publish to a real server: the engine then has exactly their weights, or the publish fails."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import numpy as np
import pytest
import torch

from megatron_klear.conformance.compare import architecture
from megatron_klear.conformance.matrix import SLACK
from megatron_klear.conformance.reference import reference_model


def exact(tokens: list[list[int]], responses: list[list[float]], seed: int, dtype: str) -> list[np.ndarray]:
    """Logprobs of the responses by transformers in a data type, one sequence at a time."""
    model = reference_model(architecture(tied=False), seed=seed).to(getattr(torch, dtype))
    found = []
    for ids, response in zip(tokens, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        logprobs = torch.log_softmax(logits.to(torch.float64), dim=-1)
        taken = logprobs.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)
        found.append(taken[-len(response) :].numpy())
    return found


def largest(a: list[Any], b: list[Any]) -> float:
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(a, b, strict=True))


def check_equal(result: dict[str, Any], version: int, *, dtype: str = "float32") -> None:
    """Engine and trainer are both as close to float64 as transformers is in the same data type, times SLACK."""
    assert result["proof"] == "checksum"
    assert {v for versions in result["versions"] for v in versions} == {version}
    assert [len(values) for values in result["engine"]] == [24] * 12
    truth = exact(result["tokens"], result["engine"], version, "float64")
    plain = largest(exact(result["tokens"], result["engine"], version, dtype), truth)
    assert 0.0 < plain < (1e-4 if dtype == "float32" else 0.5)
    assert largest(result["engine"], truth) <= SLACK * plain
    assert largest(result["trainer"], truth) <= SLACK * plain
    others = exact(result["tokens"], result["engine"], version + 1, "float64")
    assert largest(result["engine"], others) > SLACK * plain, "other weights would pass too"


DAMAGED = "model.layers.2.mlp.up_proj.weight"
TRANSPORTS: list[dict[str, Any]] = [
    {"transport": "disk", "version": 1},
    {"transport": "distributed", "version": 2},
    {"transport": "tensor", "version": 3, "left_open": True},
    {"transport": "value", "version": 4, "bucket_bytes": 1024},
    {"transport": "distributed", "version": 5, "corrupt": DAMAGED},
    {"transport": "disk", "version": 6, "corrupt": "model.embed_tokens.weight"},
    {"transport": "distributed", "version": 7, "bucket_bytes": 2**30},
]
STOP = 7  # one of 83 tokens: a response ends by it about as often as by its 80 tokens being full
INTERRUPTING: list[dict[str, Any]] = [
    {"transport": "tensor", "version": 8, "during": 32, "stop": STOP, "pause": "retract"},
    {"transport": "tensor", "version": 9, "during": 32, "stop": STOP, "pause": "abort"},
    {"transport": "tensor", "version": 10, "during": 32, "stop": STOP, "pause": "in_place"},
    # SGLang loads these two in ways of their own while it is paused.
    {"transport": "disk", "version": 11, "during": 32, "stop": STOP, "pause": "retract"},
    {"transport": "distributed", "version": 12, "during": 32, "stop": STOP, "pause": "in_place"},
]


SHARED: list[dict[str, Any]] = [
    {"transport": "shared", "version": 13, "ranks": [1]},
    {"transport": "shared", "version": 14, "ranks": [1], "corrupt_rank": 1, "corrupt_name": "model.norm.weight"},
    {"transport": "shared", "version": 15, "ranks": [0], "corrupt_rank": 1, "corrupt_name": "model.norm.weight"},
]
"""The engine lies on this rank's GPU, and one rank offers something else than the others."""


@pytest.fixture(scope="module")
def two_tensor_ranks(publish: Any) -> list[dict[str, Any]]:
    return publish(TRANSPORTS + INTERRUPTING + SHARED, tp=2)


@pytest.fixture(scope="module")
def two_stages(publish: Any) -> list[dict[str, Any]]:
    return publish(TRANSPORTS + SHARED, pp=2)


@pytest.mark.parametrize("layout", ["two_tensor_ranks", "two_stages"])
def test_every_transport_brings_the_trainers_weights(layout: str, request: pytest.FixtureRequest) -> None:
    results = request.getfixturevalue(layout)
    for action, result in zip(TRANSPORTS, results[: len(TRANSPORTS)], strict=True):
        if "corrupt" not in action:
            check_equal(result, action["version"])
    whole = 4 * sum(p.numel() for p in reference_model(architecture(tied=False)).parameters())
    assert {result["num_bytes"] for result in results if "num_bytes" in result} == {whole}


@pytest.mark.parametrize("layout", ["two_tensor_ranks", "two_stages"])
def test_a_damaged_tensor_is_named(layout: str, request: pytest.FixtureRequest) -> None:
    results = request.getfixturevalue(layout)
    assert results[4]["error"] == results[5]["error"] == "WeightSyncError"
    # SGLang holds gate and up as one tensor.
    assert results[4]["text"].endswith("1 differ: model.layers.2.mlp.gate_up_proj.weight")
    assert results[5]["text"].endswith("1 differ: model.embed_tokens.weight")


@pytest.mark.parametrize("layout", ["two_tensor_ranks", "two_stages"])
def test_an_engine_takes_what_the_rank_on_its_gpu_offers(layout: str, request: pytest.FixtureRequest) -> None:
    from_second, damaged, from_first = request.getfixturevalue(layout)[-len(SHARED) :]
    check_equal(from_second, 13)
    assert damaged["error"] == "WeightSyncError"
    assert damaged["text"].endswith("1 differ: model.norm.weight")
    check_equal(from_first, 15)  # what the other rank offers does not matter to it


@pytest.mark.parametrize(
    "number", range(len(INTERRUPTING)), ids=[f"{a['transport']}-{a['pause']}" for a in INTERRUPTING]
)
def test_unfinished_responses_go_on_under_new_weights(two_tensor_ranks: list[dict[str, Any]], number: int) -> None:
    action, result = INTERRUPTING[number], two_tensor_ranks[len(TRANSPORTS) + number]
    version, cut = action["version"], result["interrupted"]
    check_equal(result, version)
    assert len(cut["engine"]) == 3 * action["during"]
    spans = [set(versions) for versions in cut["versions"]]
    assert {version - 1, version} in spans, "the publish did not fall into a response"
    assert set().union(*spans) == {version - 1, version}
    lengths = [len(values) for values in cut["engine"]]
    assert max(lengths) == 80  # the budget goes on over the publish, and does not start again
    assert all(n == 80 or ids[-1] == STOP for n, ids in zip(lengths, cut["tokens"], strict=True))
    assert all(versions == sorted(versions) for versions in cut["versions"])
    old, new = (exact(cut["tokens"], cut["engine"], v, "float64") for v in (version - 1, version))
    plain = largest(exact(cut["tokens"], cut["engine"], version, "float32"), new)
    for engine, versions, before, after in zip(cut["engine"], cut["versions"], old, new, strict=True):
        is_new = np.array(versions) == version
        assert np.abs(np.array(engine) - before)[~is_new].max(initial=0.0) <= SLACK * plain
        if action["pause"] != "in_place":  # there the cache holds what the old weights made of the first tokens
            assert np.abs(np.array(engine) - after)[is_new].max(initial=0.0) <= SLACK * plain


def test_bfloat16_weights_arrive_bit_by_bit(publish: Any, sglang_urls: dict[str, str]) -> None:
    (result,) = publish([{"transport": "tensor", "version": 1}], dtype="bfloat16", tp=2)
    check_equal(result, 1, dtype="bfloat16")
    with urllib.request.urlopen(f"{sglang_urls['bfloat16']}/model_info", timeout=30) as answer:
        assert json.load(answer)["weight_version"] == "1"
