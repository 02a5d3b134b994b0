"""The graders of a run, by domain, and what is refused before one begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_klear.config import CodeRewardSettings, RewardSettings, RunSettings, Settings, TokenizerSettings
from megatron_klear.data import ChatTokenizer, PromptData, load_chat_tokenizer
from megatron_klear.errors import ConfigError, DataError
from megatron_klear.records import Prompt, Rollout, RolloutGroup, ScoredGroup
from megatron_klear.reward import GradeRequest
from megatron_klear.session.grading import Graders, grade_requests, require_gradable
from tests.chat_tokenizers import OPENING_TEMPLATE, PLAIN_TEMPLATE, THINKING_TEMPLATE, write_tokenizer

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")

TESTS = json.dumps({"kind": "call", "function": "f", "tests": [{"args": [1], "output": 2}, {"args": [2], "output": 4}]})


def settings(**sections: object) -> Settings:
    run, tokenizer = RunSettings(dir="r"), TokenizerSettings(dir="t", think_start="<a>", think_end="</a>")
    return Settings(run=run, tokenizer=tokenizer, **sections)


def data(*prompts: Prompt) -> PromptData:
    return PromptData(prompts=prompts, dropped_ids=(), fingerprint="")


@needs_bubblewrap
def test_each_domain_has_its_graders_and_the_order_is_kept() -> None:
    code = CodeRewardSettings(workers=1, correct=4.0, wrong=-1.0, malformed=-2.0)
    graders = Graders(settings(reward=RewardSettings(workers=1, correct=3.0), code_reward=code))
    requests = [
        GradeRequest("a", r"<a>t</a>\boxed{2}", "2"),
        GradeRequest("b", "<a>t</a>\n```\ndef f(x): return 2 * x\n```", TESTS),
        GradeRequest("c", r"<a>t</a>\boxed{3}", "2"),
        GradeRequest("d", "<a>t</a>\n```\ndef f(x): return 2\n```", TESTS),
        GradeRequest("e", "```\ndef f(x): return 2 * x\n```", TESTS),
    ]
    grades = graders.grade_many(list(zip(["math", "code", "math", "code", "code"], requests, strict=True)))
    graders.close()
    assert [(g.outcome, g.reward) for g in grades] == [
        ("correct", 3.0), ("correct", 4.0), ("wrong", -1.0), ("partial", 1.5), ("malformed", -2.0),
    ]  # fmt: skip


def test_prompts_whose_tests_cannot_be_used_are_refused_by_name(make_group: Callable[..., ScoredGroup]) -> None:
    math_prompt = make_group("m", [1, -1]).group.prompt
    bad = [
        replace(math_prompt, prompt_id=f"c{i}", domain="code", reference='{"kind": "stdin", "tests": []}')
        for i in range(9)
    ]
    with pytest.raises(
        DataError, match=r"data.prompts: the tests of 9 code prompts.*\n  - c0: .*tests: List"
    ) as caught:
        require_gradable(data(math_prompt, *bad), "data.prompts", settings())
    assert "and 1 more" in str(caught.value)
    require_gradable(data(math_prompt), "data.prompts", settings(code_reward=CodeRewardSettings(python="/nonexistent")))


def test_a_machine_without_a_sandbox_is_refused_before_anything_starts(make_group: Callable[..., ScoredGroup]) -> None:
    prompt = replace(make_group("m", [1, -1]).group.prompt, prompt_id="c", domain="code", reference=TESTS)
    broken = settings(code_reward=CodeRewardSettings(python="/nonexistent", sandbox="rlimits"))
    with pytest.raises(ConfigError) as caught:
        require_gradable(data(prompt), "data.prompts", broken)
    assert caught.value.problems[0].startswith("code_reward.python: /nonexistent")
    require_gradable(data(prompt), "data.prompts", settings(code_reward=CodeRewardSettings(sandbox="rlimits")))


def responses(chat: ChatTokenizer, *texts: str) -> RolloutGroup:
    """What a model wrote: its tokens alone, with the end of its turn."""
    asked = chat.encode_prompt([{"role": "user", "content": "2 + 5?"}])
    return RolloutGroup(
        prompt=Prompt(prompt_id="p", domain="math", token_ids=asked, reference="7"),
        rollouts=tuple(
            Rollout(
                response_ids=np.array([*chat.encode(text), chat.end_of_turn_id]),
                rollout_logprobs=np.zeros(len(chat.encode(text)) + 1, dtype=np.float32),
                finish_reason="stop",
                policy_versions=((0, len(chat.encode(text)) + 1),),
            )
            for text in texts
        ),
    )


INSIDE = ("so it is.\n</think>\n\n\\boxed{7}", "so it is.\n</think>\n\n\\boxed{8}")
"""Right and wrong, of a model that begins inside its thinking."""


@pytest.mark.parametrize("require_think", [True, False])
@pytest.mark.parametrize(
    ("template", "written", "outcomes"),
    [
        (OPENING_TEMPLATE, INSIDE, ["correct", "wrong"]),
        # Opened again, never closed; and answered without a word of thinking, which the open tag makes part of it.
        (OPENING_TEMPLATE, ("<think>\n" + INSIDE[0], "so \\boxed{7}", "\\boxed{7}"), ["malformed"] * 3),
        (THINKING_TEMPLATE, tuple("<think>\n" + text for text in INSIDE), ["correct", "wrong"]),
        (THINKING_TEMPLATE, (*INSIDE, "<think>\nso \\boxed{7}"), ["malformed"] * 3),
        (PLAIN_TEMPLATE, tuple("<think>\n" + text for text in INSIDE), ["correct", "wrong"]),
    ],
)
def test_responses_are_graded_with_what_the_chat_template_opens_for_them(
    tmp_path: Path, template: str, written: tuple[str, ...], outcomes: list[str], require_think: bool
) -> None:
    chat = load_chat_tokenizer(write_tokenizer(tmp_path / "tokenizer", template))
    reward = RewardSettings(workers=1, timeout_seconds=20.0, malformed=-2.0, require_think=require_think)
    run = Settings(run=RunSettings(dir="r"), tokenizer=TokenizerSettings(dir="t"), reward=reward)
    graders = Graders(run)
    grades = graders.grade_many(grade_requests(chat, [responses(chat, *written)]))
    if not (require_think or template == OPENING_TEMPLATE):
        untagged = graders.grade_many(grade_requests(chat, [responses(chat, "\\boxed{7}")]))
        assert [grade.outcome for grade in untagged] == ["correct"]
    graders.close()
    worth = {"correct": 1.0, "wrong": -1.0, "malformed": -2.0}
    assert [(grade.outcome, grade.reward) for grade in grades] == [(outcome, worth[outcome]) for outcome in outcomes]
