"""What may change between two starts of a run is decided from its newest checkpoint, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.checkpoint import layout
from megatron_klear.config import SchedulingSettings, Settings, dump_settings
from megatron_klear.config.schema import ModelSettings, OptimizerSettings, RunSettings, TokenizerSettings
from megatron_klear.errors import ConfigError
from megatron_klear.session.resuming import changes_at_resume


def settings_of(root: Path, **sections) -> Settings:
    return Settings(
        run=sections.pop("run", RunSettings(dir=str(root))),
        tokenizer=TokenizerSettings(dir="tokenizer"),
        model=sections.pop("model", ModelSettings(preset="qwen3-tiny", num_layers=4)),
        **sections,
    )


def write_checkpoint(run: Path, step: int, settings: Settings, **state: object) -> Path:
    directory = layout.step_directory(run / "checkpoints", step)
    directory.mkdir(parents=True)
    (directory / layout.SETTINGS).write_text(dump_settings(settings))
    (directory / layout.RUN_STATE).write_text(json.dumps({"step": step, "entry": "sft", **state}))
    return directory


def test_fresh_and_unchanged_runs_have_nothing_to_tell(tmp_path):
    assert changes_at_resume(settings_of(tmp_path), "sft") == []
    write_checkpoint(tmp_path, 4, settings_of(tmp_path))
    assert changes_at_resume(settings_of(tmp_path), "sft") == []


def test_what_may_change_is_told(tmp_path):
    write_checkpoint(tmp_path, 4, settings_of(tmp_path, optimizer=OptimizerSettings(lr=1e-3)))
    now = settings_of(tmp_path, optimizer=OptimizerSettings(lr=2e-3), run=RunSettings(dir=str(tmp_path), device="cpu"))
    assert changes_at_resume(now, "sft") == ["optimizer.lr: 0.001 -> 0.002"]


def test_a_replay_keeps_its_first_step_and_may_go_further(tmp_path):
    def replay(**steps: int) -> Settings:
        return settings_of(tmp_path, scheduling=SchedulingSettings(replay_from="elsewhere", **steps))

    checkpoint = write_checkpoint(tmp_path, 7, replay(replay_first_step=7, replay_last_step=7))
    state = json.loads((checkpoint / layout.RUN_STATE).read_text())
    (checkpoint / layout.RUN_STATE).write_text(json.dumps(state | {"entry": "rl"}))
    assert changes_at_resume(replay(replay_first_step=7, replay_last_step=9), "rl") == [
        "scheduling.replay_last_step: 7 -> 9"
    ]
    with pytest.raises(ConfigError, match=r"replay_first_step: was 7 when .* and is 3; the run began there: set it b"):
        changes_at_resume(replay(replay_first_step=3, replay_last_step=3), "rl")
    assert "scheduling.replay_first_step: 7 -> 1" in changes_at_resume(settings_of(tmp_path), "rl")


def test_what_must_not_change_is_refused_all_at_once(tmp_path):
    write_checkpoint(tmp_path, 4, settings_of(tmp_path))
    now = settings_of(
        tmp_path, model=ModelSettings(preset="qwen3-tiny", num_layers=2), run=RunSettings(dir=str(tmp_path), seed=7)
    )
    with pytest.raises(ConfigError) as caught:
        changes_at_resume(now, "sft")
    assert len(caught.value.problems) == 2
    layers, seed = sorted(caught.value.problems)
    assert layers.startswith("model.num_layers: was 4 when ")
    assert "and is 2" in layers
    assert seed.startswith("run.seed: was 1234 when ")
    assert "and is 7" in seed


def test_the_newest_checkpoint_decides(tmp_path):
    write_checkpoint(tmp_path, 2, settings_of(tmp_path, run=RunSettings(dir=str(tmp_path), seed=7)))
    write_checkpoint(tmp_path, 4, settings_of(tmp_path))
    assert changes_at_resume(settings_of(tmp_path), "sft") == []


@pytest.mark.parametrize("left", ["ledger", "checkpoint", "checkpoint and ledger"])
def test_a_run_with_a_ledger_of_its_own_replays_no_other(tmp_path, left):
    replay = settings_of(tmp_path, scheduling=SchedulingSettings(replay_from="elsewhere"))
    if "checkpoint" in left:
        position = {"ledger_id": "x", "step": 4, "last_group": 9, "in_flight": [[9, 0, "p"]]}
        write_checkpoint(tmp_path, 4, settings_of(tmp_path), entry="rl", ledger=position)
    if "ledger" in left:
        (tmp_path / "ledger.sqlite").touch()
    with pytest.raises(
        ConfigError, match=r"scheduling\.replay_from: .* a rollout ledger of its own.*replay in another run\.dir"
    ):
        changes_at_resume(replay, "rl")
    changes_at_resume(settings_of(tmp_path), "rl")


def test_a_replay_goes_on_and_may_then_generate(tmp_path):
    replay = settings_of(tmp_path, scheduling=SchedulingSettings(replay_from="elsewhere"))
    write_checkpoint(tmp_path, 4, replay, entry="rl", ledger=None)
    assert changes_at_resume(replay, "rl") == []
    assert changes_at_resume(settings_of(tmp_path), "rl") == ['scheduling.replay_from: "elsewhere" -> null']


def test_run_of_the_other_entry_is_refused_by_name(tmp_path):
    write_checkpoint(tmp_path, 4, settings_of(tmp_path))
    with pytest.raises(ConfigError, match=r"run\.dir: .* holds a run of train_sft; .*checkpoint\.start_from="):
        changes_at_resume(settings_of(tmp_path), "rl")


def test_converted_weights_know_only_their_model(tmp_path):
    directory = write_checkpoint(tmp_path, 0, settings_of(tmp_path))
    (directory / layout.SETTINGS).write_text("model: {num_layers: 4, vocab_multiple: 64}\n")
    (directory / layout.RUN_STATE).write_text('{"step": 0, "model_only": true}')
    with pytest.raises(ConfigError, match=r"model\.vocab_multiple: was 64"):
        changes_at_resume(settings_of(tmp_path), "rl")


def test_unreadable_settings_are_left_to_the_check_of_the_checkpoint(tmp_path):
    directory = write_checkpoint(tmp_path, 4, settings_of(tmp_path))
    (directory / layout.SETTINGS).write_text("{")
    assert changes_at_resume(settings_of(tmp_path), "sft") == []
    (directory / layout.SETTINGS).write_text("[]")
    assert changes_at_resume(settings_of(tmp_path), "sft") == []


def test_torch_is_not_imported():
    code = "import sys, megatron_klear.session.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
