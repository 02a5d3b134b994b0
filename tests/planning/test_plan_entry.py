"""The command line of the planner: every reason at once, tables, JSON, exit status, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klear.plan import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, gpus: int = 8, gpu: str = "h100") -> tuple[int, str, str]:
        status = main([str(config), *arguments, "--gpus", str(gpus), "--gpu", gpu])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


GOOD = ("parallel.tp=2", "parallel.cp=4", "parallel.sequence_parallel=true", "--entry", "sft")


def test_a_plan_shows_memory_traffic_time_and_what_they_rest_on(run: Run) -> None:
    status, out, err = run(*GOOD)
    assert (status, err) == (0, "")
    for words in ("optimizer", "activations", "head chunk", "sequence parallel", "context parallel", "bubble", "MFU",
                  "fits: ", "host memory while a checkpoint is gathered", "assumed: H100 SXM 80 GB: 989.4 TFLOP/s",
                  "assumed: products run at 60%"):  # fmt: skip
        assert words in out, words


def test_every_reason_is_told_at_once_by_its_setting(run: Run) -> None:
    status, out, err = run(
        "parallel.tp=3", "parallel.pp=5", "parallel.overlap_param_gather=true", "packing.token_budget=32767",
        "parallel.sequence_parallel=true", "--entry", "sft",
    )  # fmt: skip
    assert (status, out) == (2, "")
    for name in ("parallel: the world size is 8", "model.num_layers: got 36", "model.num_attention_heads: got 32",
                 "model.num_query_groups: got 8", "parallel.overlap_param_gather: got true",
                 "packing.token_budget: got 32767", "model.vocab_multiple: got 128"):  # fmt: skip
        assert name in err, name


def test_what_does_not_fit_is_status_2_and_the_search_says_what_would(run: Run) -> None:
    status, out, _ = run("--entry", "sft", "--search")
    assert status == 2
    assert "DOES NOT FIT" in out
    assert "the first as settings: parallel.tp=2 parallel.pp=1 parallel.cp=4" in out


def test_the_search_also_helps_a_layout_that_is_impossible(run: Run) -> None:
    status, out, err = run("parallel.tp=3", "--entry", "sft", "--search", "--top", "3")
    assert status == 2
    assert "parallel: the world size is 8" in err
    assert "layouts that fit, fastest first" in out
    assert "MFU" in out


def test_nothing_fits_is_said_with_what_to_change(run: Run) -> None:
    status, out, _ = run("--entry", "sft", "--search", gpus=1)
    assert status == 2
    assert "no layout fits on 1 x H100 SXM 80 GB: use more or larger devices (--gpus, --gpu)" in out


def test_json_has_the_same_figures(run: Run) -> None:
    status, out, _ = run(*GOOD, "--json", "--search", "--top", "2")
    found = json.loads(out)
    assert status == 0
    assert found["problems"] == []
    plan = found["plan"]
    assert plan["layout"] | {"tp": 2, "cp": 4, "dp": 1} == plan["layout"]
    assert plan["fits"] is True
    assert plan["stages"][0]["weights"] == pytest.approx(2 * 8_190_735_360 / 2, rel=1e-3)
    assert plan["step"]["seconds"]["total"] == pytest.approx(sum(
        seconds for name, seconds in plan["step"]["seconds"].items() if name != "total"
    ))  # fmt: skip
    assert len(found["layouts"]) == 2
    assert found["layouts"][0]["step"]["seconds"]["total"] <= found["layouts"][1]["step"]["seconds"]["total"]
    status, out, _ = run("parallel.tp=3", "--entry", "sft", "--json")
    assert status == 2
    assert json.loads(out)["plan"] is None
    assert json.loads(out)["problems"]


def test_the_entry_is_the_one_that_data_is_given_for(run: Run) -> None:
    status, _, err = run("parallel.tp=2")
    assert status == 2
    assert "--entry: both data.sft and data.prompts name files; say sft or rl" in err
    status, out, _ = run("data.sft=[]", *GOOD[:3], "rollout.engine=sglang", "model.recompute=full")
    assert status == 0
    assert "the time to generate responses is not predicted" in out
    _, out, _ = run("data.prompts=[]", *GOOD[:3])
    assert "128 sequences" in out
    status, _, err = run("data.prompts=[]", "data.sft=[]")
    assert "neither data.sft nor data.prompts names files" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "0"), "expected a whole number of at least 1"),
        (("--gpus", "8.5"), "expected a whole number of at least 1"),
        (("--gpus", "8", "--gpu", "tpu"), "invalid choice"),
        (("--gpus", "8", "--gpu", "h100", "--efficiency", "1.2"), "above 0 and at most 1"),
        (("--gpus", "8", "--gpu", "h100", "--efficiency", "much"), "above 0 and at most 1"),
        (("--gpus", "8", "--gpu", "h100", "--mean-tokens", "nan"), "expected a number of at least 1"),
        (("--gpu", "h100"), "--gpus"),
    ],
)
def test_nonsense_on_the_command_line_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(config), *arguments])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_settings_that_cannot_be_read_are_status_2(run: Run, tmp_path: Path) -> None:
    status, _, err = run("modle.preset=x", "--entry", "sft")
    assert status == 2
    assert "modle: unknown section; did you mean model?" in err
    status, _, err = run(str(tmp_path / "absent.yaml"), "--entry", "sft")
    assert status == 2
    assert "cannot read the settings file" in err


def test_torch_is_not_imported(config: Path) -> None:
    program = (
        "import sys\n"
        "from megatron_klear.plan import main\n"
        f"main([{str(config)!r}, '--entry', 'sft', '--gpus', '8', '--gpu', 'h100', '--search'])\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
