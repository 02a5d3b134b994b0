"""The pool of killable graders: limits, deaths, order, and nothing left behind."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.errors import ConfigError, RewardError
from megatron_klear.records import Grade
from megatron_klear.reward import AnswerFormat, GradeRequest, MathGraderPool, RewardRules, count_outcomes, worker_handle

# 9^(9^9) alone is a minute of one C call that no signal handler can interrupt.
BOMBS = [r"9^{9^9}", r"(10^9)!", r"\binom{10^{10}}{10^9}", "(" * 60 + "5" + ")" * 60]


def boxed(answer: str) -> str:
    return rf"<think>t</think>\boxed{{{answer}}}"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def grade_in_thread(pool: MathGraderPool, items: list[tuple[str, str, str]]) -> Callable[[], list[Grade]]:
    """Start grading; calling the result waits for it."""
    answers: list[list[Grade]] = []
    thread = threading.Thread(target=lambda: answers.append(pool.grade_many(items)))
    thread.start()

    def result() -> list[Grade]:
        thread.join(timeout=60.0)
        assert not thread.is_alive()
        return answers[0]

    return result


@pytest.fixture(scope="module")
def pool() -> Iterator[MathGraderPool]:
    with MathGraderPool(workers=2, timeout_seconds=20.0) as pool:
        yield pool


def test_outcomes_rewards_and_order(pool: MathGraderPool) -> None:
    requests: list[GradeRequest | tuple[str, str, str]] = [
        ("right", boxed("1/2"), "0.5"),
        ("wrong", boxed("1/3"), "0.5"),
        ("untagged", r"\boxed{0.5}", "0.5"),
        ("unboxed", "<think>0.5</think>it is 0.5", "0.5"),
        ("bad gold", boxed("0.5"), "???"),
        ("bad gold, no box", "<think>0.5</think>it is 0.5", "???"),
        GradeRequest("cut off", "<think>0.5", "0.5", "length"),
        GradeRequest("cut off late", boxed("0.5") + " as", "0.5", "length"),
        GradeRequest("interrupted", boxed("0.5"), "0.5", "abort"),
    ]
    grades = pool.grade_many(requests)
    outcomes = ["correct", "wrong", "malformed", "wrong", "ungraded", "ungraded", "malformed", "correct", "ungraded"]
    assert [grade.outcome for grade in grades] == outcomes
    values = {"correct": 1.0, "wrong": -1.0, "malformed": -1.0, "ungraded": 0.0}
    assert [grade.reward for grade in grades] == [values[outcome] for outcome in outcomes]
    assert all(grade.reason for grade in grades)
    assert "no \\boxed" in grades[3].reason
    assert count_outcomes(grades) == {"correct": 2, "wrong": 2, "partial": 0, "malformed": 2, "ungraded": 3}


def test_many_shuffled_items_keep_their_ids(pool: MathGraderPool) -> None:
    requests = [(f"item-{i}", boxed(str(i)), str(i if i % 3 else i + 1)) for i in range(300)]
    expected = {f"item-{i}": "correct" if i % 3 else "wrong" for i in range(300)}
    random.Random(0).shuffle(requests)
    grades = pool.grade_many(requests)
    assert {r[0]: g.outcome for r, g in zip(requests, grades, strict=True)} == expected


def test_rules_and_format_of_a_call_replace_those_of_the_pool(pool: MathGraderPool) -> None:
    rules = RewardRules(correct=3.0, wrong=0.25, malformed=0.0)
    grades = pool.grade_many(
        [("a", "so 5", "5"), ("b", "so 6", "5"), ("c", "<think>", "5")],
        rules=rules,
        answer_format=AnswerFormat(require_think=False, require_box=False),
    )
    assert [(grade.outcome, grade.reward) for grade in grades] == [
        ("correct", 3.0),
        ("wrong", 0.25),
        ("malformed", 0.0),
    ]
    assert pool.grade_many([("a", "so 5", "5")])[0].outcome == "malformed"


def test_strange_texts_end_as_named_outcomes(pool: MathGraderPool) -> None:
    texts = [
        ("nul", boxed("5\x00"), "5"),
        ("surrogate", boxed("\ud800"), "5"),
        ("astral", boxed("\N{GRINNING FACE}" * 4000), "\N{GRINNING FACE}" * 4000),
        ("newlines", boxed("\n5\n"), "5"),
        ("quotes", boxed("\"'`"), "5"),
        ("ten megabytes", "<think>t</think>" + "x" * 10_000_000 + r"\boxed{5}", "5"),
        ("ten megabytes in a box", boxed("1" * 10_000_000), "5"),
    ]
    outcomes = [grade.outcome for grade in pool.grade_many(texts)]
    assert outcomes[1:] == ["wrong", "ungraded", "correct", "wrong", "correct", "wrong"]
    assert outcomes[0] in ("correct", "wrong")


def test_empty_batch_and_repeated_ids(pool: MathGraderPool) -> None:
    assert pool.grade_many([]) == []
    with pytest.raises(RewardError, match="share the id 'a'"):
        pool.grade_many([("a", "", "1"), ("a", "", "1")])


def test_the_grader_is_usable_from_many_threads(pool: MathGraderPool) -> None:
    waiting = [grade_in_thread(pool, [(str(i), boxed(f"{t}{i}"), f"{t}{i}") for i in range(20)]) for t in range(1, 5)]
    assert {grade.outcome for result in waiting for grade in result()} == {"correct"}


def test_workers_load_neither_torch_nor_more_memory_than_allowed() -> None:
    limit = 3 * 2**29
    with MathGraderPool(workers=1, memory_limit_bytes=limit) as pool:
        assert pool.grade_many([("a", boxed("5"), "5")])[0].outcome == "correct"
        (pid,) = pool.worker_pids()
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        assert next(row for row in limits if row.startswith("Max address space")).split()[3:5] == [str(limit)] * 2


def test_bombs_end_at_the_limit_and_their_neighbours_are_graded() -> None:
    bombs = [(bomb, boxed(bomb), "5") for bomb in BOMBS]
    items = [item for i, bomb in enumerate(bombs) for item in (bomb, (f"after {i}", boxed("5"), "5"))]
    with MathGraderPool(workers=2, timeout_seconds=0.6) as pool:
        pool.grade_many([("warm-up", boxed("5"), "5")])
        start = time.monotonic()
        grades = pool.grade_many(items)
        assert time.monotonic() - start < 25.0
    assert {grade.outcome for grade in grades[1::2]} == {"correct"}
    # Some are seen through without computing them; what must not happen is "correct".
    assert {grade.outcome for grade in grades[0:-2:2]} <= {"ungraded", "wrong"}
    assert grades[0].outcome == "wrong"
    assert "the answer took more than 0.6 s of CPU time" in grades[0].reason


@pytest.mark.parametrize("answer", ["5", "6", r"8^{9^9}"])
def test_a_reference_that_is_a_bomb_is_to_blame_for_any_answer(answer: str) -> None:
    with MathGraderPool(workers=1, timeout_seconds=0.6) as pool:
        (grade,) = pool.grade_many([("a", boxed(answer), BOMBS[0])])
    assert grade.outcome == "ungraded"
    assert "the reference took more than 0.6 s of CPU time" in grade.reason


def test_a_machine_that_is_slow_makes_no_answer_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker gets no CPU time: the limit counts that time, and the clock says nothing of an answer."""
    monkeypatch.setattr(worker_handle, "WALL_CLOCK_FACTOR", 2.0)
    with MathGraderPool(workers=1, timeout_seconds=1.0) as pool:
        pool.grade_many([("warm-up", boxed("5"), "5")])
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        result = grade_in_thread(pool, [("a", boxed("1/2"), "0.5")])
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        assert [grade.outcome for grade in result()] == ["correct"]
        os.kill(pid, signal.SIGSTOP)
        (grade,) = pool.grade_many([("b", boxed("2"), "0.5")])
        assert grade.outcome == "ungraded"
        assert "no verdict within 2 s" in grade.reason
        assert pool.grade_many([("c", boxed("1/2"), "0.5")])[0].outcome == "correct"


