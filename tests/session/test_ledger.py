"""What a step without the manager takes from the ledger of an earlier life, and what it draws anew."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_klear import parallel
from megatron_klear.config import (
    ModelSettings,
    ParallelSettings,
    RewardSettings,
    RlSettings,
    RolloutSettings,
    RunSettings,
    SchedulingSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.data import DataCursor
from megatron_klear.errors import CheckpointError, RolloutError
from megatron_klear.records import Grade, ParallelContext, Prompt, RolloutGroup, ScoredGroup
from megatron_klear.rollout import RolloutCallback
from megatron_klear.rollout.ledger import LEDGER_FILE, Ledger, LedgerPosition, LedgerReader, position, reconcile
from megatron_klear.rollout.ledger.terms import enforce
from megatron_klear.session.finished_groups import DIRECTORY, FinishedGroups
from megatron_klear.session.launch import Preempted
from megatron_klear.session.ledger import RunLedger
from megatron_klear.session.terms import run_terms


def chat(stop_ids: tuple[int, ...] = (7,), opening: str = "") -> Any:
    return SimpleNamespace(stop_ids=stop_ids, opening=opening)


CHAT = chat()
STEP = 3
"""The step to train; its responses must be sampled by weights of version 2."""

FOUND: dict[str, tuple[tuple[int, int], ...]] = {
    "current": ((2, 4),),
    "older": ((1, 4),),
    "continued": ((1, 2), (2, 2)),
}
"""Prompts that an asynchronous life of the run has left graded, and the versions of their tokens."""


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


class Data:
    """Prompts in the order of the walk."""

    fingerprint = "data"

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)


def settings_of(root: Path, **changed: Any) -> Settings:
    (root / "tokenizer").mkdir(exist_ok=True)
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    sections = {
        "run": RunSettings(dir=str(root)),
        "tokenizer": TokenizerSettings(dir=str(root / "tokenizer")),
        "model": ModelSettings(preset="qwen3-tiny"),
        "rl": RlSettings(prompts_per_step=4, minibatch_prompts=4),
        "rollout": RolloutSettings(responses_per_prompt=2),
    }
    return Settings(**{**sections, **changed})


def leave_graded(ledger: Ledger, group: ScoredGroup, versions: tuple[tuple[int, int], ...]) -> None:
    """Two responses with log-probabilities that tell them from those that are drawn anew."""
    [group_id] = ledger.reserve([(0, group.group.prompt)], num_responses=2)
    for index, rollout in enumerate(group.group.rollouts):
        logprobs = rollout.rollout_logprobs - 1.0
        ledger.save_response(group_id, index, replace(rollout, policy_versions=versions, rollout_logprobs=logprobs))
    ledger.save_grades(group_id, group.grades)


def test_only_responses_of_the_weights_before_the_step_are_recalled(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path
) -> None:
    groups = {name: make_group(name, [1, -1], lengths=[4, 4]) for name in (*FOUND, "missing")}
    fresh = {
        name: replace(
            g, group=replace(g.group, rollouts=tuple(replace(r, policy_versions=((2, 4),)) for r in g.group.rollouts))
        )
        for name, g in groups.items()
    }
    settings = settings_of(tmp_path)
    with Ledger(tmp_path / LEDGER_FILE) as ledger:
        enforce(ledger, run_terms(settings, CHAT), step=0, num_responses=2)
        for name, versions in FOUND.items():
            leave_graded(ledger, groups[name], versions)
    session = SimpleNamespace(
        chat=CHAT,
        settings=settings,
        context=context,
        root=tmp_path,
        resumed=None,
        step=STEP - 1,
    )
    prompts = Data([group.group.prompt for group in groups.values()])
    drawn: list[str] = []

    def generate(missing: list[Prompt], *, step: int, on_rollout: object) -> list[Prompt]:
        assert step == STEP
        drawn.extend(prompt.prompt_id for prompt in missing)
        return missing

    rollouts = SimpleNamespace(generate=generate, score=lambda missing, mine: [fresh[p.prompt_id] for p in mine])
    cursor = DataCursor(4, 4, seed=0, shuffle=False)
    with RunLedger(session, prompts) as source:  # type: ignore[arg-type]
        step = source.groups(STEP, cursor, rollouts)  # type: ignore[arg-type]
    assert drawn == ["older", "continued", "missing"]
    assert [group.group.prompt.prompt_id for group in step] == list(groups)
    for group in step:
        name = group.group.prompt.prompt_id
        assert {r.policy_versions for r in group.group.rollouts} == {((2, 4),)}, name
        before = groups[name].group.rollouts[0].rollout_logprobs - (1.0 if name == "current" else 0.0)
        assert group.group.rollouts[0].rollout_logprobs.tobytes() == before.tobytes()
    with LedgerReader(tmp_path / LEDGER_FILE) as reader:
        assert {group.oldest_version for group in reader.groups_of_step(STEP)} == {STEP - 1}
        assert [event for _, event, *_ in reader.events()].count("drawn again") == 2


@pytest.mark.parametrize(
    ("changed", "drawn", "graded", "said"),
    [
        ({"rollout": RolloutSettings(responses_per_prompt=2, temperature=0.6)}, 2, 0,
         "2 are drawn anew, 0 are graded anew (rollout.temperature: 1.0 -> 0.6)"),
        ({"rollout": RolloutSettings(responses_per_prompt=2, stop_tokens=("</answer>",), max_response_tokens=9)}, 2, 0,
         '(rollout.max_response_tokens: 30720 -> 9, rollout.stop_tokens: [] -> ["</answer>"])'),
        ({"reward": RewardSettings(wrong=-0.5, workers=9)}, 0, 2,
         "0 are drawn anew, 2 are graded anew (reward.wrong: -1.0 -> -0.5)"),
        ({"chat": chat(opening="<think>\n")}, 0, 2,
         '0 are drawn anew, 2 are graded anew (responses begin with: null -> "<think>\\n")'),
        ({"reward": RewardSettings(workers=9)}, 0, 0, ""),
        ({"rollout": RolloutSettings(responses_per_prompt=2, batch_responses=3)}, 0, 0, ""),
    ],
)  # fmt: skip
def test_a_step_has_responses_and_grades_of_one_set_of_settings(
    context: ParallelContext,
    make_group: Callable[..., ScoredGroup],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, Any],
    drawn: int,
    graded: int,
    said: str,
) -> None:
    """What a life left graded for a step, recalled by one with other settings."""
    groups = {name: make_group(name, [1, -1], lengths=[4, 4]) for name in ("one", "two")}
    with Ledger(tmp_path / LEDGER_FILE) as ledger:
        enforce(ledger, run_terms(settings_of(tmp_path), CHAT), step=0, num_responses=2)
        for group in groups.values():
            leave_graded(ledger, group, ((STEP - 1, 4),))
    session = SimpleNamespace(
        chat=changed.pop("chat", CHAT),
        settings=settings_of(tmp_path, rl=RlSettings(prompts_per_step=2, minibatch_prompts=2), **changed),
        context=context,
        root=tmp_path,
        resumed=None,
        step=STEP - 1,
    )
    prompts = Data([group.group.prompt for group in groups.values()])
    cursor = DataCursor(2, 2, seed=0, shuffle=False)
    calls = {"drawn": 0, "graded": 0}

    def score(missing: list[Prompt], mine: object) -> list[ScoredGroup]:
        calls["drawn"] += len(missing)
        versions = ((STEP - 1, 4),)
        return [
            replace(g, group=replace(
                g.group, rollouts=tuple(replace(r, policy_versions=versions) for r in g.group.rollouts)
            ))
            for g in (groups[p.prompt_id] for p in missing)
        ]  # fmt: skip

    def score_stored(stored: list[RolloutGroup]) -> list[ScoredGroup]:
        calls["graded"] += len(stored)
        return [replace(groups[g.prompt.prompt_id], group=g, rewards=np.array([1.0, -0.5], np.float32),
                        grades=(Grade(outcome="correct", reward=1.0), Grade(outcome="wrong", reward=-0.5)))
                for g in stored]  # fmt: skip

    rollouts = SimpleNamespace(
        generate=lambda missing, *, step, on_rollout: missing, score=score, score_stored=score_stored
    )
    with caplog.at_level("WARNING"), RunLedger(session, prompts) as source:  # type: ignore[arg-type]
        step = source.groups(STEP, cursor, rollouts)  # type: ignore[arg-type]
    assert calls == {"drawn": drawn, "graded": graded}
    assert [record.getMessage() for record in caplog.records if said and said in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert len(caplog.records) == bool(said)
    for group in step:
        before = groups[group.group.prompt.prompt_id].group.rollouts[1].rollout_logprobs
        kept = before if drawn else before - 1.0
        assert group.group.rollouts[1].rollout_logprobs.tobytes() == kept.tobytes()
    with LedgerReader(tmp_path / LEDGER_FILE) as reader:
        rewards = [[g.grades[i].reward for i in range(2)] for g in reader.groups_of_step(STEP)]
    assert rewards == [[1.0, -0.5 if graded else -1.0]] * 2


def test_what_servers_had_promised_to_a_step_by_completion_is_free_for_any_again(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path
) -> None:
    """The killed life trained the third and fourth prompt first; here the order of the data says which are a step's."""
    groups = [make_group(name, [1, -1], lengths=[4, 4]) for name in ("one", "two", "three", "four")]
    settings = settings_of(
        tmp_path,
        rl=RlSettings(prompts_per_step=2, minibatch_prompts=2),
        scheduling=SchedulingSettings(order="completion"),
    )
    session = SimpleNamespace(chat=CHAT, settings=settings, context=context, root=tmp_path, resumed=None, step=0)
    prompts = Data([group.group.prompt for group in groups])
    cursor = DataCursor(4, 2, seed=0, shuffle=False)
    rollouts = SimpleNamespace()  # all is there already
    with RunLedger(session, prompts):  # type: ignore[arg-type]
        pass
    with Ledger(tmp_path / LEDGER_FILE) as ledger:
        for group in groups:
            leave_graded(ledger, group, ((0, 4),))
        ledger.commit(1, [3, 4])
        ledger.trained(1)
    with RunLedger(session, prompts) as source:  # type: ignore[arg-type]
        step = source.groups(1, cursor, rollouts)  # type: ignore[arg-type]
        source.trained(1)
    assert [group.group.prompt.prompt_id for group in step] == ["one", "two"]
    with LedgerReader(tmp_path / LEDGER_FILE) as reader:
        assert [group.group_id for group in reader.groups_of_step(1)] == [1, 2]
        assert reader.states() == {"trained": 2, "graded": 2}


