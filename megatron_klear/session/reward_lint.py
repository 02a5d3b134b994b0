"""Faults of a reward that training would not show: settings, graders and data, judged before any response is sampled.

What is asked of each: that the filter compares what is trained on, that no worse response earns more, that all
responses of a group meet the same tests, that graders seldom fail, and that known answers come out as they are known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_klear.config import Settings
from megatron_klear.data.rows import PromptRow
from megatron_klear.records import Domain, Grade, Prompt, Rollout, RolloutGroup
from megatron_klear.reward import BadTestsError, GradeRequest, parse_problem
from megatron_klear.reward.answers import last_box
from megatron_klear.reward.probes import FORM_REFERENCE, FORMS, Probe, boxed, built_in, fenced, perturbed, rewritten
from megatron_klear.rollout.ledger import scored_group
from megatron_klear.session.grading import Graders
from megatron_klear.session.policy import filtered

_SHOWN = 3

Row = tuple[str, PromptRow]
"""A setting that lists files, and a row of one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LintRow:
    """One thing that was looked at.

    Attributes:
        check: what must hold.
        found: what was found, for people.
        passed: whether it holds.
    """

    check: str
    found: str
    passed: bool


def lint_rewards(
    settings: Settings,
    rows: Sequence[Row],
    graders: Graders,
    *,
    probes: Sequence[Probe] = (),
    max_ungraded: float = 0.01,
) -> list[LintRow]:
    """Judge the rewards of a run.

    Args:
        settings: of the run.
        rows: problems that the settings name, as many as are to be graded.
        graders: made from the same settings.
        probes: of the user, besides the built-in ones.
        max_ungraded: largest share of gold answers that may be ungraded.

    Raises:
        RewardError: no grader can be started.
    """
    domains = frozenset(row.domain for _, row in rows) or frozenset[Domain]({"math"})
    return [
        _filter_row(settings),
        *_order_rows(settings, graders, sorted(domains)),
        *_test_rows(rows),
        *_gold_rows(settings, rows, graders, max_ungraded),
        *_probe_rows(settings, graders, [*built_in(domains), *probes], bool(probes)),
    ]


def _filter_row(settings: Settings) -> LintRow:
    """Put groups through the run's own filter: it must drop those, and only those, whose rewards are all equal."""
    std = settings.algorithm.advantage_std
    groups = {
        "right and wrong": [1.0, 0.0],
        "different partial scores": [0.25, 0.5, 0.25],
        "partial and wrong": [0.5, 0.0],
        "all right": [1.0, 1.0],
        "all wrong": [0.0, 0.0],
        "the same partial scores": [0.25, 0.25],
    }
    made = [
        scored_group(_group(name, rewards), _grades(rewards), normalize_std=std) for name, rewards in groups.items()
    ]
    kept = {g.group.prompt.prompt_id for g in filtered(made, settings.algorithm)}
    check = "groups are filtered by the reward that they are trained on"
    if not settings.algorithm.filter_zero_advantage:
        return LintRow(check=check, found="no filter (algorithm.filter_zero_advantage=false)", passed=True)
    lost = [name for name, rewards in groups.items() if len(set(rewards)) > 1 and name not in kept]
    useless = [name for name, rewards in groups.items() if len(set(rewards)) == 1 and name in kept]
    metric = f"algorithm.filter_metric={settings.algorithm.filter_metric}"
    faults = [f"drops groups of {name}" for name in lost] + [f"keeps groups of {name}" for name in useless]
    return LintRow(check=check, found=f"{metric}: {'; '.join(faults) or 'as it should'}", passed=not faults)


def _group(name: str, rewards: Sequence[float]) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, domain="code", token_ids=np.array([1]), reference="")
    one = Rollout(
        response_ids=np.array([1]),
        rollout_logprobs=np.zeros(1, dtype=np.float32),
        finish_reason="stop",
        policy_versions=((0, 1),),
    )
    return RolloutGroup(prompt=prompt, rollouts=(one,) * len(rewards))


def _grades(rewards: Sequence[float]) -> tuple[Grade, ...]:
    names = {1.0: "correct", 0.0: "wrong"}
    return tuple(Grade(outcome=names.get(reward, "partial"), reward=reward) for reward in rewards)  # type: ignore[arg-type]


def _order_rows(settings: Settings, graders: Graders, domains: Sequence[Domain]) -> Iterator[LintRow]:
    """Grade a response of every form: a worse one must not earn more."""
    for domain in domains:
        forms = FORMS[domain]
        requests = [
            GradeRequest(form, _rewritten(settings, response), FORM_REFERENCE[domain], finish)
            for form, (response, finish) in forms.items()
        ]
        grades = dict(zip(forms, graders.grade_many([(domain, request) for request in requests]), strict=True))
        shown = {form: f"{form} {grade.reward:+.2f} ({grade.outcome})" for form, grade in grades.items()}
        ungraded = [form for form, grade in grades.items() if grade.outcome == "ungraded"]
        wrong, correct = grades["wrong"].reward, grades["correct"].reward
        yield LintRow(
            check=f"{domain}: right answers earn more than wrong ones",
            found=f"{shown['correct']}, {shown['wrong']}",
            passed=correct > wrong and grades["correct"].outcome == "correct" and grades["wrong"].outcome == "wrong",
        )
        if "partial" in grades:
            partial = grades["partial"].reward
            share = wrong + (correct - wrong) / 2 if settings.code_reward.score == "soft" else wrong
            yield LintRow(
                check=f"{domain}: half of the tests passed earns what score={settings.code_reward.score} says",
                found=f"{shown['partial']}, must be {share:+.2f}",
                passed=abs(partial - share) < 1e-9,
            )
        worse = [form for form in forms if form not in ("correct", "partial", "wrong")]
        above = [shown[form] for form in worse if grades[form].reward > wrong]
        yield LintRow(
            check=f"{domain}: nothing cut off, untagged or without an answer earns more than a wrong answer",
            found=", ".join(shown[form] for form in worse),
            passed=not above and not ungraded,
        )


