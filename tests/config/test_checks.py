"""Settings that are fine one by one and cannot work together, and inputs that are not there."""

from __future__ import annotations

import json

import pytest

SGLANG = ["rollout.engine=sglang"]
COLOCATED = [*SGLANG, "sglang.placement=colocated"]
ROUTED = [*SGLANG, "sglang.urls=[http://a:1,http://b:1]", "sglang.router_url=http://r:1"]


@pytest.mark.parametrize("entry", ["sft", "rl"])
def test_the_base_settings_have_no_problem(problems, entry):
    assert problems(entry=entry) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "path", "words"),
    [
        (["parallel.tp=2"], 3, "parallel", "world size is 3"),
        (["parallel.tp=2", "parallel.pp=2", "parallel.cp=2"], 4, "parallel", "= 8"),
        (["parallel.tp=4"], 4, "model.num_query_groups", "must be a multiple of parallel.tp = 4"),
        (["parallel.tp=8", "model.num_query_groups=8"], 8, "model.num_query_groups", "num_attention_heads"),
        (["parallel.tp=2", "model.ffn_hidden_size=97"], 2, "model.ffn_hidden_size", "parallel.tp = 2"),
        (["parallel.pp=3"], 3, "model.num_layers", "parallel.pp = 3"),
        (["parallel.tp=2", "model.vocab_multiple=1", "model.vocab_size=511"], 2, "model.vocab_multiple", "511"),
        (["parallel.cp=3"], 3, "packing.token_budget", "2 * parallel.cp = 6"),
        (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel", "parallel.tp above 1"),
        (
            ["parallel.tp=2", "parallel.sequence_parallel=true", "packing.token_budget=1026", "parallel.cp=2"],
            4,
            "packing.token_budget",
            "= 4",
        ),
        (["parallel.overlap_param_gather=true"], 1, "parallel.overlap_param_gather", "overlap_grad_reduce"),
        (["rl.prompts_per_step=10", "rl.minibatch_prompts=4"], 1, "rl.prompts_per_step", "got 10"),
        (["correction.kind=token", "rollout.top_p=0.9"], 1, "correction.kind", "rollout.top_p = 0.9"),
        (["rollout.max_response_tokens=1000"], 1, "rollout.max_response_tokens", "packing.token_budget = 1024"),
        (["model.max_position_embeddings=100"], 1, "rollout.max_response_tokens", "max_position_embeddings = 100"),
        (["evaluation.max_response_tokens=5000"], 1, "evaluation.max_response_tokens", "5064"),
        (["optimizer.schedule=cosine", "optimizer.min_lr=1"], 1, "optimizer.min_lr", "optimizer.lr"),
        (["sft.steps=3"], 1, "sft.steps", "exactly one"),
        (["reward.wrong=2"], 1, "reward.wrong", "reward.correct"),
        (["reward.malformed=0"], 1, "reward.malformed", "reward.wrong"),
        (["code_reward.wrong=1"], 1, "code_reward.wrong", "code_reward.correct"),
        (["code_reward.malformed=0.5"], 1, "code_reward.malformed", "code_reward.wrong"),
        (["code_reward.wall_seconds=1"], 1, "code_reward.wall_seconds", "code_reward.cpu_seconds"),
        (
            ["code_reward.allow_processes=true", "code_reward.sandbox=rlimits"],
            1,
            "code_reward.allow_processes",
            "bubble",
        ),
        (["code_reward.warm_modules=[no-module]"], 1, "code_reward.warm_modules", "'no-module' is no name of a module"),
        (["code_reward.extra_paths=[nowhere]"], 1, "code_reward.extra_paths", "nowhere is no folder"),
        (["model.attention=flash", "model.dtype=float32"], 1, "model.attention", "bfloat16"),
        (["model.attention=te", "model.layer_spec=local"], 1, "model.attention", "layer_spec"),
        (["run.device=cpu", "model.attention=flash"], 1, "model.attention", "GPU"),
        (["run.device=cpu", "model.layer_spec=te"], 1, "model.layer_spec", "GPU"),
        (["run.device=cuda", "model.attention=cpu"], 1, "model.attention", "cuda"),
        (["evaluation.every_steps=2", "data.heldout=[]"], 1, "evaluation.every_steps", "data.heldout"),
        (["data.prompts=[]"], 1, "data.prompts", "names no file"),
        (["data.prompts=[nowhere.jsonl]"], 1, "data.prompts", "no file nowhere.jsonl"),
        (["data.heldout=[.]"], 1, "data.heldout", "not a file"),
        (["tokenizer.dir=nowhere"], 1, "tokenizer.dir", "no directory"),
        (["model.vocab_size=5"], 1, "model.vocab_size", "fewer than the 6"),
        (["model.hf_dir=nowhere"], 1, "model.hf_dir", "No such file"),
        (["scheduling.mode=async"], 1, "scheduling.mode", "rollout.engine is local"),
        (["scheduling.start_seconds=5"], 1, "scheduling.start_seconds", "scheduling.stall_seconds = 120"),
        (["scheduling.rollout_only=true", "scheduling.mode=async"], 1, "scheduling.rollout_only", "mode is async"),
        (["scheduling.rollout_only=true", "scheduling.replay_from=x"], 1, "scheduling.rollout_only", "replay_from"),
        (["scheduling.replay_first_step=2"], 1, "scheduling.replay_first_step", "set scheduling.replay_from"),
        (["scheduling.replay_last_step=2"], 1, "scheduling.replay_last_step", "set scheduling.replay_from"),
        (["scheduling.replay_from=nowhere"], 1, "scheduling.replay_from", "no ledger.sqlite"),
        (["checkpoint.start_from=nowhere"], 1, "checkpoint.start_from", "no directory"),
        (["checkpoint.start_from=/"], 1, "checkpoint.start_from", "no checkpoint in /"),
        (["tokenizer.think_end=<think>"], 1, "tokenizer.think_end", "must differ"),
        ([*SGLANG, "sglang.venv=nowhere"], 1, "sglang.venv", "no nowhere/bin/python; run tools/setup_sglang.sh"),
        ([*SGLANG, "sglang.urls=[host:80]"], 1, "sglang.urls", "'host:80', must be http://HOST:PORT"),
        ([*SGLANG, "sglang.urls=[http://h:3000O]"], 1, "sglang.urls", "'http://h:3000O', must be http://HOST:PORT"),
        ([*SGLANG, "sglang.urls=['http://[::1:3']"], 1, "sglang.urls", "'http://[::1:3', must be http://HOST:PORT"),
        ([*SGLANG, "sglang.urls=[http://a:1,http://a:1]"], 1, "sglang.urls", "more than once"),
        ([*ROUTED, "sglang.urls=[]"], 1, "sglang.router_url", "name the servers behind the router, which get weights"),
        ([*ROUTED, "sglang.router_url=r:1"], 1, "sglang.router_url", "'r:1', must be http://HOST:PORT"),
        ([*ROUTED, "sglang.router_url=http://r"], 1, "sglang.router_url", "'http://r', must be http://HOST:PORT"),
        ([*ROUTED, "scheduling.min_engines=2"], 1, "scheduling.min_engines", "behind sglang.router_url count as one"),
        (
            [*SGLANG, "scheduling.min_engines=2"],
            1,
            "scheduling.min_engines",
            "got 2 of 1 engines (sglang.servers = 1 on",
        ),
        ([*COLOCATED, "scheduling.min_engines=2"], 1, "scheduling.min_engines", "set at most 1"),
        (
            [*SGLANG, "sglang.urls=[http://a:1,http://b:1]", "scheduling.min_engines=3"],
            8,
            "scheduling.min_engines",
            "got 3 of 2 engines (sglang.urls); set at most 2",
        ),
        ([*SGLANG, "sglang.connect_seconds=9"], 1, "sglang.connect_seconds", "got 9 without sglang.urls"),
        ([*SGLANG, "sglang.restart_requests=r"], 1, "sglang.restart_requests", "got r without sglang.urls"),
        ([*SGLANG, "sglang.server_tp=3"], 1, "model.num_attention_heads", "a multiple of sglang.server_tp = 3"),
        ([*SGLANG, "sglang.port=65535", "sglang.servers=2"], 1, "sglang.port", "2 servers need ports up to 65536"),
        ([*SGLANG, "sglang.quantization=fp8"], 1, "weight_sync.verify", "set logprobs or checksum_or_logprobs"),
        ([*SGLANG, "weight_sync.timeout_seconds=1700"], 1, "weight_sync.timeout_seconds", "parallel.timeout_seconds"),
        ([*SGLANG, "parallel.timeout_seconds=1000"], 1, "weight_sync.timeout_seconds", "twice 60 s"),
        ([*SGLANG, "sglang.quantization=fp8"], 1, "sglang.quantization", "set model.hf_dir"),
        (
            [*SGLANG, "sglang.quantization=fp8", "weight_sync.pause_mode=retract"],
            1,
            "weight_sync.pause_mode",
            "set abort",
        ),
        (
            [*SGLANG, "weight_sync.verify=logprobs", "weight_sync.pause_mode=in_place"],
            1,
            "weight_sync.pause_mode",
            "set a",
        ),
        ([*SGLANG, "sglang.extra_args=[--dp-size=2]"], 1, "sglang.extra_args", "set sglang.servers"),
        ([*SGLANG, "sglang.quantization=fp8", "run.device=cpu"], 1, "sglang.quantization", "needs a GPU"),
        ([*SGLANG, "sglang.offload_weights=true"], 1, "sglang.offload_weights", "sglang.placement is separate"),
        ([*COLOCATED, "scheduling.mode=async"], 1, "scheduling.mode", "no memory while the trainer trains"),
        ([*COLOCATED, "scheduling.mode=one_step_off"], 1, "scheduling.mode", "got one_step_off, and sglang.placement"),
        ([*COLOCATED, "sglang.urls=[http://a:1]"], 1, "sglang.urls", "starts its own"),
        ([*COLOCATED, "sglang.first_gpu=1"], 2, "sglang.first_gpu", "leave it 0"),
        ([*COLOCATED, "weight_sync.transport=distributed"], 1, "weight_sync.transport", "set auto, tensor or disk"),
        ([*COLOCATED, "sglang.servers=2", "sglang.server_tp=2"], 3, "sglang.servers", "need 4 GPUs"),
        (
            [*COLOCATED, "sglang.offload_weights=true", "weight_sync.verify=checksum_or_logprobs"],
            1,
            "weight_sync.verify",
            "set checksum, or offload_weights=false",
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused(problems, overrides, world_size, path, words):
    found = problems(*overrides, world_size=world_size)
    assert any(text.startswith(f"{path}: ") and words in text for text in found), found


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2", "parallel.cp=2"], 16),
        (["parallel.tp=2", "model.vocab_size=511"], 2),
        (["parallel.pp=4"], 12),
    ],
)
def test_layouts_that_divide_are_accepted(problems, overrides, world_size):
    assert problems(*overrides, world_size=world_size) == []


def test_what_an_entry_does_not_use_is_not_held_against_it(problems):
    assert problems("data.prompts=[nowhere.jsonl]", "rl.minibatch_prompts=7", entry="sft") == []
    assert problems("data.sft=[nowhere.jsonl]", "sft.epochs=null", entry="rl") == []
    assert problems("rollout.max_response_tokens=900", "data.max_prompt_tokens=900", entry="sft") == []


def test_sft_needs_steps_or_epochs(problems):
    (text,) = problems("sft.epochs=null", entry="sft")
    assert text.startswith("sft.steps: give exactly one")


def test_a_broken_value_does_not_cause_problems_elsewhere(problems):
    (text,) = problems("rl.minibatch_prompts=0")
    assert text.startswith("rl.minibatch_prompts: got 0")
    (text,) = problems("parallel.tp=0", world_size=3)
    assert text.startswith("parallel.tp: got 0")


def test_input_files_that_are_empty_or_named_twice(problems, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    (text,) = problems(f"data.prompts=[{empty}]")
    assert text == f"data.prompts: {empty} is empty"
    twice = tmp_path / "sft.jsonl"
    (text,) = problems(f"data.sft=[{twice},{twice}]", entry="sft")
    assert "more than once" in text


def test_a_directory_that_holds_a_run_is_not_overwritten(problems, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert problems() == []
    (text,) = problems("run.resume=false")
    assert text.startswith("run.dir: ")
    assert "run.resume=true" in text
    (text,) = problems(f"run.dir={tmp_path}/sft.jsonl")
    assert "is a file" in text


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"model": {"vocab": {"a": "x"}}})])
def test_a_malformed_tokenizer_is_refused(problems, tmp_path, content):
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    (text,) = problems()
    assert text.startswith("tokenizer.dir: ")
    assert "is not a tokenizer" in text