def test_groups_that_were_finished_when_the_run_was_killed_are_not_drawn_again(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path
) -> None:
    """Two of three groups are whole when the engine is killed; the third has one response of two."""
    names = ("one", "two", "three")
    groups = {name: make_group(name, [1, -1], lengths=[4, 4]) for name in names}
    settings = settings_of(tmp_path, rl=RlSettings(prompts_per_step=3, minibatch_prompts=3))
    session = SimpleNamespace(chat=CHAT, settings=settings, context=context, root=tmp_path, resumed=None, step=0)
    prompts = Data([group.group.prompt for group in groups.values()])

    def drawn(name: str, shift: float) -> RolloutGroup:
        """With log-probabilities that tell one life's from the other's."""
        rollouts = groups[name].group.rollouts
        return RolloutGroup(
            prompt=groups[name].group.prompt,
            rollouts=tuple(
                replace(r, policy_versions=((0, 4),), rollout_logprobs=r.rollout_logprobs - shift) for r in rollouts
            ),
        )

    def killed(missing: list[Prompt], *, step: int, on_rollout: RolloutCallback) -> list[RolloutGroup]:
        for name, indices in (("two", (1, 0)), ("three", (0,)), ("one", (0, 1))):
            for index in indices:
                on_rollout(groups[name].group.prompt, index, drawn(name, 1.0).rollouts[index])
        raise RolloutError("as a kill")

    with RunLedger(session, prompts) as source, pytest.raises(RolloutError, match="as a kill"):  # type: ignore[arg-type]
        source.groups(1, DataCursor(3, 3, seed=0, shuffle=False), SimpleNamespace(generate=killed))  # type: ignore[arg-type]
    (kept,) = (tmp_path / DIRECTORY).iterdir()
    whole = kept.read_text()
    # Another rank's, whose last line a full disk has cut off.
    (tmp_path / DIRECTORY / "rank_00001.jsonl").write_text(whole.replace("two", "gone") + whole[: len(whole) // 3])

    asked: list[str] = []

    def generate(missing: list[Prompt], *, step: int, on_rollout: RolloutCallback) -> list[RolloutGroup]:
        asked.extend(prompt.prompt_id for prompt in missing)
        return [drawn(prompt.prompt_id, 2.0) for prompt in missing]

    def scored(found: list[RolloutGroup]) -> list[ScoredGroup]:
        return [replace(groups[group.prompt.prompt_id], group=group) for group in found]

    rollouts = SimpleNamespace(generate=generate, score=lambda _, mine: scored(mine), score_stored=scored)
    with RunLedger(session, prompts) as source:  # type: ignore[arg-type]
        step = source.groups(1, DataCursor(3, 3, seed=0, shuffle=False), rollouts)  # type: ignore[arg-type]
    assert asked == ["three"]
    assert [group.group.prompt.prompt_id for group in step] == list(names)
    for group, shift in zip(step, (1.0, 1.0, 2.0), strict=True):
        wanted = drawn(group.group.prompt.prompt_id, shift)
        for found, rollout in zip(group.group.rollouts, wanted.rollouts, strict=True):
            assert found.rollout_logprobs.tobytes() == rollout.rollout_logprobs.tobytes()
            assert found.response_ids.tolist() == rollout.response_ids.tolist()
            assert (found.finish_reason, found.policy_versions) == (rollout.finish_reason, rollout.policy_versions)
    assert list((tmp_path / DIRECTORY).iterdir()) == [], "what is in the ledger is not kept twice"
    with LedgerReader(tmp_path / LEDGER_FILE) as reader:
        assert reader.states() == {"committed": 3}


@pytest.mark.parametrize("rollout_only", [False, True], ids=["trained", "recorded"])
def test_a_step_whose_responses_give_way_to_a_stop_is_the_next_one_of_the_next_life(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path, rollout_only: bool
) -> None:
    """Asked to stop in step 2, with one of two groups whole and no checkpoint of step 1 yet."""
    names = ("one", "two", "three", "four", "five", "six")
    groups = {name: make_group(name, [1, -1], lengths=[4, 4]) for name in names}
    settings = settings_of(
        tmp_path,
        rl=RlSettings(prompts_per_step=2, minibatch_prompts=2),
        scheduling=SchedulingSettings(mode="sync", rollout_only=rollout_only),
    )
    session = SimpleNamespace(chat=CHAT, settings=settings, context=context, root=tmp_path, resumed=None, step=0,
                              saved_step=0)  # fmt: skip
    prompts = Data([group.group.prompt for group in groups.values()])
    asked: list[str] = []
    is_stopping = False

    def generate(missing: list[Prompt], *, step: int, on_rollout: RolloutCallback) -> list[RolloutGroup] | None:
        made = []
        for prompt in missing:
            asked.append(prompt.prompt_id)
            rollouts = tuple(
                replace(r, policy_versions=((step - 1, 4),)) for r in groups[prompt.prompt_id].group.rollouts
            )
            for index, rollout in enumerate(rollouts):
                on_rollout(prompt, index, rollout)
            if is_stopping:
                return None
            made.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
        return made

    def scored(found: list[RolloutGroup]) -> list[ScoredGroup]:
        return [replace(groups[group.prompt.prompt_id], group=group) for group in found]

    def stop_if_asked() -> None:
        state = {"step": session.step, "cursor": cursor.state_dict(), "ledger": session.ledger_position()}
        session.resumed = json.loads(json.dumps(state))
        raise Preempted

    rollouts: Any = SimpleNamespace(
        generate=generate, score=lambda _, mine: None if mine is None else scored(mine), score_stored=scored
    )
    session.stop_if_asked = stop_if_asked
    cursor = DataCursor(6, 2, seed=0, shuffle=False)
    with RunLedger(session, prompts) as source:  # type: ignore[arg-type]
        source.groups(1, cursor, rollouts)
        source.trained(1)
        session.step, is_stopping = 1, True
        with pytest.raises(Preempted):
            source.groups(2, cursor, rollouts)
    is_stopping = False
    cursor = DataCursor(6, 2, seed=0, shuffle=False)
    cursor.load_state(session.resumed["cursor"])
    steps = []
    with RunLedger(session, prompts) as source:  # type: ignore[arg-type]
        for step in (2, 3):
            steps.append([group.group.prompt.prompt_id for group in source.groups(step, cursor, rollouts)])
            source.trained(step)
    assert steps == [["three", "four"], ["five", "six"]]
    assert asked == list(names), "what was finished is not drawn again"
    with LedgerReader(tmp_path / LEDGER_FILE) as reader:
        assert reader.states() == {"committed" if rollout_only else "trained": 6}
        assert [len(reader.groups_of_step(step)) for step in (1, 2, 3)] == [2, 2, 2]


def test_tokens_stay_until_a_checkpoint_makes_them_dispensable(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path
) -> None:
    """A kill after step 2 has steps 1 and 2 trained again with the same groups, whatever `keep_steps` says."""
    groups = [make_group(name, [1, -1], lengths=[4, 4]) for name in ("one", "two", "three")]
    settings = settings_of(
        tmp_path, rl=RlSettings(prompts_per_step=1, minibatch_prompts=1), scheduling=SchedulingSettings(keep_steps=1)
    )
    session = SimpleNamespace(
        chat=CHAT, settings=settings, context=context, root=tmp_path, resumed=None, step=0, saved_step=0
    )
    with Ledger(tmp_path / LEDGER_FILE) as ledger:
        enforce(ledger, run_terms(settings, CHAT), step=0, num_responses=2)

    def score(missing: list[Prompt], step: int) -> list[ScoredGroup]:
        [group] = [group for group in groups if group.group.prompt.prompt_id == missing[0].prompt_id]
        rollouts = tuple(replace(r, policy_versions=((step - 1, 4),)) for r in group.group.rollouts)
        return [replace(group, group=replace(group.group, rollouts=rollouts))]

    def with_tokens() -> list[int]:
        with LedgerReader(tmp_path / LEDGER_FILE) as reader:
            return [step for step in reader.steps() if all(g.rollouts for g in reader.groups_of_step(step))]

    found = []
    cursor = DataCursor(3, 1, seed=0, shuffle=False)
    with RunLedger(session, Data([group.group.prompt for group in groups])) as source:  # type: ignore[arg-type]
        for step, saved_step in ((1, 0), (2, 0), (3, 2)):
            rollouts = SimpleNamespace(
                generate=lambda missing, *, step, on_rollout: missing,
                score=lambda missing, mine, step=step: score(missing, step),
            )
            source.groups(step, cursor, rollouts)  # type: ignore[arg-type]
            session.saved_step = saved_step
            source.trained(step)
            found.append(with_tokens())
    assert found == [[1], [1, 2], [3]]


def test_groups_that_cannot_be_kept_cost_one_warning(tmp_path: Path, make_group, caplog) -> None:
    (tmp_path / DIRECTORY).touch()
    finished = FinishedGroups(tmp_path, 0)
    for name in ("one", "two"):
        group = make_group(name, [1], lengths=[4]).group
        finished.add(0, group.prompt, 0, group.rollouts[0], num_responses=1)
    (warning,) = caplog.messages
    assert warning.startswith("a kill in this step would have its responses drawn again: they cannot be kept (")


def recorded_steps(root: Path, groups: list[ScoredGroup], settings: Settings, *, rollout_only: bool) -> LedgerPosition:
    """A ledger that has one group a step, each of the version before it; returns its place in the last checkpoint."""
    root.mkdir(exist_ok=True)
    with Ledger(root / LEDGER_FILE) as ledger:
        reconcile(
            ledger, 0, None, identity="", prompts={}, num_responses=2, terms=run_terms(settings, CHAT),
            rollout_only=rollout_only,
        )  # fmt: skip
        for step, group in enumerate(groups, start=1):
            leave_graded(ledger, group, ((step - 1, 4),))
            ledger.commit(step, [step])
        return position(ledger, len(groups))


def test_a_run_whose_recorded_steps_are_gone_does_not_go_on(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path
) -> None:
    groups = [make_group(name, [1, -1], lengths=[4, 4]) for name in ("one", "two")]
    settings = settings_of(
        tmp_path,
        rl=RlSettings(prompts_per_step=1, minibatch_prompts=1),
        scheduling=SchedulingSettings(mode="sync", rollout_only=True),
    )
    place = recorded_steps(tmp_path, groups, settings, rollout_only=True)
    session: Any = SimpleNamespace(
        chat=CHAT, settings=settings, context=context, root=tmp_path, resumed={"ledger": place.to_json()}, step=2
    )
    prompts: Any = Data([group.group.prompt for group in groups])
    with RunLedger(session, prompts):
        pass
    kept = (tmp_path / LEDGER_FILE).read_bytes()
    (tmp_path / LEDGER_FILE).unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"lacks 2 of the 2 steps that were recorded .* put back the ledger"):
            RunLedger(session, prompts)
        assert not list(tmp_path.glob("*-wal")), "nothing that would be taken for part of the ledger that is put back"
    (tmp_path / LEDGER_FILE).write_bytes(kept)
    with RunLedger(session, prompts), LedgerReader(tmp_path / LEDGER_FILE) as reader:
        assert reader.states() == {"committed": 2}


@pytest.mark.parametrize("rollout_only", [False, True])
def test_a_replay_knows_whether_the_recorded_run_trained(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path, rollout_only: bool
) -> None:
    """One that did not numbered the same weights anew with each step: here those before the first replayed step."""
    groups = [make_group(name, [1, -1], lengths=[4, 4]) for name in ("one", "two", "three")]
    recorded_steps(tmp_path / "recorded", groups, settings_of(tmp_path), rollout_only=rollout_only)
    scheduling = SchedulingSettings(replay_from=str(tmp_path / "recorded"), replay_first_step=2)
    session: Any = SimpleNamespace(
        chat=CHAT, settings=settings_of(tmp_path, scheduling=scheduling), context=context, step=1, total_steps=3,
        root=tmp_path, phase=lambda name: contextlib.nullcontext(),
    )  # fmt: skip
    cursor: Any = SimpleNamespace(next_batch=lambda: None)
    rollouts: Any = None
    with RunLedger(session, Data([])) as source:  # type: ignore[arg-type]
        steps = [source.groups(step, cursor, rollouts) for step in (2, 3)]
    versions = [{r.policy_versions for group in step for r in group.group.rollouts} for step in steps]
    assert versions == [{((1, 4),)}, {((1 if rollout_only else 2, 4),)}]


def test_a_replay_is_of_the_settings_of_its_steps_and_not_of_the_newest(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path
) -> None:
    """Steps 1 and 2 were recorded at temperature 1.0, step 3 at 0.6."""
    groups = [make_group(name, [1, -1], lengths=[4, 4]) for name in ("one", "two", "three")]
    cold = {"rollout": RolloutSettings(responses_per_prompt=2, temperature=0.6)}
    recorded_steps(tmp_path / "recorded", groups, settings_of(tmp_path), rollout_only=True)
    with Ledger(tmp_path / "recorded" / LEDGER_FILE) as ledger:
        enforce(ledger, run_terms(settings_of(tmp_path, **cold), CHAT), step=2, num_responses=2)

    def replay(first: int, last: int, **changed: Any) -> None:
        scheduling = SchedulingSettings(replay_from=str(tmp_path / "recorded"))
        session: Any = SimpleNamespace(
            chat=CHAT, settings=settings_of(tmp_path, scheduling=scheduling, **changed), context=context,
            step=first - 1, total_steps=last, root=tmp_path,
        )  # fmt: skip
        with RunLedger(session, Data([])):  # type: ignore[arg-type]
            pass

    with pytest.raises(CheckpointError, match="no groups of step 3"):
        replay(1, 3)  # what was in flight is drawn anew
    with Ledger(tmp_path / "recorded" / LEDGER_FILE) as ledger:
        leave_graded(ledger, groups[2], ((2, 4),))
        ledger.commit(3, [3])
    replay(1, 2)
    replay(3, 3, **cold)
    with pytest.raises(CheckpointError, match=r"\(steps 1 to 2: rollout.temperature: 1.0 there, 0.6 here\)"):
        replay(1, 2, **cold)
    with pytest.raises(CheckpointError, match=r"\(step 3: rollout.temperature: 0.6 there, 1.0 here\)"):
        replay(1, 3)


def test_another_tokenizer_counts_by_what_it_holds(tmp_path: Path) -> None:
    first = run_terms(settings_of(tmp_path), CHAT)
    (tmp_path / "moved").mkdir()
    moved = settings_of(tmp_path / "moved")
    assert run_terms(moved, CHAT) == first
    assert run_terms(moved, chat((7, 9))).sampling != first.sampling, "the model's directory ends responses, too"
    (tmp_path / "moved" / "tokenizer" / "chat_template.jinja").write_text("other")
    assert run_terms(moved, CHAT).sampling != first.sampling
    assert run_terms(moved, CHAT).grading == first.grading
