"""Two real gloo processes, vocabulary split between them, against the whole head in one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klear_kernels.linear_logprob.reference import reference_logprob
from klear_kernels.linear_policy_loss.reference import reference_policy_loss
from megatron_klear.algorithm import PolicyObjective
from tests.kernels.tensor_parallel_ranks import run_ranks

WORLD_SIZE = 2
ROWS = 12
VARIANTS = (
    "padded",
    "float32",
    "all-targets-in-last-shard",
    "all-targets-in-first-shard",
    "last-shard-without-words",
    "largest-logit-in-both-shards",
    "all-ignored",
    "empty",
    "weight-only",
    "hidden-only",
)
NAMES = [
    *(
        f"{operation}-{split}-{variant}"
        for operation in ("logprob", "policy")
        for split in ("tp", "sp")
        for variant in VARIANTS
    ),
    "logprob-tp-no-entropy-gradient",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saved: one pair of processes runs all cases, starting them is what takes the time."""
    return run_ranks(tmp_path_factory.mktemp("tensor_parallel"), WORLD_SIZE)


def expected(name: str, inputs: dict[str, torch.Tensor], words: int) -> dict[str, torch.Tensor]:
    """The same numbers from full logits in one process."""
    hidden = inputs["hidden"].double().requires_grad_()
    weight = inputs["weight"].double().requires_grad_()
    temperature = 0.7 if name.endswith(("padded", "no-entropy-gradient")) else 1.0
    keywords: dict[str, Any] = {"vocab_size": words, "temperature": temperature}
    if name.startswith("logprob"):
        output = reference_logprob(hidden, weight, inputs["labels"], **keywords)
        total = (output.logprobs * inputs["grad_logprobs"]).sum()
        if not name.endswith("no-entropy-gradient"):
            assert output.entropy is not None
            total = total + (output.entropy * inputs["grad_entropy"]).sum()
        values = output._asdict()
    else:
        terms = [inputs[term] for term in ("old_logprobs", "advantages", "policy_weight", "lm_weight")]
        policy = reference_policy_loss(
            hidden, weight, inputs["labels"], *terms, objective=PolicyObjective(kind="gppo"), **keywords
        )
        total = policy.loss * 3.0
        values = policy._asdict()
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        **{key: tensor.detach() for key, tensor in values.items()},
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
    }


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_whole_head_in_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    words = {"last-shard-without-words": 12, "largest-logit-in-both-shards": 24}.get(name.split("-", 2)[2], 21)
    inputs = ranks[0][name]["inputs"]
    outputs = [rank[name]["outputs"] for rank in ranks]
    want = expected(name, inputs, words)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name.endswith("float32") else {"rtol": 1e-10, "atol": 1e-12}
    for key in want.keys() - {"grad_hidden", "grad_weight"}:
        assert torch.equal(outputs[0][key], outputs[1][key]), f"{key} differs between ranks"
        torch.testing.assert_close(outputs[0][key].double(), want[key], **tolerance)
    if name.endswith("weight-only"):
        assert all(output["grad_hidden"] is None for output in outputs)
    elif "-sp-" in name:
        parts = [output["grad_hidden"] for output in outputs]
        whole = torch.cat(parts) if inputs["hidden"].shape[0] else parts[0]
        torch.testing.assert_close(whole.double(), want["grad_hidden"], **tolerance)
    else:
        assert torch.equal(outputs[0]["grad_hidden"], outputs[1]["grad_hidden"])
        torch.testing.assert_close(outputs[0]["grad_hidden"].double(), want["grad_hidden"], **tolerance)
    if name.endswith("hidden-only"):
        assert all(output["grad_weight"] is None for output in outputs)
    else:
        grad_weight = torch.cat([output["grad_weight"] for output in outputs])
        assert grad_weight.shape[0] == ROWS * WORLD_SIZE
        assert not grad_weight[words:].any()
        torch.testing.assert_close(grad_weight.double(), want["grad_weight"], **tolerance)


def test_every_case_of_the_worker_is_checked(ranks: list[dict[str, Any]]) -> None:
    assert set(ranks[0]) == {*NAMES, "refusal"}


def test_both_shards_did_hold_the_largest_logit(ranks: list[dict[str, Any]]) -> None:
    inputs = ranks[0]["logprob-tp-largest-logit-in-both-shards"]["inputs"]
    logits = inputs["hidden"] @ inputs["weight"].t()
    largest = logits.max(dim=1).values
    assert int(((logits[:, 1] == largest) & (logits[:, ROWS] == largest)).sum()) >= 5


def test_token_count_that_forgets_the_split_is_refused(ranks: list[dict[str, Any]]) -> None:
    message = ranks[0]["refusal"]["outputs"]["message"]
    assert message == "labels: got 4 tokens, hidden has 8 (hidden holds 4 on each of 2 ranks)"