def test_equal_questions_are_decided_once() -> None:
    with MathGraderPool(workers=1, timeout_seconds=1.0) as pool:
        start = time.monotonic()
        grades = pool.grade_many([(str(i), f"<think>{i}</think>\\boxed{{{BOMBS[0]}}}", "5") for i in range(50)])
        assert time.monotonic() - start < 20.0
    assert {grade.outcome for grade in grades} == {"wrong"}


def test_a_worker_killed_while_grading_is_replaced_and_the_answer_graded() -> None:
    with MathGraderPool(workers=1, timeout_seconds=30.0) as pool:
        pool.grade_many([("warm-up", boxed("5"), "5")])
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)  # so that the question is surely under way when it is killed
        result = grade_in_thread(pool, [("a", boxed("1/2"), "0.5"), ("b", boxed("2"), "0.5")])
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        assert [grade.outcome for grade in result()] == ["correct", "wrong"]
        assert pool.worker_pids() != [pid]


def test_workers_killed_while_idle_cost_nothing(pool: MathGraderPool) -> None:
    assert wait_until(lambda: len(pool.worker_pids()) == 2)
    pool.grade_many([("warm-up", boxed("5"), "5")])
    before = pool.worker_pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not set(before) & set(pool.worker_pids()))
    grades = pool.grade_many([(str(i), boxed(f"{i}/2"), f"{i}/2") for i in range(10)])
    assert {grade.outcome for grade in grades} == {"correct"}