def _test_rows(rows: Sequence[Row]) -> Iterator[LintRow]:
    """The same problem must have the same tests wherever it stands: its responses form one group."""
    references: dict[str, set[str]] = defaultdict(set)
    names: dict[str, list[str]] = defaultdict(list)
    for _, row in rows:
        question = "\n".join(message["content"] for message in row.messages)
        references[question].add(row.reference)
        names[question].append(row.row_id)
    twice = [", ".join(names[question][:_SHOWN]) for question, found in references.items() if len(found) > 1]
    yield LintRow(
        check="a problem has the same answer key or tests wherever it occurs",
        found=f"{len(references)} different problems in {len(rows)} rows" + _examples(twice, "with different keys"),
        passed=not twice,
    )
    code = [row for _, row in rows if row.domain == "code"]
    if not code:
        return
    unusable, unlike = [], []
    for row in code:
        try:
            # Twice, past the cache: what every response of a group is run against must not depend on the draw.
            first, second = (parse_problem.__wrapped__(row.reference).messages() for _ in range(2))
        except BadTestsError as error:
            unusable.append(f"{row.row_id} ({error})")
            continue
        if first != second:
            unlike.append(row.row_id)
    yield LintRow(
        check="code: all responses of a group meet the same tests",
        found=f"{len(code)} problems, every response runs all tests" + _examples(unlike, "whose tests change"),
        passed=not unlike,
    )
    yield LintRow(
        check="code: tests can be used",
        found=f"{len(code)} problems" + _examples(unusable, "cannot be used"),
        passed=not unusable,
    )


def _gold_rows(settings: Settings, rows: Sequence[Row], graders: Graders, max_ungraded: float) -> Iterator[LintRow]:
    """Grade each problem's own answer and another one."""
    requests: list[tuple[Domain, GradeRequest]] = []
    for number, (_, row) in enumerate(rows):
        for kind, response in _gold_and_other(row):
            request = GradeRequest(f"{kind} {number}", _rewritten(settings, response), row.reference)
            requests.append((row.domain, request))
    if not requests:
        return
    found = graders.grade_many(requests)
    grades = {request.request_id: grade for (_, request), grade in zip(requests, found, strict=True)}
    for domain in sorted({domain for domain, _ in requests}):
        numbers = [n for n, (_, row) in enumerate(rows) if row.domain == domain]
        ids = {n: rows[n][1].row_id for n in numbers}
        gold = {n: grades[f"gold {n}"] for n in numbers if f"gold {n}" in grades}
        other = {n: grades[f"other {n}"] for n in numbers if f"other {n}" in grades}
        ungraded = [n for n in other if other[n].outcome == "ungraded" or (n in gold and gold[n].outcome == "ungraded")]
        share = len(ungraded) / max(len(other), 1)
        yield LintRow(
            check=f"{domain}: at most {max_ungraded:.1%} of the problems are ungraded",
            found=f"{share:.1%} of {len(other)}"
            + _examples([f"{ids[n]} ({other[n].reason})" for n in ungraded], "ungraded"),
            passed=share <= max_ungraded,
        )
        bad = [
            f"{ids[n]} ({g.outcome}: {g.reason})" for n, g in gold.items() if g.outcome not in ("correct", "ungraded")
        ]
        yield LintRow(
            check=f"{domain}: the answer key itself is correct",
            found=f"{len(gold)} keys" + _examples(bad, "not correct"),
            passed=not bad,
        )
        bad = [f"{ids[n]} ({g.reason})" for n, g in other.items() if g.outcome == "correct"]
        yield LintRow(
            check=f"{domain}: another answer is not correct",
            found=f"{len(other)} answers" + _examples(bad, "correct"),
            passed=not bad,
        )


def _gold_and_other(row: PromptRow) -> Iterator[tuple[str, str]]:
    """Responses with the key and with another answer; a code problem has a key only if it brings a solution."""
    if row.domain == "math":
        inner, _ = last_box(row.reference)
        yield "gold", boxed(row.reference if inner is None else inner)
        yield "other", boxed(perturbed(row.reference))
        return
    try:
        solution = parse_problem(row.reference).solution
    except BadTestsError:
        solution = None
    if solution is not None:
        yield "gold", fenced(solution)
    yield "other", fenced("pass")


def _probe_rows(settings: Settings, graders: Graders, probes: Sequence[Probe], with_own: bool) -> Iterator[LintRow]:
    requests = [
        GradeRequest(str(n), _rewritten(settings, probe.response), probe.reference, probe.finish_reason)
        for n, probe in enumerate(probes)
    ]
    grades = graders.grade_many([(p.domain, request) for p, request in zip(probes, requests, strict=True)])
    faults = [
        f"{probe.name}: {grade.outcome} ({grade.reason}), must be {' or '.join(probe.expected)}"
        for probe, grade in zip(probes, grades, strict=True)
        if grade.outcome not in probe.expected
    ]
    counts = Counter(probe.domain for probe in probes)
    total = ", ".join(f"{count} {domain}" for domain, count in sorted(counts.items()))
    yield LintRow(
        check="known answers come out as they are known",
        found=f"{total} probes{', yours included' if with_own else ''}" + _examples(faults, "come out otherwise"),
        passed=not faults,
    )


def _rewritten(settings: Settings, response: str) -> str:
    return rewritten(response, settings.tokenizer.think_start, settings.tokenizer.think_end)


def _examples(names: Sequence[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; {len(names)} {what}: {'; '.join(names[:_SHOWN])}{more}"
