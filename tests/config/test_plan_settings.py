"""Settings of a plan: files may be elsewhere, and every other problem is told."""

from __future__ import annotations

import pytest

from megatron_klear.config import load_settings
from megatron_klear.config.plan_settings import judge_plan
from megatron_klear.errors import ConfigError


def test_a_plan_needs_no_files_but_every_other_problem_is_told(config_file):
    elsewhere = ["model.hf_dir=/nowhere/8b", "data.sft=[/nowhere/a.jsonl]", "tokenizer.dir=/nowhere/8b"]
    settings, problems = judge_plan(config_file, elsewhere, entry="sft", world_size=4)
    assert problems == []
    assert settings.model.num_layers == 4
    with pytest.raises(ConfigError, match=r"model\.hf_dir"):
        load_settings(config_file, elsewhere, entry="sft", world_size=4)
    settings, problems = judge_plan(
        config_file, [*elsewhere, "parallel.tp=8", "parallel.pp=3"], entry="sft", world_size=4
    )
    assert sorted(problem.split(":")[0] for problem in problems) == [
        "model.num_attention_heads", "model.num_layers", "model.num_query_groups", "parallel",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"parallel\.tp: got 0"):
        judge_plan(config_file, ["parallel.tp=0"], entry="sft", world_size=4)
    with pytest.raises(ConfigError, match=r"model\.preset: no architecture"):
        judge_plan(config_file, ["model.preset=null", "model.hf_dir=/nowhere/8b"], entry="sft", world_size=4)


def test_servers_that_quantise_are_planned_with_weights_that_are_elsewhere(config_file):
    served = ["rollout.engine=sglang", "sglang.quantization=fp8", "weight_sync.verify=logprobs", "run.device=auto"]
    _, problems = judge_plan(config_file, [*served, "model.hf_dir=/nowhere/8b"], entry="rl", world_size=1)
    assert problems == []
    _, (problem,) = judge_plan(config_file, served, entry="rl", world_size=1)
    assert problem.startswith("sglang.quantization: got fp8")
    assert "set model.hf_dir" in problem
