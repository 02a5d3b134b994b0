"""What a user gets wrong is answered at once, with exit status 2, in words that name the setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

SFT = "examples/quickstart_sft.yaml"
RL = "examples/quickstart_rl.yaml"


def refused(start, entry: str, config: str | Path, overrides, *expected: str, ranks: int = 1) -> str:
    launch = start(entry, config, overrides, ranks=ranks)
    assert launch.wait(120) == [2] * ranks, launch.output()
    text = launch.output()
    assert "Traceback" not in text, text
    for words in expected:
        assert words in text, text
    return text


def test_wrong_settings_are_all_named_at_once(start, sft_overrides):
    refused(
        start,
        "train_sft",
        SFT,
        [*sft_overrides("run"), "optimizer.lrr=1", "sft.steps=many", "parallel.tp=3", "model.num_query_groups=3"],
        "optimizer.lrr", "did you mean optimizer.lr", "sft.steps", "parallel: the world size", "model.num_query_groups",
    )  # fmt: skip


def test_files_that_are_not_there(start, sft_overrides, tmp_path):
    refused(
        start,
        "train_sft",
        SFT,
        [*sft_overrides("run"), f"data.sft=[{tmp_path}/no.jsonl]", f"tokenizer.dir={tmp_path}/nothing"],
        "data.sft", "no.jsonl", "tokenizer.dir",
    )  # fmt: skip


def test_precision_and_attention_that_this_machine_does_not_have_are_told_before_data_is_read(
    start, sft_overrides, tmp_path
):
    unread = tmp_path / "unread.jsonl"
    unread.write_text("not JSON\n")
    asked = ["fp8.recipe=tensorwise", "model.attention=cudnn", "model.dtype=bfloat16", "run.device=auto"]
    asked.append("profile.tool=nsys")
    sizes = ["model.head_dim=16", "model.num_attention_heads=4", "model.num_query_groups=2"]
    text = refused(
        start, "train_sft", SFT, [*sft_overrides("run"), *asked, *sizes, f"data.sft=[{unread}]"],
        "fp8.recipe: got tensorwise, which needs a GPU", "model.attention: cudnn was asked for",
        "profile.tool: got nsys, which records a GPU, and there is none; set torch",
    )  # fmt: skip
    assert "unread.jsonl" not in text


def test_empty_data_set(start, sft_overrides, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(start, "train_sft", SFT, [*sft_overrides("run"), f"data.sft=[{empty}]"], "data.sft", "empty.jsonl")


def test_malformed_line_is_named_by_file_and_line(start, sft_overrides, data, tmp_path):
    rows = (data / "sft.jsonl").read_text().splitlines()[:20]
    rows[6] = rows[6][:-5]
    rows[11] = json.dumps({"id": "x", "messages": []})
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(rows) + "\n")
    text = refused(
        start,
        "train_sft",
        SFT,
        [*sft_overrides("run"), f"data.sft=[{broken}]", "data.max_reject_share=0.01"],
        "2 of 20 rows cannot be used", "broken.jsonl:7", "broken.jsonl:12", "data.max_reject_share",
        ranks=2,
    )  # fmt: skip
    assert text.count("broken.jsonl:7") == 1, "said once for all ranks"


def test_prompt_longer_than_the_limit(start, rl_overrides):
    refused(start, "train_rl", RL, [*rl_overrides("run"), "data.max_prompt_tokens=6"], "data.max_prompt_tokens")


def test_tokenizer_without_the_chat_markers(start, rl_overrides, data, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(data / "tokenizer", plain)
    for name in ("chat_template.jinja",):
        (plain / name).unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    refused(start, "train_rl", RL, [*rl_overrides("run"), f"tokenizer.dir={plain}"], "tokenizer.dir", "template")


def test_heldout_problem_that_is_trained_on(start, rl_overrides, data):
    refused(start, "train_rl", RL, [*rl_overrides("run"), f"data.heldout=[{data / 'prompts.jsonl'}]"], "data.heldout")


def test_code_problems_whose_tests_cannot_be_used_are_refused_by_name(start, rl_overrides, data, tmp_path):
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    for row in rows:
        row["domain"], row["reference"] = "code", '[{"input": "1", "output": "1"}]'
    code = tmp_path / "code.jsonl"
    code.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(
        start,
        "train_rl",
        RL,
        [*rl_overrides("run"), f"data.prompts=[{code}]"],
        "data.prompts: the tests of",
        rows[0]["id"],
    )


@pytest.mark.parametrize("entry", ["train_sft", "train_rl"])
def test_help_lists_every_setting(start, entry):
    launch = start(entry, "--help", ranks=1)
    assert launch.wait(60) == [0]
    for words in ("optimizer.lr", "packing.token_budget", "tokens", "rollout.temperature"):
        assert words in launch.output()


def test_run_of_the_other_entry_is_refused_and_left_as_it_is(start, sft_overrides, rl_overrides, tmp_path):
    launch = start("train_sft", SFT, [*sft_overrides("run"), "sft.steps=1", "evaluation.at_end=false"], ranks=1)
    assert launch.wait() == [0], launch.output()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    refused(start, "train_rl", RL, rl_overrides("run"), "run.dir", "holds a run of train_sft", "checkpoint.start_from")
    refused(start, "train_sft", SFT, [*sft_overrides("run"), "run.seed=7", "model.num_layers=3"], "run.seed: was 1",
            "model.num_layers: was 2")  # fmt: skip
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
