"""The rollout ledger of real runs: complete, replayed to the bit, recalled after a kill, done without when lost."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_klear.errors import RolloutError
from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.rollout.ledger.encoding import pack_tokens
from megatron_klear.session.finished_groups import DIRECTORY

STEPS, PER_STEP, ROWS = 7, 8, 48
CONFIG = "examples/quickstart_rl.yaml"
WORKER = str(Path(__file__).with_name("stand_in_worker.py"))
MANAGED = str(Path(__file__).with_name("managed_worker.py"))
# A random model is never right; but a stray thinking tag makes some of its responses malformed, which gives gradients.
VARIED = ["reward.malformed=-2.0", "reward.require_think=false", "rollout.max_response_tokens=40"]
SHORT = [*VARIED, "checkpoint.every_steps=2", "checkpoint.keep=4", "evaluation.at_end=false"]


def tensors_of(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def differing(first: Path, second: Path, step: int = STEPS) -> list[str]:
    mine, theirs = tensors_of(first, step), tensors_of(second, step)
    assert mine.keys() == theirs.keys()
    return [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])]


def walked(run: Path) -> list[tuple[int, int, str, str]]:
    """(step, epoch, prompt, state) of every group, in the order of training."""
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        return [
            (step, group.epoch, group.prompt.prompt_id, group.state)
            for step in reader.steps()
            for group in reader.groups_of_step(step)
        ]


@pytest.fixture
def run(start, rl_overrides, tmp_path):
    """Run, or go on with, the run of this name: `run("name", *overrides)`."""

    def go(name: str, *overrides: str) -> Path:
        launch = start("train_rl", CONFIG, [*rl_overrides(name), *SHORT, f"rl.steps={STEPS}", *overrides])
        assert launch.wait() == [0, 0], launch.output()
        return tmp_path / name

    return go


def copy_back_to(step: int, run: Path, copy: Path) -> Path:
    """A copy of a run without the checkpoints after `step`, as if it had been killed before they were written."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    return copy