def test_a_tokenizer_directory_without_a_vocabulary_is_refused(problems, tmp_path):
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    (text,) = problems()
    assert "no tokenizer.json" in text


def test_weights_must_be_there_and_agree_even_when_every_size_is_given(load, problems, tmp_path, hf_dir):
    settings = load("model.preset=null", f"model.hf_dir={hf_dir}")
    assert settings.model.hidden_size == 64
    sizes = [f"model.{name}={getattr(settings.model, name)}" for name in ("num_layers", "head_dim", "vocab_size")]
    assert problems("model.preset=null", f"model.hf_dir={hf_dir}", *sizes) == []
    (text,) = problems("model.preset=null", f"model.hf_dir={hf_dir}", "model.head_dim=32")
    assert text.startswith("model.head_dim: got 32, the weights in model.hf_dir have 24")
    (hf_dir / "model.safetensors").unlink()
    (text,) = problems("model.preset=null", f"model.hf_dir={hf_dir}")
    assert "no *.safetensors" in text


@pytest.mark.parametrize("place", ["step_00000004", "checkpoints/step_00000004"])
def test_checkpoints_to_start_from_are_found_where_they_may_lie(problems, tmp_path, place):
    start = tmp_path / "start"
    (start / place).mkdir(parents=True)
    (start / place / "manifest.json").touch()
    assert problems(f"checkpoint.start_from={start}") == []
    assert problems(f"checkpoint.start_from={start / place}") == []


