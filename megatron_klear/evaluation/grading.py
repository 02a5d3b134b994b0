"""Generations beside their problems, judged by the graders that training uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from megatron_klear.data.rows import PromptRow
from megatron_klear.evaluation.generations import Generation, Rejects
from megatron_klear.evaluation.results import Judged
from megatron_klear.evaluation.writing import Benchmark
from megatron_klear.records import Domain
from megatron_klear.reward import GradeRequest
from megatron_klear.session.grading import Graders, GradingSettings

_AT_A_TIME = 256


def matched(
    generations: Iterable[Generation], benchmarks: Sequence[Benchmark], rejects: Rejects
) -> dict[str, list[Generation]]:
    """Generations by the benchmark whose problem they answer; those that answer none are rejected.

    A generation that names no benchmark belongs to the one that has its problem, if only one has.
    """
    homes: dict[str, list[str]] = defaultdict(list)
    known = {benchmark.name for benchmark in benchmarks}
    for benchmark in benchmarks:
        for row in benchmark.rows:
            homes[row.row_id].append(benchmark.name)
    found: dict[str, list[Generation]] = {benchmark.name: [] for benchmark in benchmarks}
    taken: set[tuple[str, str, int]] = set()
    for made in generations:
        places = homes.get(made.problem_id, [])
        if made.benchmark:
            places = [made.benchmark] if made.benchmark in places else []
        where = f"problem_id {made.problem_id!r}, index {made.index}"
        if not places:
            of = f"benchmark {made.benchmark!r}" if made.benchmark else "the benchmarks that were given"
            rejects.add(where, f"{of} has no problem {made.problem_id!r}; known are {', '.join(sorted(known))}")
        elif len(places) > 1:
            rejects.add(where, f"several benchmarks have this problem ({', '.join(places)}): name one as `benchmark`")
        elif (places[0], made.problem_id, made.index) in taken:
            rejects.add(where, f"benchmark {places[0]!r} has this response already; number responses by `index`")
        else:
            taken.add((places[0], made.problem_id, made.index))
            found[places[0]].append(made)
    return found


def judge(
    benchmark: Benchmark,
    generations: Sequence[Generation],
    graders: Graders,
    on_graded: Callable[[int], None],
) -> list[Judged]:
    """Grade the responses to a benchmark's problems, in their order.

    Args:
        benchmark: the problems.
        generations: responses to them.
        graders: an answer that a grader fails on is `ungraded`.
        on_graded: told how many more were graded, from time to time.

    Raises:
        RewardError: no grader of a domain could be started.
    """
    rows = {row.row_id: row for row in benchmark.rows}
    judged: list[Judged] = []
    for first in range(0, len(generations), _AT_A_TIME):
        some = generations[first : first + _AT_A_TIME]
        grades = graders.grade_many([_request(made, rows[made.problem_id]) for made in some])
        judged += [Judged(generation=made, grade=grade) for made, grade in zip(some, grades, strict=True)]
        on_graded(len(some))
    return judged


def grading_rules(settings: GradingSettings, benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """What answers are graded by, for people: of each domain that the benchmarks have.

    Args:
        settings: of the graders.
        benchmarks: the problems.
    """
    domains = {row.domain for benchmark in benchmarks for row in benchmark.rows}
    reward, code = settings.reward, settings.code_reward
    tags = f"{settings.tokenizer.think_start} ... {settings.tokenizer.think_end}"
    rules = {"thinking part": f"{tags} {'required' if reward.require_think else 'not required'}"}
    if "math" in domains:
        rules["math"] = f"{reward.timeout_seconds:g} s of CPU time"
    if "code" in domains:
        rules["code"] = (
            f"{code.score}, {code.cpu_seconds:g} s of CPU time and {code.wall_seconds:g} s by the clock per test, "
            f"{code.memory_bytes / 2**20:g} MiB, {code.python} in {code.sandbox}"
        )
    return rules


def _request(made: Generation, row: PromptRow) -> tuple[Domain, GradeRequest]:
    name = f"{made.problem_id}#{made.index}"
    return row.domain, GradeRequest(name, made.response, row.reference, made.finish_reason)