def test_every_prompt_once_and_the_same_bits_when_replayed_cut_back_or_robbed_of_the_ledger(run, tmp_path):
    """Seven steps of eight prompts cross from the first epoch of 48 into the second."""
    whole = run("whole")
    rows = walked(whole)
    assert [state for *_, state in rows] == ["trained"] * STEPS * PER_STEP
    assert [step for step, *_ in rows] == [step for step in range(1, STEPS + 1) for _ in range(PER_STEP)]
    keys = [(epoch, prompt) for _, epoch, prompt, _ in rows]
    assert len(set(keys)) == STEPS * PER_STEP
    assert [epoch for epoch, _ in keys] == [0] * ROWS + [1] * (STEPS * PER_STEP - ROWS)
    state = json.loads((whole / "checkpoints" / f"step_{STEPS:08d}" / "run_state.json").read_text())
    assert (state["ledger"]["step"], state["ledger"]["in_flight"]) == (STEPS, [])

    moved = tensors_of(whole, STEPS - 1), tensors_of(whole)
    assert any(
        not torch.equal(moved[0][name], moved[1][name]) for name in moved[0] if not name.startswith("optimizer.")
    )

    cut = copy_back_to(2, whole, tmp_path / "cut")
    run("cut")
    assert differing(whole, cut) == []
    assert walked(cut) == rows
    with LedgerReader(cut / "ledger.sqlite") as reader:
        events = [event for _, event, *_ in reader.events()]
    assert events.count("rolled back") == (STEPS - 2) * PER_STEP
    # The responses of step 3 were sampled from the weights of step 2, which are still there; later ones were not.
    assert events.count("drawn again") == (STEPS - 3) * PER_STEP

    robbed = copy_back_to(4, whole, tmp_path / "robbed")
    for file in robbed.glob("ledger.sqlite*"):
        file.unlink()
    run("robbed")
    assert differing(whole, robbed) == []
    assert walked(robbed) == rows[4 * PER_STEP :]

    # Nothing is generated or evaluated, so SGLang's environment is not asked for, and no server started.
    replayed = run("replayed", f"scheduling.replay_from={whole}", "rollout.engine=sglang", "sglang.venv=nowhere")
    assert differing(whole, replayed) == []
    assert not (replayed / "ledger.sqlite").exists()
    assert not list((replayed / "logs").glob("engine_*"))

    # One past step by itself, from what the run was before it.
    alone = [f"scheduling.replay_from={whole}", "scheduling.replay_first_step=5", "scheduling.replay_last_step=5"]
    fifth = run("fifth", *alone)
    assert [step.name for step in (fifth / "checkpoints").glob("step_*")] == ["step_00000005"]
    rows_of = [
        [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        for run_dir in (whole, fifth)
    ]
    (recorded,) = [row for row in rows_of[0] if (row["phase"], row["step"]) == ("rl", 5)]
    (again,) = [row for row in rows_of[1] if row["phase"] == "rl"]
    same = [name for name in recorded if name.startswith(("rl/", "loss/", "optimizer/", "reward/", "mismatch/"))]
    assert len(same) > 10
    assert {name: again[name] for name in same} == {name: recorded[name] for name in same}
    sixth = run("fifth", alone[0], alone[1], "scheduling.replay_last_step=6")  # and goes on, as any run does
    assert differing(whole, sixth, step=6) == []
    run("fifth")  # now on responses of its own, to the prompts that the weights have not learned
    assert walked(fifth) == rows[6 * PER_STEP :]


def test_generated_first_and_trained_later(run, start, rl_overrides, tmp_path):
    """rollout_only leaves the weights as they are, also over a resume; a replay then trains on its steps."""
    overrides = [*rl_overrides("generated"), *SHORT, "scheduling.rollout_only=true"]
    for steps in (2, STEPS):
        launch = start("train_rl", CONFIG, [*overrides, f"rl.steps={steps}"])
        assert launch.wait() == [0, 0], launch.output()
    generated = tmp_path / "generated"
    rows = walked(generated)
    assert [(step, state) for step, *_, state in rows] == [
        (s, "committed") for s in range(1, STEPS + 1) for _ in range(PER_STEP)
    ]
    # The weights are the same all along, so only seeds tell the second epoch's responses from the first's.
    drawn: dict[str, list[tuple[tuple[int, ...], ...]]] = {}
    with LedgerReader(generated / "ledger.sqlite") as reader:
        for step in reader.steps():
            for group in reader.groups_of_step(step):
                responses = tuple(tuple(int(t) for t in r.response_ids) for _, r in sorted(group.rollouts.items()))
                drawn.setdefault(group.prompt.prompt_id, []).append(responses)
    twice = [responses for responses in drawn.values() if len(responses) == 2]
    assert len(twice) == STEPS * PER_STEP - ROWS
    assert all(first != second for first, second in twice)
    weights = [tensors_of(generated, step) for step in (2, STEPS)]
    parameters = [name for name in weights[0] if not name.startswith("optimizer.")]
    assert parameters
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in parameters)

    evaluated = ["evaluation.every_steps=2", "evaluation.at_end=true"]
    trained = run("trained", f"scheduling.replay_from={generated}", "rl.steps=3", *evaluated)
    assert any(not torch.equal(tensors_of(trained, 3)[name], weights[1][name]) for name in parameters)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "eval"] == [0, 2, 3], "an engine is there for evaluations"
    logged = [row for row in rows if row["phase"] == "rl"]
    first = [json.loads(line) for line in (generated / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/mean"] for row in logged] == [row["reward/mean"] for row in first[:3]]


def test_a_killed_step_goes_on_under_the_settings_of_now(run, start, rl_overrides, tmp_path):
    """Killed before its first checkpoint: other rewards keep the responses, another M or temperature does not."""

    def tokens(directory: Path) -> list[list[list[int]]]:
        with LedgerReader(directory / "ledger.sqlite") as reader:
            return [[r.response_ids.tolist() for _, r in sorted(g.rollouts.items())] for g in reader.groups_of_step(1)]

    killed = run("killed", "rl.steps=1")
    first = tokens(killed)
    shutil.rmtree(killed / "checkpoints")
    settings = [*rl_overrides("killed"), *SHORT, "rl.steps=1", "reward.malformed=-3.0"]
    launch = start("train_rl", CONFIG, settings)
    assert launch.wait() == [0, 0], launch.output()
    assert launch.output().count("0 are drawn anew, 8 are graded anew (reward.malformed: -2.0 -> -3.0)") == 1
    assert tokens(killed) == first
    with LedgerReader(killed / "ledger.sqlite") as reader:
        rewards = {g.grades[i].reward for g in reader.groups_of_step(1) for i in g.grades}
    assert -2.0 not in rewards
    assert -3.0 in rewards
    shutil.rmtree(killed / "checkpoints")
    launch = start("train_rl", CONFIG, [*settings, "rollout.responses_per_prompt=3", "rollout.temperature=0.5"])
    assert launch.wait() == [0, 0], launch.output()
    assert "8 are drawn anew, 0 are graded anew" in launch.output()
    assert "rollout.temperature: 1.0 -> 0.5" in launch.output()
    assert {len(group) for group in tokens(killed)} == {3}
    assert not any(response in group for group, old in zip(tokens(killed), first, strict=True) for response in old)
    with LedgerReader(killed / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []


@pytest.mark.parametrize("engine", ["in every rank", "servers"])
def test_groups_that_were_finished_are_not_drawn_again_after_a_kill(
    start, rl_overrides, stand_ins, tmp_path, monkeypatch, engine
):
    """Killed while others of their step were generated; without the manager, which writes each response down."""
    overrides = [*rl_overrides("killed"), *SHORT, "rl.steps=3", "scheduling.rollout_only=true"]
    if engine == "servers":
        monkeypatch.setenv("STAND_IN_SECONDS", "0.5")
        overrides += [*stand_ins(), "rollout.batch_responses=4"]  # a step takes four seconds
        wanted = ["rank_00000.jsonl"]  # of the rank that asks them
    else:
        overrides += ["rollout.batch_responses=2"]
        wanted = ["rank_00000.jsonl", "rank_00001.jsonl"]
    launch = start(WORKER if engine == "servers" else "train_rl", CONFIG, overrides)
    kept, deadline = tmp_path / "killed" / DIRECTORY, time.monotonic() + 200
    while not all((kept / name).is_file() for name in wanted):
        assert time.monotonic() < deadline, launch.output()
        assert all(p.poll() is None for p in launch.processes), launch.output()
        time.sleep(0.01)
    launch.signal(signal.SIGKILL)
    launch.wait()
    whole = {
        json.loads(line[9:])["prompt_id"]: json.loads(line[9:])["responses"]
        for name in wanted
        for line in (kept / name).read_text().splitlines()
        if line
    }
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    launch = start(WORKER if engine == "servers" else "train_rl", CONFIG, overrides)
    assert launch.wait() == [0, 0], launch.output()
    assert f"{len(whole)} prompt groups were finished when the run was ended" in launch.output()
    if engine == "servers":
        assert launch.output().count("published version") == 1, "nothing is trained, so the weights stay"
    assert [(step, state) for step, *_, state in walked(tmp_path / "killed")] == [
        (step, "committed") for step in (1, 2, 3) for _ in range(PER_STEP)
    ]
    with LedgerReader(tmp_path / "killed" / "ledger.sqlite") as reader:
        found = {
            group.prompt.prompt_id: [pack_tokens(group.rollouts[i].response_ids) for i in sorted(group.rollouts)]
            for step in (1, 2, 3)
            for group in reader.groups_of_step(step)
        }
    for name, responses in whole.items():
        assert found[name] == [base64.b64decode(tokens) for tokens, *_ in responses]
    assert list(kept.iterdir()) == []


def test_a_replay_that_is_evaluated_asks_for_the_engine_of_the_evaluation(start, rl_overrides, tmp_path):
    (tmp_path / "ledger.sqlite").touch()
    settings = [f"scheduling.replay_from={tmp_path}", "rollout.engine=sglang", "sglang.venv=nowhere"]
    launch = start("train_rl", CONFIG, [*rl_overrides("run"), *settings, "evaluation.at_end=true"])
    assert launch.wait() == [2, 2], launch.output()
    assert "sglang.venv: no nowhere/bin/python" in launch.output()
    assert "evaluation.at_end=false evaluation.every_steps=0 does without" in launch.output()


def test_a_replay_that_other_weights_are_trained_on_says_what_may_differ(start, rl_overrides, run):
    whole = run("whole", "rl.steps=1")
    other = ["checkpoint.start_from=null", "run.seed=5", "rl.steps=1", "correction.stop_above_mean=1.0e-3"]
    launch = start("train_rl", CONFIG, [*rl_overrides("other"), *SHORT, f"scheduling.replay_from={whole}", *other])
    assert launch.wait() == [1, 1], launch.output()
    assert "Cause: other weights, or numerics" in launch.output()


def test_a_damaged_ledger_stops_all_ranks_with_one_message(start, rl_overrides, tmp_path):
    file = tmp_path / "damaged" / "ledger.sqlite"
    file.parent.mkdir()
    file.write_bytes(b"\xa5" * 20_000)
    launch = start("train_rl", CONFIG, [*rl_overrides("damaged"), *SHORT, f"rl.steps={STEPS}"])
    assert launch.wait() == [1, 1], launch.output()
    lines = [line for line in launch.output().splitlines() if "ledger is damaged" in line]
    assert len(lines) == 1, launch.output()
    assert "Move it aside" in lines[0]
    assert str(file) in lines[0]
    assert file.read_bytes() == b"\xa5" * 20_000


def test_generation_beside_training_survives_kills(start, rl_overrides, tmp_path):
    """Two ranks train on what the manager takes from simulated engines, asynchronously, and are killed three times."""
    rng = random.Random(0)
    name = tmp_path / "managed"
    overrides = [
        *rl_overrides("managed"), *SHORT, "rl.steps=14", "scheduling.mode=async", "scheduling.max_staleness=2",
        "scheduling.order=completion",
        "correction.stop_above_mean=null",  # simulated engines make up their log-probabilities
    ]  # fmt: skip
    for life in range(4):
        launch = start(MANAGED, CONFIG, overrides)
        if life == 3:
            assert launch.wait() == [0, 0], launch.output()
            break
        metrics = name / "metrics.jsonl"
        wanted = 3 * life + rng.randint(1, 3)
        deadline = time.monotonic() + 200
        while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < wanted:
            assert time.monotonic() < deadline, launch.output()
            assert all(p.poll() is None for p in launch.processes), launch.output()
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        launch.signal(signal.SIGKILL)
        launch.wait()
    rows = walked(name)
    trained = [(epoch, prompt) for _, epoch, prompt, state in rows if state == "trained"]
    assert len(trained) == len(set(trained)) == 14 * PER_STEP
    assert [step for step, *_, state in rows if state == "trained"] == [
        s for s in range(1, 15) for _ in range(PER_STEP)
    ]
    with LedgerReader(name / "ledger.sqlite") as reader:
        staleness = [g.step - 1 - g.oldest_version for step in range(1, 15) for g in reader.groups_of_step(step)]
        mixed = [
            len(r.policy_versions) > 1
            for s in range(1, 15)
            for g in reader.groups_of_step(s)
            for r in g.rollouts.values()
        ]
        assert reader.states()["trained"] + 2 * PER_STEP >= sum(reader.states().values())
    assert min(staleness) >= 0
    assert max(staleness) <= 2
    assert any(mixed)
    logged = [json.loads(line) for line in (name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(1, 15))
    assert all(row["engines/serving"] == 2 and row["requests/failed"] == 0 for row in logged)
    assert all(row["requests/sent"] >= row["requests/interrupted"] >= 0 for row in logged)
    assert sum(row["requests/interrupted"] for row in logged) > 0


def test_asked_to_stop_while_it_waits_for_engines_it_stops(start, rl_overrides, tmp_path, monkeypatch):
    """A response takes minutes, and the signal is acted on in seconds; what was reserved stays reserved."""
    monkeypatch.setenv("SIMULATED_SECONDS_PER_TOKEN", "60")
    launch = start(MANAGED, CONFIG, [*rl_overrides("asked"), *SHORT, f"rl.steps={STEPS}"])
    ledger = tmp_path / "asked" / "ledger.sqlite"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert all(p.poll() is None for p in launch.processes), launch.output()
        with contextlib.suppress(RolloutError), LedgerReader(ledger) as reader:
            if reader.states():
                break
        time.sleep(0.05)
    launch.processes[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert launch.wait() == [75, 75], launch.output()
    assert time.monotonic() - began < 60
    assert "start again" in launch.output()
    with LedgerReader(ledger) as reader:
        assert reader.states() == {"reserved": PER_STEP}


def test_asked_to_stop_while_it_pauses_it_keeps_the_step_and_does_not_wait_for_responses(
    start, rl_overrides, tmp_path, monkeypatch
):
    """Responses that a publish has to wait for take hours; the step that was trained is saved, they are drawn again."""
    name = tmp_path / "paused"
    overrides = [*rl_overrides("paused"), *SHORT, "rl.steps=3", "scheduling.mode=one_step_off",
                 "correction.stop_above_mean=null", "evaluation.every_steps=1"]  # fmt: skip
    monkeypatch.setenv("SIMULATED_SLOW_AFTER_A_STEP", "1")
    launch = start(MANAGED, CONFIG, overrides)
    note = name / "logs" / "rank_00001.json"
    deadline = time.monotonic() + 200
    while not note.is_file() or json.loads(note.read_text())["phase"] != "pause":
        assert time.monotonic() < deadline, launch.output()
        assert all(p.poll() is None for p in launch.processes), launch.output()
        time.sleep(0.05)
    launch.processes[1].send_signal(signal.SIGTERM)
    assert launch.wait() == [75, 75], launch.output()
    assert "stopped after step 1 of 3; start again" in launch.output()
    assert (name / "checkpoints" / "step_00000001" / "manifest.json").is_file()
    with LedgerReader(name / "ledger.sqlite") as reader:
        states = reader.states()
        assert states["trained"] == PER_STEP
        assert sum(states.values()) == 2 * PER_STEP, "what was in flight stays reserved"

    monkeypatch.delenv("SIMULATED_SLOW_AFTER_A_STEP")
    resumed = start(MANAGED, CONFIG, overrides)
    assert resumed.wait() == [0, 0], resumed.output()
    rows = walked(name)
    assert [(step, state) for step, *_, state in rows] == [(s, "trained") for s in (1, 2, 3) for _ in range(PER_STEP)]
    assert len({(epoch, prompt) for _, epoch, prompt, _ in rows}) == 3 * PER_STEP
    logged = [json.loads(line) for line in (name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["phase"] == "rl"] == [1, 2, 3]
    assert [row["step"] for row in logged if row["phase"] == "eval"] == [0, 1, 2, 3], "none is left out by the stop"
    assert all("requests/sent" in row for row in logged if row["phase"] == "rl")


def test_a_run_goes_on_with_fewer_prompts_a_step_and_then_with_more(start, rl_overrides, tmp_path):
    """What was drawn ahead under another number of prompts counts by prompts, not by steps."""
    overrides = [
        *rl_overrides("resized"), *SHORT, "scheduling.mode=async", "scheduling.max_staleness=2",
        "correction.stop_above_mean=null",
    ]  # fmt: skip
    for steps, per_step in ((3, 8), (7, 4), (9, 12)):
        resized = [f"rl.steps={steps}", f"rl.prompts_per_step={per_step}"]
        launch = start(MANAGED, CONFIG, [*overrides, *resized])
        assert launch.wait() == [0, 0], launch.output()
    rows = walked(tmp_path / "resized")
    sizes = [sum(1 for row in rows if row[0] == step) for step in range(1, 10)]
    assert sizes == [8] * 3 + [4] * 4 + [12] * 2
    assert len({(epoch, prompt) for _, epoch, prompt, _ in rows}) == sum(sizes)
