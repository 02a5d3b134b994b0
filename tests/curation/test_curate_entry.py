"""The command line of curation: help, all problems at once, exit statuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.curation_inputs import row
from megatron_klear import curate
from megatron_klear.config.curation import CURATION, load_curation_settings, stages_of
from megatron_klear.errors import ConfigError

WriteConfig = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


def problems(path: Path, *overrides: str) -> list[str]:
    try:
        load_curation_settings(path, overrides)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_every_setting_is_described(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as leaving:
        curate.run(["--help"])
    assert leaving.value.code == 0
    shown = re.findall(r"^  (\S+)  \[", capsys.readouterr().out, re.MULTILINE)
    assert shown == list(CURATION.fields)
    for path, item in CURATION.fields.items():
        assert len(item.help) > 10, path
        assert item.help.endswith("."), path
        if item.kind.startswith(("integer", "number")) and not path.startswith(("reward.", "code_reward.")):
            assert item.bound, path
            assert item.unit or path == "run.seed" or item.kind.startswith("number"), path


def test_all_problems_are_told_at_once(write_config: WriteConfig, tmp_path: Path, capsys: Captured) -> None:
    config = write_config([row(1)], task="sft", stages=("correctness", "respond", "dedup", "dedup", "decontaminate"))
    overrides = [
        "input.files=[nowhere.jsonl]", "selection.maths=3", "decontamination.ngram=1", "sources.math_top=none",
        f"decontamination.benchmarks=[{tmp_path}/rows.jsonl,absent.parquet]", "run.engine=spark",
        "decontamination.whitelist_file=absent.txt", "teacher.hf_dir=absent", "teacher.engine=sglang",
        "teacher.urls=[nonsense,'http://[::1:1',http://a:99999]", "reward.wrong=2",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as leaving:
        curate.run([str(config), *overrides])
    assert leaving.value.code == 2
    told = capsys.readouterr().err
    for text in (
        "run.stages: dedup is named more than once",
        "run.stages: respond must come before correctness",
        "input.files: no file nowhere.jsonl",
        "selection.maths: unknown setting; did you mean selection.math?",
        "decontamination.ngram: got 1, expected integer, at least 2",
        "sources.math_top: got 'none' (text), expected integer, at least 1",
        "run.engine: got 'spark' (text), allowed: local, ray",
        "decontamination.benchmarks: no file absent.parquet",
        "decontamination.whitelist_file: no file absent.txt",
        "teacher.hf_dir: no directory absent",
        "teacher.urls: got 'nonsense', must be http://HOST:PORT",
        "teacher.urls: got 'http://[::1:1', must be http://HOST:PORT",
        "teacher.urls: got 'http://a:99999', must be http://HOST:PORT",
        "reward.wrong: got 2.0, must be below reward.correct = 1.0",
    ):
        assert text in told, told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("decontamination.benchmarks=[]", "decontamination.benchmarks: names no file; name the benchmarks to keep out"),
        ("run.result_format=parquet", "run.result_format: got parquet, and data.prompts"),
        ("teacher.responses=8", "teacher.responses: got 8, must be at least solvable.k = 16"),
        ("run.stages=[correctness]", "run.stages: correctness makes rows to fine-tune on, and run.task is rl"),
        ("run.dir={config}", "run.dir: {config} is a file, expected a directory"),
        ("sampler.urls=[http://a:1]", None),
        ("sources.math_ranking=[a,b,a]", "sources.math_ranking: 'a' is named more than once"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together(
    write_config: WriteConfig, tmp_path: Path, override: str, problem: str | None
) -> None:
    (tmp_path / "bench.jsonl").write_text('{"problem": "x"}\n')
    config = write_config([row(1)], decontamination={"benchmarks": [str(tmp_path / "bench.jsonl")]})
    assert problems(config) == []
    found = problems(config, override.format(config=config))
    assert [text.startswith(problem.format(config=config)) for text in found] == [True] if problem else found == []


def test_a_benchmark_that_is_also_input_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config([row(1)], decontamination={"benchmarks": [str(tmp_path / "rows.jsonl")]})
    (text,) = problems(config)
    assert "is also one of input.files" in text


def test_stages_of_the_paper(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config([row(1)], task="sft", decontamination={"benchmarks": [str(tmp_path / "config.yaml")]})
    assert stages_of(load_curation_settings(config)) == (
        "dedup", "decontaminate", "respond", "difficulty", "correctness",
    )  # fmt: skip
    chosen = load_curation_settings(config, ["sources.code_ranking=[a]", "selection.math=5"])
    assert stages_of(chosen)[2:4] == ("sources", "select")
    rl = load_curation_settings(config, ["run.task=rl"])
    assert stages_of(rl) == ("dedup", "decontaminate", "tests", "solvable")


def test_a_run_from_the_command_line(write_config: WriteConfig, tmp_path: Path, capsys: Captured) -> None:
    config = write_config([row(1), row(1), row(2)], stages=("dedup",), input={"max_reject_share": 0.5})
    assert curate.run([str(config)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"curation: rows=2 files=1 report={tmp_path / 'run' / 'audit.html'}"
    assert curate.run([str(config), "input.max_reject_share=0"]) == 2
