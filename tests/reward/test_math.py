"""Grading one answer, and the gold answers of data sets that others made."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from importlib.resources import files

import pytest
import reasoning_gym

from megatron_klear.records import Grade
from megatron_klear.reward import AnswerFormat, MathGraderPool, RewardRules, grade_math, worker_handle
from megatron_klear.reward import math as grading
from megatron_klear.reward.probes import boxed, perturbed

TASKS = [
    "chain_sum", "gcd", "lcm", "products", "leg_counting", "fraction_simplification", "decimal_chain_sum",
    "basic_arithmetic", "count_bits", "decimal_arithmetic", "dice", "gsm_symbolic", "number_sequence",
    "simple_equations", "simple_geometry", "coin_flip",
]  # fmt: skip


def outcomes_of(golds: list[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How the gold answers are graded against themselves, and how other answers in the same notation are."""
    requests = [(f"gold {name}", boxed(gold), gold) for name, gold in golds]
    requests += [(f"perturbed {name}", boxed(perturbed(gold)), gold) for name, gold in golds]
    with MathGraderPool(workers=2, timeout_seconds=20.0) as pool:
        grades = pool.grade_many(requests)
    counts: dict[str, Counter[str]] = {"gold": Counter(), "perturbed": Counter()}
    for request, grade in zip(requests, grades, strict=True):
        counts[request[0].split()[0]][grade.outcome] += 1
    return {kind: dict(found) for kind, found in counts.items()}


def test_one_answer() -> None:
    response = r"<think>\boxed{3}</think>The sum is \boxed{\frac{1}{2}}."
    assert grade_math(response, "0.5").outcome == "correct"
    assert grade_math(response, "3").outcome == "wrong"
    assert grade_math(response[7:], "0.5").outcome == "malformed"
    assert grade_math(response, "???").outcome == "ungraded"


def test_settings_of_a_call() -> None:
    rules = RewardRules(correct=2.0, wrong=0.0, malformed=-0.5)
    tags = AnswerFormat(think_start="[t]", think_end="[/t]")
    assert grade_math(r"[t]t[/t]\boxed{5}", "5", rules=rules, answer_format=tags).reward == 2.0
    assert grade_math(r"[t]t[/t]\boxed{6}", "5", rules=rules, answer_format=tags).reward == 0.0
    assert grade_math(r"t</think>\boxed{5}", "5", rules=rules).reward == -0.5
    assert grade_math(r"<think>t</think>\boxed{5}", "5", finish_reason="abort", rules=rules).reward == 0.0


def test_a_bomb_in_another_thread_is_wrong_and_the_next_answer_is_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_shared", (os.getpid(), MathGraderPool(workers=1, timeout_seconds=1.0)))
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.append(grade_math(r"<think>t</think>\boxed{9^{9^9}}", "5")))
    thread.start()
    thread.join()
    assert grades[0].outcome == "wrong"
    assert grade_math(r"<think>t</think>\boxed{5}", "5").outcome == "correct"


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_grades_with_a_worker_of_its_own() -> None:
    assert grade_math(r"<think>t</think>\boxed{5}", "5").outcome == "correct"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if grade_math(r"<think>t</think>\boxed{5}", "5").outcome == "correct" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert grade_math(r"<think>t</think>\boxed{6}", "6").outcome == "correct"


def test_a_grader_that_cannot_start_is_ungraded_not_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_shared", None)
    monkeypatch.setattr(worker_handle, "_BOOT", "raise SystemExit('broken installation')")
    grade = grade_math(r"<think>t</think>\boxed{5}", "5")
    assert (grade.outcome, grade.reward) == ("ungraded", 0.0)
    assert "broken installation" in grade.reason


def test_gold_answers_of_reasoning_gym_are_correct_and_perturbed_ones_wrong() -> None:
    """Numbers, fractions, LaTeX, decimals, percentages and dates of generated problems."""
    golds = [
        (f"{task} {index}", str(row["answer"]).strip())
        for task in TASKS
        for index, row in enumerate(reasoning_gym.create_dataset(task, size=12, seed=7))
    ]
    assert len(golds) == 12 * len(TASKS)
    assert outcomes_of(golds) == {"gold": {"correct": len(golds)}, "perturbed": {"wrong": len(golds)}}


def test_gold_answers_of_champ_are_correct_and_perturbed_ones_wrong() -> None:
    """270 problems: formulas, intervals, tuples, words; keys without a reading are ungraded, never wrong."""
    rows = json.loads((files("champ_dataset") / "dataset_files" / "v0.json").read_text("utf-8"))["problems"]
    golds = [(name, row["_raw_answer"].replace("@@", "")) for name, row in rows.items()]
    unread = {
        "P_Polynomial_46",  # x(x-1)(x-2)...(x-2022)
        "P_Sequence_43",  # Yes, and the sequence is 1/2^3, 1/2^6, 1/2^9, ...
    }
    counts = outcomes_of([(name, gold) for name, gold in golds if name not in unread])
    assert len(golds) == 270
    assert counts == {"gold": {"correct": 268}, "perturbed": {"wrong": 268}}
    counts = outcomes_of([(name, gold) for name, gold in golds if name in unread])
    assert counts == {"gold": {"ungraded": 2}, "perturbed": {"ungraded": 2}}
