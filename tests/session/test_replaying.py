"""Where the replay of a later step begins: at the recorded run's checkpoint, or without it, and then it says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_klear import parallel
from megatron_klear.checkpoint import layout
from megatron_klear.config import ParallelSettings, SchedulingSettings, Settings
from megatron_klear.config.schema import ModelSettings, RunSettings, TokenizerSettings
from megatron_klear.session.replaying import checkpoint_before, last_step, steps_before


@pytest.fixture(scope="module")
def context():
    yield parallel.start(ParallelSettings(), device="cpu", seed=3)
    parallel.stop()


def settings_of(source: Path | None, **steps: int) -> Settings:
    replayed = None if source is None else str(source)
    return Settings(
        run=RunSettings(dir="run"),
        tokenizer=TokenizerSettings(dir="tokenizer"),
        model=ModelSettings(preset="qwen3-tiny", num_layers=2),
        scheduling=SchedulingSettings(replay_from=replayed, **steps),
    )


def save(run: Path, step: int) -> Path:
    directory = layout.step_directory(run / "checkpoints", step)
    directory.mkdir(parents=True)
    (directory / "weights").write_bytes(bytes(100))
    layout.write_manifest(directory, layout.checksums(directory, ["weights"]))
    return directory


def test_steps_of_a_replay_and_of_other_runs(tmp_path):
    replay = settings_of(tmp_path, replay_first_step=4, replay_last_step=6)
    assert (steps_before(replay, "rl"), last_step(replay, "rl", 9)) == (3, 6)
    assert (steps_before(replay, "sft"), last_step(replay, "sft", 9)) == (0, 9)
    to_the_end = settings_of(tmp_path, replay_first_step=4)
    assert last_step(to_the_end, "rl", 9) == 9


def test_the_checkpoint_of_the_step_before_is_taken(context, tmp_path):
    saved = save(tmp_path, 2)
    save(tmp_path, 4)
    assert checkpoint_before(settings_of(tmp_path, replay_first_step=3), "rl", context) == saved
    assert checkpoint_before(settings_of(tmp_path, replay_first_step=3), "sft", context) is None
    assert checkpoint_before(settings_of(tmp_path), "rl", context) is None
    assert checkpoint_before(settings_of(None), "rl", context) is None


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_without_it_other_weights_are_trained_and_it_says_where_there_is_one(context, tmp_path, caplog, harm):
    for step in (2, 4, 6):
        save(tmp_path, step)
    if harm == "damaged":
        (layout.step_directory(tmp_path / "checkpoints", 4) / "weights").write_bytes(bytes(99))
    first = 5 if harm == "damaged" else 4
    with caplog.at_level(logging.WARNING):
        assert checkpoint_before(settings_of(tmp_path, replay_first_step=first), "rl", context) is None
    assert ("checkpoint: 2, 6" if harm == "damaged" else "checkpoint: 2, 4, 6") in caplog.text
    assert ("is damaged (" if harm == "damaged" else "is not there: step 4 is replayed on this run's") in caplog.text
