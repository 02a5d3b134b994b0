"""Grades, difficulty, and the paper's rules for SFT and RL, on responses that the rows bring."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.curation_inputs import row
from megatron_klear.curation.verify_rl import pass_at_k, rate_bucket

RunCuration = Callable[..., Any]

RIGHT, WRONG = "<think>so</think>It is \\boxed{4}", "<think>so</think>It is \\boxed{5}"
UNCLOSED, CUT = "<think>so \\boxed{4}", {"text": "<think>so and so", "finish_reason": "length"}
REWARD = {"workers": 1, "timeout_seconds": 20.0}


def answered(number: int, *responses: object, **more: Any) -> dict[str, Any]:
    asked = row(number, f"What is two plus two, number {number}?")
    return {**asked, "reference": "4", "responses": list(responses)} | more


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        expected = sum(any(i < correct for i in draw) for draw in draws) / len(draws)
        assert pass_at_k(correct, n, k) == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(1, 16, 16) == 1.0
    assert pass_at_k(0, 16, 16) == 0.0
    assert pass_at_k(1, 2, 16) == 1.0


def test_rates_fall_into_tenths() -> None:
    assert [rate_bucket(x) for x in (0.0, 0.05, 0.1, 0.5, 0.99, 1.0)] == [
        "0", "0.0 to 0.1", "0.1 to 0.2", "0.5 to 0.6", "0.9 to 1.0", "1",
    ]  # fmt: skip


SFT_ROWS = [
    answered(1, RIGHT, WRONG, pass_rate=0.9),
    answered(2, WRONG, WRONG, pass_rate=0.9),
    answered(3, RIGHT, WRONG, UNCLOSED, CUT, pass_rate=0.5),
    answered(4, WRONG, CUT, pass_rate=0.0),
]


@pytest.mark.parametrize(
    ("keep_wrong", "expected"),
    [
        ("all", ["r1#0", "r1#1", "r2#0", "r2#1", "r3#0", "r3#1", "r4"]),
        ("hard", ["r1", "r3#0", "r3#1", "r4"]),
        ("none", ["r1", "r3"]),
    ],
)
def test_wrong_responses_stay_as_asked(run_curation: RunCuration, keep_wrong: str, expected: list[str]) -> None:
    done = run_curation(
        SFT_ROWS, task="sft", stages=("respond", "difficulty", "correctness"), reward=REWARD,
        correctness={"keep_wrong": keep_wrong},
    )  # fmt: skip
    assert done.ids == expected
    assert done.audit("respond")["tables"]["responses by outcome"] == {"correct": 2, "wrong": 5, "malformed": 3}
    assert done.audit("difficulty")["tables"]["rows by difficulty"] == {"easy": 2, "hard": 2}
    by_id = {r["id"]: r for r in done.rows}
    first = by_id[expected[0]]
    assert first["messages"][-1] == {"role": "assistant", "content": RIGHT}
    assert (first["outcome"], first["difficulty"], first["pass_rate"]) == ("correct", "easy", 0.9)
    if keep_wrong == "hard":
        assert by_id["r4"]["outcome"] == "wrong"
        assert done.audit("correctness")["tables"]["responses dropped"] == {
            "wrong, easy": 3, "malformed": 1, "cut off": 2,
        }  # fmt: skip
        assert done.reasons("correctness") == {"no response left": 1}


def test_unfinished_responses_and_those_without_reference(run_curation: RunCuration) -> None:
    unknown = answered(5, RIGHT)
    del unknown["reference"]
    rows = [answered(3, UNCLOSED, CUT, pass_rate=1.0), unknown, answered(6, RIGHT)]
    kept = run_curation(
        rows, task="sft", stages=("respond", "correctness"), reward=REWARD, correctness={"keep_unfinished": True}
    )
    assert kept.ids == ["r3#0", "r3#1", "r5", "r6"]
    assert kept.rows[2]["outcome"] == "ungraded"
    strict = {"keep_unfinished": True, "keep_wrong": "none"}
    done = run_curation(rows, task="sft", stages=("respond", "correctness"), reward=REWARD, correctness=strict)
    assert done.ids == ["r6"]
    assert done.audit("correctness")["tables"]["responses dropped"] == {
        "wrong, unknown difficulty": 2, "not known to be correct, unknown difficulty": 1,
    }  # fmt: skip


def test_math_for_rl_needs_a_majority(run_curation: RunCuration) -> None:
    rows = [
        answered(1, RIGHT, RIGHT, WRONG),
        answered(2, RIGHT, WRONG),
        answered(3, RIGHT, RIGHT, UNCLOSED, WRONG),
        answered(4, WRONG, WRONG, WRONG),
        {**answered(5, RIGHT), "responses": None},
    ]
    done = run_curation(rows, stages=("solvable",), reward=REWARD, solvable={"k": 2}, teacher={"responses": 4})
    assert done.ids == ["r1"]
    assert set(done.rows[0]) == {"id", "domain", "source", "messages", "reference", "pass_rate"} - {"source"}
    assert done.reasons("solvable") == {"math: share of correct responses not above 0.5": 3}
    assert {r["id"]: r["value"] for r in done.dropped} == {"r2": 0.5, "r3": 0.5, "r4": 0.0}
    assert "has no responses, and teacher.hf_dir names no model" in done.rejects[0]["reason"]


def test_code_problems_need_tests(run_curation: RunCuration) -> None:
    def code(number: int, reference: object) -> dict[str, Any]:
        return {**row(number, f"Program {number}"), "domain": "code", "reference": reference}

    case = {"input": "1", "output": "1"}

    def stdin(count: int) -> dict[str, Any]:
        return {"kind": "stdin", "tests": [case] * count}

    checks = [f"assert add({i}, 1) == {i + 1}" for i in range(20)]
    pytest_code = "".join(f"def test_{i}():\n    assert f() == {i}\n" for i in range(3))
    rows = [
        code(1, stdin(16)), code(2, stdin(15)), code(3, {"kind": "assert", "tests": checks}),
        code(4, {"nothing": 1}), code(5, {"kind": "pytest", "code": pytest_code}), row(6),
    ]  # fmt: skip
    done = run_curation(rows, stages=("tests",))
    assert done.ids == ["r1", "r3", "r6"]
    assert {r["id"]: r["tests"] for r in done.dropped} == {"r2": 15, "r5": 3}
    assert [r["line"] for r in done.rejects] == [4]
    assert done.audit("tests")["tables"]["code problems by number of tests"] == {
        "16 to 31": 2, "8 to 15": 1, "1 to 3": 1,
    }  # fmt: skip


def test_code_for_rl_needs_one_response_that_passes_all_tests(run_curation: RunCuration) -> None:
    tests = {"kind": "stdin", "tests": [{"input": f"{i}", "output": f"{i + 1}"} for i in range(3)]}
    good = "<think>so</think>```python\nprint(int(input()) + 1)\n```"
    part = "<think>so</think>```python\nprint(1)\n```"  # passes the first test only
    none = "<think>so</think>```python\nimport os\nos._exit(0)\n```"

    def code(number: int, *responses: str) -> dict[str, Any]:
        problem = {"domain": "code", "reference": tests, "responses": list(responses)}
        return {**row(number, f"Add one, program {number}"), **problem}

    rows = [code(1, part, none, good), code(2, part, part, none)]
    settings: dict[str, Any] = {
        "stages": ("solvable",), "solvable": {"k": 3}, "teacher": {"responses": 3},
        "code_reward": {"workers": 1}, "input": {"check_references": True},
    }  # fmt: skip
    done = run_curation(rows, **settings)
    assert done.ids == ["r1"]
    assert done.audit("solvable")["tables"]["responses by outcome"] == {"partial": 3, "wrong": 2, "correct": 1}
    assert done.reasons("solvable") == {"code: pass@3 not above 0.5": 1}
    # Few responses of its own say nothing of pass@3, right or wrong; they are not even graded.
    few = [code(3, good), code(4, none, part), code(5, good, good, good)]
    done = run_curation(few, **settings)
    assert done.ids == ["r5"]
    assert done.reasons("solvable") == {"code: brings fewer responses than pass@3 needs": 2}
    assert {r["id"]: r["responses"] for r in done.dropped} == {"r3": 1, "r4": 2}
    assert done.audit("solvable")["tables"]["responses by outcome"] == {"correct": 3}
    # The other reading: a share of responses above one half.
    stricter = {**settings, "solvable": {"k": 3, "code_rule": "pass_rate", "code_above": 0.3}}
    assert run_curation(rows, **stricter).ids == ["r1"]
    assert run_curation(few, **stricter).ids == ["r3", "r5"]