def test_a_run_that_has_begun_needs_no_weights_to_start_from(problems, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert problems(f"checkpoint.start_from={tmp_path}/gone") == []


def test_sglang_is_asked_for_only_where_something_is_generated_or_evaluated(problems, tmp_path):
    (tmp_path / "ledger.sqlite").touch()
    bad = [*SGLANG, "sglang.venv=nowhere", "sglang.quantization=fp8", "sglang.port=65535", "sglang.servers=2"]
    replay = [f"scheduling.replay_from={tmp_path}", "scheduling.mode=async"]
    without = ["evaluation.at_end=false", "evaluation.every_steps=0"]
    assert len(problems(*bad)) == 4
    for entry, settings in (("rl", replay), ("sft", [])):
        told = problems(*bad, *settings, entry=entry)
        assert len(told) == 4
        assert any(text.startswith("sglang.venv: ") and "evaluation alone needs it" in text for text in told)
        assert problems(*bad, *settings, *without, entry=entry) == []
        assert problems(*bad, *settings, "data.heldout=[]", entry=entry) == []
    assert problems(*replay) == [], "an asynchronous run can be replayed by any engine's settings"


def test_steps_of_a_replay_are_in_order_and_of_the_run(problems, tmp_path):
    (tmp_path / "ledger.sqlite").touch()
    replay = [f"scheduling.replay_from={tmp_path}", "rl.steps=5"]

    def told(first: int, last: int) -> list[str]:
        return problems(*replay, f"scheduling.replay_first_step={first}", f"scheduling.replay_last_step={last}")

    assert told(3, 3) == told(1, 5) == []
    (below,) = told(4, 3)
    assert below.startswith("scheduling.replay_last_step: got 3, below scheduling.replay_first_step = 4")
    first, last = sorted(told(6, 7))
    assert first.startswith("scheduling.replay_first_step: got 6, beyond rl.steps = 5")
    assert last.startswith("scheduling.replay_last_step: got 7, beyond rl.steps = 5")


def test_sglangs_settings_are_judged_only_when_it_is_the_engine(problems):
    bad = ["sglang.venv=nowhere", "sglang.quantization=fp8"]
    assert problems(*bad) == []
    assert len(problems(*SGLANG, *bad)) == 3
    assert problems(*SGLANG, "sglang.urls=[http://a:1,https://b:443]", "sglang.connect_seconds=60") == []
    assert problems(*ROUTED) == []


def test_servers_that_take_turns_are_on_gpus_of_their_machines_ranks(problems, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch(mode=0o755)
    good = [*COLOCATED, f"sglang.venv={tmp_path}", "sglang.offload_weights=true"]
    assert problems(*good, "sglang.servers=2", "sglang.server_tp=2", world_size=4) == []
    assert problems(*good, "sglang.servers=1", world_size=4) == [], "GPUs may be left alone"
    assert problems(*good, "scheduling.mode=async", entry="sft") == [], "that is no matter of evaluations"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert problems(*good, "sglang.servers=8", world_size=256) == [], "each of 32 machines starts 8"
    (text,) = problems(*good, "sglang.servers=5", "sglang.server_tp=2", world_size=256)
    assert text.startswith("sglang.servers: got 5 of sglang.server_tp = 2, which need 10 GPUs of a machine, and")
    assert text.endswith("with 8 ranks on it; set at most 4")


def test_the_engines_of_all_machines_count_where_the_manager_needs_some_of_them(problems, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch(mode=0o755)
    (tmp_path / "ledger.sqlite").touch()
    ours = [*SGLANG, f"sglang.venv={tmp_path}", "sglang.servers=2"]
    four, five = (f"scheduling.min_engines={number}" for number in (4, 5))
    assert problems(*ours, five, world_size=16) == [], "nothing tells how many machines these are"
    assert problems(*ours, "scheduling.min_engines=2") == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert problems(*ours, four, world_size=16) == []
    (text,) = problems(*ours, five, world_size=16)
    assert text == ("scheduling.min_engines: got 5 of 4 engines (sglang.servers = 2 on each machine); set at most 4")
    assert len(problems(*ours, five, "optimizer.min_lr=1", "optimizer.schedule=cosine", world_size=16)) == 2
    for other in ("scheduling.rollout_only=true", f"scheduling.replay_from={tmp_path}", "rollout.engine=local"):
        assert problems(*ours, five, other, world_size=16) == [], "no manager runs"
    assert problems(*ours, five, entry="sft", world_size=16) == []
    (text,) = problems(*ours, five, "sglang.servers=0", world_size=16)
    assert text.startswith("sglang.servers: got 0")
    (text,) = problems(*ROUTED, "scheduling.min_engines=3")
    assert "count as one" in text
