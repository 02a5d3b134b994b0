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


@pytest.mark.parametrize("more", [(), ("parallel.pp=2", "parallel.cp=2", "fp8.recipe=tensorwise")])
def test_activations_are_told_for_every_recompute_policy(run: Run, more: tuple[str, ...]) -> None:
    kept = {}
    for policy in ("none", "selective", "full"):
        _, out, _ = run(*GOOD, *more, f"model.recompute={policy}", "--json")
        plan = json.loads(out)["plan"]
        kept[policy] = max(stage["activations"] for stage in plan["stages"])
        told = plan["activations_by_recompute"]
    assert told == kept
    assert min(kept["none"], kept["selective"]) > kept["full"] > 0
    _, out, _ = run(*GOOD, *more)
    figures = ", ".join(f"{policy} {value / 1e9:,.2f}" for policy, value in kept.items())
    assert f"activations by recompute policy (model.recompute), GB on the stage that keeps most: {figures}\n" in out


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


@pytest.mark.parametrize(
    ("setting", "gpu", "named"),
    [
        ("optimizer.schedule=cosine optimizer.min_lr=1", "h100", "optimizer.min_lr"),
        ("fp8.recipe=tensorwise", "a100", "fp8.recipe"),
        # An odd budget is none for any layout: ranks of context parallelism take two parts of a sequence each.
        ("packing.token_budget=32767", "h100", "packing.token_budget"),
    ],
)
def test_what_is_wrong_in_every_layout_is_not_blamed_on_layouts(run: Run, setting: str, gpu: str, named: str) -> None:
    status, out, err = run("parallel.tp=3", *setting.split(), "--entry", "sft", "--search", gpu=gpu)
    assert status == 2
    assert f"  - {named}: " in err
    assert out == f"--search: no layout is searched for until the above is changed: {named}\n"
    status, out, _ = run("parallel.tp=3", *setting.split(), "--entry", "sft", "--search", "--json", gpu=gpu)
    found = json.loads(out)
    assert (status, found["layouts"], found["not_searched_for"]) == (2, [], [named])


def test_what_some_layouts_allow_is_searched_past(run: Run) -> None:
    """32,740 = 4 x 8,185 tokens can be shared by two context parallel ranks, not by eight."""
    status, out, _ = run("packing.token_budget=32740", "parallel.cp=8", "--entry", "sft", "--search", "--json")
    found = json.loads(out)
    assert status == 2
    assert found["problems"][0].startswith("packing.token_budget: got 32740")
    assert found["not_searched_for"] == []
    assert {layout["layout"]["cp"] for layout in found["layouts"]} <= {1, 2}
    assert found["layouts"]


@pytest.mark.parametrize(
    ("entry", "settings", "dp", "named"),
    [
        ("sft", ("sft.batch_sequences=31",), 32, "31 sequences (sft.batch_sequences)"),
        ("sft", ("sft.batch_bins=16",), 32, "16 bins (sft.batch_bins)"),
        ("rl", ("rl.minibatch_prompts=4", "rl.prompts_per_step=16", "rollout.responses_per_prompt=4",
                "rollout.engine=sglang"), 32,
         "16 responses (rl.minibatch_prompts * rollout.responses_per_prompt)"),
    ],
)  # fmt: skip
def test_more_ranks_than_an_update_has_work_for_are_refused(
    run: Run, entry: str, settings: tuple[str, ...], dp: int, named: str
) -> None:
    shared = (*settings, "--entry", entry, "--search", "--json", "packing.token_budget=32768")
    status, out, _ = run("parallel.cp=2", *shared, gpus=64)
    found = json.loads(out)
    (problem,) = found["problems"]
    assert status == 2
    assert problem.startswith(f"--gpus: got 64, which with tp * pp * cp = 1 * 1 * 2 are {dp} data-parallel ranks")
    assert named in problem
    # Layouts with fewer data-parallel ranks are ranked all the same.
    assert {layout["layout"]["dp"] for layout in found["layouts"]} <= {1, 2, 4, 8, 16}
    assert found["layouts"]
    assert not json.loads(run("parallel.cp=8", *shared, gpus=64)[1])["problems"]


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


def test_servers_on_the_trainers_gpus_are_planned_machine_by_machine(run: Run) -> None:
    rl = ("--entry", "rl", "parallel.tp=8", "parallel.sequence_parallel=true", "model.recompute=full",
          "rollout.engine=sglang", "sglang.placement=colocated", "sglang.server_tp=2")  # fmt: skip
    status, out, err = run(*rl, "sglang.servers=4", gpus=256)
    assert (status, err) == (0, ""), "four servers on each of 32 nodes"
    assert "fits: " in out
    _, out, _ = run(*rl, "sglang.max_total_tokens=81920", "data.max_prompt_tokens=2048",
                    "rollout.max_response_tokens=30720", "rollout.batch_responses=64")  # fmt: skip
    assert "holds 81,920 tokens = 2.5 longest responses of 32,768 with their prompts, of 64 at a time" in out
    status, _, err = run(*rl, "sglang.servers=128", gpus=256)
    assert status == 2
    assert "sglang.servers: got 128 of sglang.server_tp = 2, which need 256 GPUs of a machine" in err
    assert "colocated with 8 ranks on it; set at most 4" in err


def test_a_replay_is_planned_without_an_engine(run: Run) -> None:
    layout = (*GOOD[:3], "--entry", "rl", "model.recompute=full", "rollout.engine=local", "--json")
    replay = ("scheduling.replay_from=recorded", "evaluation.at_end=false", "evaluation.every_steps=0")
    stages = [json.loads(run(*layout, *more)[1])["plan"]["stages"][0] for more in ((), replay)]
    assert stages[0]["engine_weights"] > 0
    assert stages[1]["engine_weights"] == stages[1]["kv_cache"] == 0


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
        (("--gpus", "65537", "--gpu", "h100"), "argument --gpus: got 65,537, expected at most 65,536"),
        (("--gpus", "100000000", "--gpu", "h100"), "argument --gpus: got 100,000,000, expected at most 65,536"),
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
