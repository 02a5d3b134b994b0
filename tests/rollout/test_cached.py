"""Responses are drawn once, whatever is killed, damaged, reordered or asked for again."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Prompt, Rollout, RolloutGroup
from megatron_klear.rollout import LocalEngine, RolloutProgress, SamplingParams
from megatron_klear.rollout.cached import CachedSampler
from megatron_klear.rollout.response_cache import ResponseCache, response_key

SAMPLING = SamplingParams(temperature=0.7, top_p=0.9, max_response_tokens=12, stop_token_ids=(3,))


@dataclass
class Counting:
    """An engine that answers with its request's number and notes what it was asked; may fail after some responses."""

    asked: list[tuple[int, ...]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    fail_after: int | None = None

    def generate(self, prompts: Sequence[Prompt], *, num_responses, sampling, seed, on_progress=None, on_rollout=None):
        self.calls.append(len(prompts))
        groups = []
        for prompt in prompts:
            if self.fail_after is not None and len(self.asked) == self.fail_after:
                raise RolloutError("the engine is lost")
            self.asked.append(tuple(prompt.token_ids.tolist()))
            number = len(self.asked)
            rollout = Rollout(
                response_ids=np.array([number, 3]),
                rollout_logprobs=np.array([-0.5, -1.25], np.float32),
                finish_reason="stop",
                policy_versions=((7, 2),),
            )
            on_rollout(prompt, 0, rollout)
            groups.append(RolloutGroup(prompt=prompt, rollouts=(rollout,) * num_responses))
            if on_progress is not None:
                on_progress(
                    RolloutProgress(finished_responses=len(groups), total_responses=0, generated_tokens=2 * len(groups))
                )
        return groups


def prompts(*tokens: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{i}", domain="math", token_ids=np.array([t, 5]), reference="") for i, t in
            enumerate(tokens)]  # fmt: skip


def numbers(groups: Sequence[RolloutGroup]) -> list[list[int]]:
    return [[int(r.response_ids[0]) for r in group.rollouts] for group in groups]


def sampler(engine: object, cache: ResponseCache, **changes: object) -> CachedSampler:
    options = {"model": "m", "sampling": SAMPLING, "seed": 1} | changes
    return CachedSampler(engine, cache, **options)  # type: ignore[arg-type]


def test_nothing_is_drawn_twice(tmp_path: Path) -> None:
    engine = Counting()
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        first = list(sampler(engine, cache).sample(prompts(1, 2), num_responses=3))
        assert numbers(first) == [[1, 2, 3], [4, 5, 6]]
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        again = sampler(engine, cache)
        # Fewer, more, another order, another id, a repeated prompt: the same responses by prompt and index.
        assert numbers(list(again.sample(prompts(2, 1), num_responses=2))) == [[4, 5], [1, 2]]
        assert numbers(list(again.sample(prompts(1, 1), num_responses=4))) == [[1, 2, 3, 7], [1, 2, 3, 7]]
        assert (again.drawn, len(cache)) == (1, 7)
    assert sorted(engine.asked) == [(1, 5)] * 4 + [(2, 5)] * 3
    kept = first[0].rollouts[1]
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        found = next(sampler(engine, cache).sample(prompts(1), num_responses=2)).rollouts[1]
    assert found.response_ids.tolist() == kept.response_ids.tolist()
    assert found.rollout_logprobs.tobytes() == kept.rollout_logprobs.tobytes()
    assert (found.finish_reason, found.policy_versions) == (kept.finish_reason, kept.policy_versions)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"seed": 2},
        {"sampling": replace(SAMPLING, temperature=0.8)},
        {"sampling": replace(SAMPLING, top_p=0.95)},
        {"sampling": replace(SAMPLING, max_response_tokens=13)},
        {"sampling": replace(SAMPLING, stop_token_ids=(3, 4))},
    ],
)
def test_whatever_a_response_depends_on_is_part_of_its_key(tmp_path: Path, changes: dict[str, object]) -> None:
    engine = Counting()
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        list(sampler(engine, cache).sample(prompts(1), num_responses=1))
        other = sampler(engine, cache, **changes)
        list(other.sample(prompts(1), num_responses=1))
        assert other.drawn == 1


def test_a_failure_keeps_what_was_complete_and_the_next_run_draws_the_rest(tmp_path: Path) -> None:
    engine = Counting(fail_after=5)
    with ResponseCache(tmp_path / "c.sqlite") as cache, pytest.raises(RolloutError, match="lost"):
        list(sampler(engine, cache).sample(prompts(1, 2, 3), num_responses=3))
    engine.fail_after = None
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        done = list(sampler(engine, cache).sample(prompts(1, 2, 3), num_responses=3))
    assert numbers(done) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert len(engine.asked) == 9


