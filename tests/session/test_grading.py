"""The graders of a run: prompts that nothing could grade are refused before training, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
from megatron_klear.data import PromptData
from megatron_klear.errors import ConfigError, DataError
from megatron_klear.records import ScoredGroup
from megatron_klear.reward import GradeRequest
from megatron_klear.session.grading import Graders, GraderSettings, require_gradable

MakeGroup = Callable[..., ScoredGroup]
TESTS = '{"kind": "stdin", "tests": [{"input": "2", "output": "4"}, {"input": "3", "output": "9"}]}'
SETTINGS = GraderSettings(
    reward=RewardSettings(workers=1, require_think=False),
    code_reward=CodeRewardSettings(workers=1, sandbox="rlimits", wrong=-0.5, malformed=-0.5),
)


def data(make_group: MakeGroup, **references: str) -> PromptData:
    prompt = make_group("m", [1, -1]).group.prompt
    code = [replace(prompt, prompt_id=name, domain="code", reference=text) for name, text in references.items()]
    return PromptData(prompts=(prompt, *code), dropped_ids=(), fingerprint="")


def test_prompts_whose_tests_cannot_be_used_are_refused_by_name(make_group: MakeGroup) -> None:
    require_gradable(data(make_group), "data.prompts", SETTINGS)
    with pytest.raises(DataError, match=r"(?s)data.heldout: the tests of 2 code prompts .* - b: .* - c: ") as refused:
        require_gradable(data(make_group, a=TESTS, b="[]", c='{"kind": "stdin"}'), "data.heldout", SETTINGS)
    assert " - a:" not in str(refused.value)


def test_a_sandbox_that_cannot_be_made_is_told_before_training(make_group: MakeGroup) -> None:
    require_gradable(data(make_group, a=TESTS), "data.prompts", SETTINGS)
    elsewhere = replace(SETTINGS, code_reward=replace(SETTINGS.code_reward, python="/nowhere/python3"))
    with pytest.raises(ConfigError, match="/nowhere/python3"):
        require_gradable(data(make_group, a=TESTS), "data.prompts", elsewhere)


def test_each_response_is_judged_by_the_grader_of_its_domain_in_order() -> None:
    square, constant = "```python\nprint(int(input()) ** 2)\n```", "```python\nprint(4)\n```"
    asked = [
        ("code", GradeRequest("0", square, TESTS)),
        ("math", GradeRequest("1", r"\boxed{4}", "4")),
        ("code", GradeRequest("2", constant, TESTS)),
        ("math", GradeRequest("3", r"\boxed{5}", "4")),
        ("math", GradeRequest("4", square, "4")),
    ]
    graders = Graders(SETTINGS)
    try:
        grades = graders.grade_many(asked)  # type: ignore[arg-type]
    finally:
        graders.close()
    assert [grade.outcome for grade in grades] == ["correct", "correct", "partial", "wrong", "wrong"]
    # Half of the tests passed: half way between what none and all are worth.
    assert [grade.reward for grade in grades] == [1.0, 1.0, 0.25, -1.0, -1.0]