def test_random_kills_lose_no_answer() -> None:
    requests = [(str(i), boxed(f"{i}/7"), f"{i}/7") for i in range(400)]
    with MathGraderPool(workers=2) as pool:
        pool.grade_many([("warm-up", boxed("5"), "5")])
        result = grade_in_thread(pool, requests)
        chance = random.Random(0)
        for _ in range(3):
            time.sleep(0.15)
            for pid in pool.worker_pids()[:1] if chance.random() < 0.5 else pool.worker_pids()[-1:]:
                os.kill(pid, signal.SIGKILL)
        outcomes = count_outcomes(result())
    # A worker may be killed twice on one answer; it may then be ungraded, but never wrong.
    assert outcomes["correct"] + outcomes["ungraded"] == len(requests)
    assert outcomes["ungraded"] <= 2


CRASHING = (
    "import sys; from multiprocessing.connection import Connection; c = Connection(int(sys.argv[2])); "
    "c.send_bytes(b'ready'); c.recv_bytes(); {}"
)


@pytest.mark.parametrize(
    ("last_words", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit status -11"),
        ("import os; os._exit(7)", "exit status 7"),
        ("c.send_bytes(b'nonsense'); c.recv_bytes()", "exit status -9"),
        ('c.send_bytes(b\'[77, "correct", ""]\'); c.recv_bytes()', "answered another question"),
    ],
)
def test_what_kills_every_worker_with_and_without_the_answer_is_ungraded(
    monkeypatch: pytest.MonkeyPatch, last_words: str, why: str
) -> None:
    monkeypatch.setattr(worker_handle, "_BOOT", CRASHING.format(last_words))
    with MathGraderPool(workers=1) as pool:
        (grade,) = pool.grade_many([("a", boxed("5"), "5")])
    assert grade.outcome == "ungraded"
    assert "died 2 times" in grade.reason
    assert why in grade.reason


def test_an_answer_that_crashes_its_workers_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "import os, signal; n = __import__('json').loads(q); " + (
        "os.kill(os.getpid(), signal.SIGSEGV) if n[1] == '5' else None; c.send_bytes(b'[%d, \"wrong\", \"\"]' % n[0])"
    )
    boot = CRASHING.replace("c.recv_bytes(); {}", "q = c.recv_bytes(); {}; c.recv_bytes()")
    monkeypatch.setattr(worker_handle, "_BOOT", boot.format(words))
    with MathGraderPool(workers=1) as pool:
        (grade,) = pool.grade_many([("a", boxed("5"), "5")])
    assert (grade.outcome, grade.reason) == (
        "wrong", "the answer ended its worker, which died 2 times (exit status -11)"
    )  # fmt: skip


def test_workers_that_cannot_start_raise_and_may_recover(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker_handle, "_BOOT", "raise SystemExit('no such library')")
        pool = MathGraderPool(workers=2)
        with pytest.raises(RewardError, match="no such library"):
            pool.grade_many([("a", boxed("5"), "5"), ("b", "malformed", "5"), ("c", boxed("6"), "5")])
        assert pool.grade_many([("a", "malformed", "5")])[0].outcome == "malformed"
    assert pool.grade_many([("a", boxed("5"), "5")])[0].outcome == "correct"
    pool.close()


def test_a_missing_interpreter_is_a_reward_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with MathGraderPool(workers=1) as pool, pytest.raises(RewardError, match="/nonexistent/python"):
        pool.grade_many([("a", boxed("5"), "5")])


def test_one_worker_that_starts_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_first = f"import os; os.close(os.open({str(tmp_path / 'taken')!r}, os.O_CREAT | os.O_EXCL)); "
    monkeypatch.setattr(worker_handle, "_BOOT", only_first + worker_handle._BOOT)
    with MathGraderPool(workers=3) as pool:
        grades = pool.grade_many([(str(i), boxed(str(i)), str(i)) for i in range(40)])
        assert {grade.outcome for grade in grades} == {"correct"}
        assert len(pool.worker_pids()) == 1


def test_close_ends_busy_workers_and_releases_the_waiting() -> None:
    pool = MathGraderPool(workers=2, timeout_seconds=100.0)
    pool.grade_many([("warm-up", boxed("5"), "5")])
    assert wait_until(lambda: len(pool.worker_pids()) == 2)
    pids = pool.worker_pids()
    result = grade_in_thread(pool, [(str(i), boxed(f"{i} + 9^{{9^9}}"), "5") for i in range(1, 6)])
    time.sleep(0.3)
    start = time.monotonic()
    pool.close()
    assert {(grade.outcome, grade.reason) for grade in result()} == {("ungraded", "the grader pool was closed")}
    assert time.monotonic() - start < 10.0
    assert not any(is_running(pid) for pid in pids)
    pool.close()
    with pytest.raises(RewardError, match="closed"):
        pool.grade_many([("a", boxed("5"), "5")])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"workers": 0}, ["reward.workers"]),
        ({"timeout_seconds": 0.0}, ["reward.timeout_seconds"]),
        ({"timeout_seconds": math.nan, "workers": -1}, ["reward.workers", "reward.timeout_seconds"]),
        ({"memory_limit_bytes": 1000}, ["memory of a math grader"]),
    ],
)
def test_impossible_limits_are_refused(values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        MathGraderPool(**values)
    assert [problem.split(":")[0] for problem in caught.value.problems] == names
