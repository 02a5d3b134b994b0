"""What an entry's command line prints and returns."""

from __future__ import annotations

import pytest

from megatron_klear.config import parse_command_line


def test_good_settings_are_returned(config_file):
    settings = parse_command_line([str(config_file), "run.seed=5"], "sft")
    assert settings.run.seed == 5


def test_help_is_printed_and_the_exit_status_is_0(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"], "rl")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m megatron_klear.train_rl [--check] CONFIG.yaml")
    assert "algorithm.epsilon_high  [number, above 0; default 0.28]" in out


def test_problems_are_printed_to_stderr_and_the_exit_status_is_2(capsys, config_file):
    with pytest.raises(SystemExit) as caught:
        parse_command_line([str(config_file), "run.seed=x", "parallel.tp=0"], "rl")
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("2 problems with the settings:\n  - run.seed: got 'x'")


def test_only_the_first_rank_prints(capsys, monkeypatch, config_file):
    monkeypatch.setenv("RANK", "1")
    for arguments in (["--help"], [str(config_file), "run.seed=x"]):
        with pytest.raises(SystemExit):
            parse_command_line(arguments, "rl")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_problems_of_another_machine_are_printed_there_once(capsys, monkeypatch, config_file):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        parse_command_line([str(config_file), "data.prompts=[gone.jsonl]"], "rl")
    assert capsys.readouterr().err == "[rank 8] 1 problem with the settings:\n  - data.prompts: no file gone.jsonl\n"
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        parse_command_line([str(config_file), "data.prompts=[gone.jsonl]"], "rl")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the settings file must come first"),
        (["run.seed=3"], "the settings file must come first"),
        (["a.yaml", "--lr", "3"], "--lr: unknown option"),
        (["nowhere.yaml"], "cannot read"),
    ],
)
def test_a_wrong_command_line_is_explained(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(arguments, "rl")
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_the_world_size_comes_from_the_environment(capsys, monkeypatch, config_file):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        parse_command_line([str(config_file), "parallel.tp=2"], "rl")
    assert "world size is 3" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SystemExit):
        parse_command_line([str(config_file)], "rl")
    assert "WORLD_SIZE" in capsys.readouterr().err
    assert parse_command_line([str(config_file)], "rl", 4).run.seed == 1234


def test_check_says_what_would_be_done_and_leaves(capsys, monkeypatch, config_file, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "6")
    run = tmp_path / "a run"
    arguments = [str(config_file), f"run.dir={run}", "parallel.tp=2", "rl.steps=7"]
    for argv in (["--check", *arguments], [*arguments, "--check"]):
        with pytest.raises(SystemExit) as caught:
            parse_command_line(argv, "rl")
        assert caught.value.code == 0
        lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
        assert lines["run.dir"] == str(run)
        assert lines["layout"] == "6 ranks: tp 2, pp 1, cp 1, dp 3"
        assert lines["start"].startswith("new")
        assert lines["training"].startswith("7 steps of ")
    assert not run.exists(), "checking leaves nothing behind"


def test_check_tells_a_resume_from_a_new_run(capsys, config_file, tmp_path):
    for step in (20, 100):
        saved = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        saved.mkdir(parents=True)
        (saved / "manifest.json").touch()
    with pytest.raises(SystemExit):
        parse_command_line(["--check", str(config_file), f"run.dir={tmp_path / 'run'}"], "rl")
    assert "start: resume step_00000100\n" in capsys.readouterr().out


def test_check_refuses_what_the_run_would_refuse(capsys, config_file):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--check", str(config_file), "run.seed=x"], "rl")
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "run.seed" in captured.err