@pytest.mark.parametrize("column", ["token_ids", "logprobs", "finish_reason", "versions", "key"])
def test_a_damaged_response_is_drawn_anew(tmp_path: Path, column: str) -> None:
    engine = Counting()
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        list(sampler(engine, cache).sample(prompts(1, 2), num_responses=1))
    damaged, other = (response_key("m", np.array([t, 5]), SAMPLING, seed=1, index=0) for t in (1, 2))
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        if column == "key":  # a response under the key of another
            connection.execute("DELETE FROM responses WHERE key = ?", (other,))
            connection.execute("UPDATE responses SET key = ? WHERE key = ?", (other, damaged))
            damaged = other
        else:  # half of it, as a torn page would leave it
            half = f"substr({column}, 1, length({column}) / 2)"
            connection.execute(f"UPDATE responses SET {column} = {half} WHERE key = ?", (damaged,))
    connection.close()
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        drawn = list(sampler(engine, cache).sample(prompts(2 if column == "key" else 1), num_responses=1))
        assert (numbers(drawn), cache.damaged) == ([[3]], 1)
        assert numbers(list(sampler(engine, cache).sample(prompts(2 if column == "key" else 1), num_responses=1))) == [
            [3]
        ]


def test_chunks_bound_what_is_asked_for_at_once_and_progress_counts_all(tmp_path: Path) -> None:
    engine, told = Counting(), []
    with ResponseCache(tmp_path / "c.sqlite") as cache:
        list(sampler(engine, cache).sample(prompts(4), num_responses=2))
        groups = sampler(engine, cache, chunk_responses=4).sample(
            prompts(*range(1, 12)), num_responses=2, on_progress=told.append
        )
        assert [len(group.rollouts) for group in groups] == [2] * 11
    assert max(engine.calls) <= 4
    assert sum(engine.calls) == 22
    finished = [progress.finished_responses for progress in told]
    assert finished == sorted(finished)
    assert (told[-1].finished_responses, told[-1].total_responses, told[-1].generated_tokens) == (22, 22, 40)


def test_unusable_files_are_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "c.sqlite"
    with ResponseCache(file), pytest.raises(RolloutError, match=r"in use: process \d+ .* choose another teacher.cache"):
        ResponseCache(file, setting="teacher.cache")
    (tmp_path / "noise").write_bytes(os.urandom(8192))
    with pytest.raises(RolloutError, match="cache of responses cannot be used"):
        ResponseCache(tmp_path / "noise")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(RolloutError, match="is no cache of responses"):
        ResponseCache(tmp_path / "other")
    aborted = Rollout(
        response_ids=np.array([1]), rollout_logprobs=np.zeros(1, np.float32), finish_reason="abort",
        policy_versions=((0, 1),),
    )  # fmt: skip
    with ResponseCache(file) as cache, pytest.raises(RolloutError, match="not complete"):
        cache.put(b"k", aborted)


KILLED = """
import sys, time, numpy as np
from megatron_klear.records import Rollout
from megatron_klear.rollout.response_cache import ResponseCache
with ResponseCache(sys.argv[1]) as cache:
    for i in range(10**9):
        n = 2000
        logprobs = np.full(n, -i, np.float32)
        rollout = Rollout(response_ids=np.full(n, i), rollout_logprobs=logprobs, finish_reason="stop",
                          policy_versions=((i, n),))
        cache.put(i.to_bytes(16, "little"), rollout)
        print(i, flush=True)
"""


def test_a_kill_while_writing_leaves_every_finished_response_and_no_half_one(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(200):
        writer.stdout.readline()
    time.sleep(0.003)
    writer.send_signal(signal.SIGKILL)
    last = [int(line) for line in writer.communicate()[0].splitlines()][-1]
    with ResponseCache(tmp_path / "c") as cache:
        assert last + 1 <= len(cache) <= last + 2  # the one under way may have been complete
        for i in range(len(cache)):
            rollout = cache.get(i.to_bytes(16, "little"))
            assert rollout is not None
            assert rollout.response_ids.tolist() == [i] * 2000
        assert cache.damaged == 0


def test_the_local_engine_draws_the_same_whatever_was_there_before(
    tmp_path: Path,
    make_reference: Callable[..., object],
    make_engine: Callable[..., LocalEngine],
    make_prompts: Callable[..., list[Prompt]],
) -> None:
    engine = make_engine(make_reference(), batch_responses=4)
    asked = make_prompts(5, 9, 2)
    with ResponseCache(tmp_path / "whole") as cache:
        whole = list(sampler(engine, cache).sample(asked, num_responses=3))
    with ResponseCache(tmp_path / "parts") as cache:
        list(sampler(engine, cache).sample(asked[1:2], num_responses=1))
        parts = list(sampler(engine, cache, chunk_responses=2).sample(asked[::-1], num_responses=3))[::-1]
    tokens = [[r.response_ids.tolist() for r in group.rollouts] for group in whole]
    assert tokens == [[r.response_ids.tolist() for r in group.rollouts] for group in parts]
    assert all(len(set(map(tuple, group))) > 1 for group in tokens)
