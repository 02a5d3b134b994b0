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
    assert out.startswith("usage: python -m megatron_klear.train_rl CONFIG.yaml")
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
