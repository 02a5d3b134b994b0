"""Faults of a reward that training would not show: settings, graders and data, judged before any response is sampled.

What is asked of each: that the filter compares what is trained on, that no worse response earns more, that all
responses of a group meet the same tests, that graders seldom fail, and that known answers come out as they are known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from megatron_klear.config import Settings
from megatron_klear.data.chat import ChatTokenizer, ConversationError
from megatron_klear.data.rows import PromptRow
from megatron_klear.records import Domain, Grade, Prompt, Rollout, RolloutGroup
from megatron_klear.reward import BadTestsError, GradeRequest, parse_problem
from megatron_klear.reward.answers import last_box
from megatron_klear.reward.code_tests import CodeProblem, met_tests
from megatron_klear.reward.code_worker import limits_of
from megatron_klear.reward.probes import (
    FORM_REFERENCE,
    FORMS,
    Probe,
    boxed,
    built_in,
    fenced,
    in_lines,
    perturbed,
    rewritten,
)
from megatron_klear.rollout.ledger import scored_group
from megatron_klear.session.answer_keys import SHOWN, AnswerKeys, Row
from megatron_klear.session.grading import Graders, code_limits, grade_requests
from megatron_klear.session.policy import filtered

_GROUPS = 64
"""Code problems, taken evenly, of which a whole group is graded."""
_PROGRAMS = ("pass", "pass  # another", "print(0)", "def other():\n    return 0")
"""Responses of a group: different texts, so that each is graded by itself."""


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
    chat: ChatTokenizer,
    *,
    probes: Sequence[Probe] = (),
    max_ungraded: float = 0.01,
) -> list[LintRow]:
    """Judge the rewards of a run.

    Args:
        settings: of the run.
        rows: problems that the settings name, as many as are to be graded.
        graders: made from the same settings.
        chat: the run's tokenizer.
        probes: of the user, besides the built-in ones.
        max_ungraded: largest share of gold answers that may be ungraded.

    Raises:
        RewardError: no grader can be started.
    """
    domains = frozenset(row.domain for _, row in rows) or frozenset[Domain]({"math"})
    return [
        _filter_row(settings),
        *_template_rows(chat, graders, sorted(domains)),
        *_order_rows(settings, graders, chat, sorted(domains)),
        *_same_test_rows(settings, rows, graders, chat),
        *_gold_rows(rows, graders, chat, max_ungraded),
        *_probe_rows(graders, chat, [*built_in(domains), *probes], bool(probes)),
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


def _template_rows(chat: ChatTokenizer, graders: Graders, domains: Sequence[Domain]) -> Iterator[LintRow]:
    """Grade the tokens of a right answer, as the template has the model write them, by the run's own way to its text.

    All else that is graded here is text with both thinking tags, which a run has only by that way.
    """
    for domain in domains:
        try:
            group = _answered(chat, domain)
        except ConversationError as error:  # a model that cannot write this answer may be able to write others
            found, passed = f"cannot be told of this tokenizer: {error}", True
        else:
            (grade,) = graders.grade_many(grade_requests(chat, [group]))
            opened = f"the template opens {chat.opening!r}" if chat.opening else "the template opens nothing"
            found, passed = f"{opened}; {grade.outcome} ({grade.reason})", grade.outcome == "correct"
        yield LintRow(
            check=f"{domain}: a right answer in the form of the chat template is correct", found=found, passed=passed
        )


def _answered(chat: ChatTokenizer, domain: Domain) -> RolloutGroup:
    """A prompt with the tokens of a right answer to it.

    Raises:
        ConversationError: the tokenizer cannot spell it.
    """
    response, finish_reason = FORMS[domain]["correct"]
    content = rewritten(in_lines(response), chat.think_start, chat.think_end)
    asked = {"role": "user", "content": "why?"}
    (encoded,) = chat.encode_conversations([[asked, {"role": "assistant", "content": content}]])
    if isinstance(encoded, ConversationError):
        raise encoded
    ((start, end),) = encoded.trained_spans
    rollout = Rollout(
        response_ids=encoded.token_ids[start:end].astype(np.int64),
        rollout_logprobs=np.zeros(end - start, dtype=np.float32),
        finish_reason=finish_reason,
        policy_versions=((0, end - start),),
    )
    prompt = Prompt(
        prompt_id=f"template {domain}", domain=domain, token_ids=chat.encode_prompt([asked]),
        reference=FORM_REFERENCE[domain],
    )  # fmt: skip
    return RolloutGroup(prompt=prompt, rollouts=(rollout,))


def _order_rows(
    settings: Settings, graders: Graders, chat: ChatTokenizer, domains: Sequence[Domain]
) -> Iterator[LintRow]:
    """Grade a response of every form: a worse one must not earn more."""
    for domain in domains:
        forms = FORMS[domain]
        requests = [
            GradeRequest(form, _as_graded(chat, response), FORM_REFERENCE[domain], finish)
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


def key_rows(keys: AnswerKeys) -> Iterator[LintRow]:
    """What all rows of the files must have in common, seen one by one before any is graded."""
    yield LintRow(
        # Its responses form one group, wherever it stands.
        check="a problem has the same answer key or tests wherever it occurs",
        found=f"{keys.questions} different problems in all {keys.rows} rows"
        + _counted(keys.num_unlike, keys.unlike, "with different keys"),
        passed=not keys.num_unlike,
    )
    if keys.code:
        yield LintRow(
            check="code: tests can be used",
            found=f"all {keys.code} problems" + _counted(keys.num_unusable, keys.unusable, "cannot be used"),
            passed=not keys.num_unusable,
        )


def _same_test_rows(
    settings: Settings, rows: Sequence[Row], graders: Graders, chat: ChatTokenizer
) -> Iterator[LintRow]:
    """Grade groups of different programs, then the same groups again: all must be scored by all tests of the row.

    Every grade says which tests it comes from (`Grade.tests`), so that tests drawn at random, fewer of them, another
    order or other limits show, whichever worker graded and whenever.
    """
    problems: list[tuple[PromptRow, CodeProblem]] = []
    for _, row in rows:
        if row.domain == "code":
            with suppress(BadTestsError):  # another row's business
                problems.append((row, parse_problem(row.reference)))
    if not problems:
        return
    groups = problems[:: -(-len(problems) // _GROUPS)]
    requests: list[tuple[Domain, GradeRequest]] = []
    for number, (row, problem) in enumerate(groups):
        programs = [*_PROGRAMS, *([problem.solution] if problem.solution else [])]
        for member, program in enumerate(programs):
            response = _as_graded(chat, fenced(program))
            requests.append(("code", GradeRequest(f"{number} {member}", response, row.reference)))
    met: dict[int, list[str]] = defaultdict(list)
    for _ in range(2):
        for (_, request), grade in zip(requests, graders.grade_many(requests), strict=True):
            if grade.outcome != "ungraded":  # another row's business
                met[int(request.request_id.split()[0])].append(grade.tests)
    faults: list[str] = []
    for number, (row, problem) in enumerate(groups):
        limits = limits_of(problem, code_limits(settings.code_reward))
        wanted = met_tests(problem, problem.messages(), limits)
        odd = [tests for tests in met[number] if tests != wanted]
        if odd:
            others = ", ".join(sorted({tests or "tests that the grader does not name" for tests in odd})[:SHOWN])
            faults.append(f"{row.row_id} (has {wanted}; {len(odd)} of {len(met[number])} gradings met {others})")
    yield LintRow(
        check="code: all responses of a group meet the same tests",
        found=f"{len(groups)} groups of {len(_PROGRAMS)} responses and more, graded twice"
        + _examples(faults, "whose responses met other tests"),
        passed=not faults,
    )


def _gold_rows(rows: Sequence[Row], graders: Graders, chat: ChatTokenizer, max_ungraded: float) -> Iterator[LintRow]:
    """Grade each problem's own answer and another one."""
    requests: list[tuple[Domain, GradeRequest]] = []
    for number, (_, row) in enumerate(rows):
        for kind, response in _gold_and_other(row):
            request = GradeRequest(f"{kind} {number}", _as_graded(chat, response), row.reference)
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


def _probe_rows(graders: Graders, chat: ChatTokenizer, probes: Sequence[Probe], with_own: bool) -> Iterator[LintRow]:
    requests = [
        GradeRequest(str(n), _as_graded(chat, probe.response), probe.reference, probe.finish_reason)
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


def _as_graded(chat: ChatTokenizer, response: str) -> str:
    """A written response with the run's markers, and opened by the template where it does not open itself."""
    text = rewritten(response, chat.think_start, chat.think_end)
    return text if text.lstrip().startswith(chat.think_start) else chat.opening + text


def _examples(names: Sequence[str], what: str) -> str:
    return _counted(len(names), names, what)


def _counted(count: int, names: Sequence[str], what: str) -> str:
    if not count:
        return ""
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return f"; {count} {what}: {'; '.join(names[:SHOWN])}{more}"
