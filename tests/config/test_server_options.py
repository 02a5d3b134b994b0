"""What servers at `sglang.urls` are started with, as the settings check tells it to the Slurm jobs."""

from __future__ import annotations

import json
from collections.abc import Callable

from megatron_klear.config import Settings
from megatron_klear.config.outlook import outlook
from megatron_klear.rollout.sglang.updatable import update_problems

Load = Callable[..., Settings]
SERVED = ("rollout.engine=sglang", "sglang.urls=[http://10.0.0.1:30000]")


def options(settings: Settings) -> list[str]:
    lines = dict(line.split(": ", 1) for line in outlook(settings, entry="rl", world_size=1).splitlines())
    return lines.get("engine options", "").split()


def test_a_server_gets_the_longest_sequence_and_the_runs_data_type(load: Load) -> None:
    found = options(load(*SERVED, "model.dtype=bfloat16", "rollout.batch_responses=64"))
    # 64 tokens of prompt, 128 of response and 8 that SGLang keeps.
    assert found == [
        "--context-length", "200", "--incremental-streaming-output", "--dtype", "bfloat16",
        "--max-running-requests", "64",
    ]  # fmt: skip
    longer = options(load(*SERVED, "evaluation.max_response_tokens=256"))
    assert longer[:2] == ["--context-length", "328"]
    deterministic = options(load(*SERVED, "sglang.deterministic=true", "sglang.dtype=float32"))
    assert deterministic[-1] == "--enable-deterministic-inference"
    assert deterministic[deterministic.index("--dtype") + 1] == "float32"


def test_a_server_that_quantises_can_be_sent_weights(load: Load) -> None:
    found = options(load(*SERVED, "sglang.quantization=fp8", "weight_sync.verify=logprobs"))
    told = {"quantization": found[found.index("--quantization") + 1]}
    told["load_format"] = found[found.index("--load-format") + 1]
    assert told["quantization"] == "fp8"
    assert update_problems(told, "logprobs") == []


def test_a_server_has_the_rotary_embedding_of_the_run(load: Load) -> None:
    stretched = (*SERVED, "yarn.factor=4", "yarn.original_positions=100")
    everything = options(load(*stretched, "yarn.apply_to=everything"))
    laid_over = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}}
    assert everything[-2] == "--json-model-override-args"
    assert json.loads(everything[-1]) == laid_over, "one word, as a shell takes it"
    evaluated = load(*stretched, "yarn.apply_to=evaluation", "evaluation.at_end=false")
    assert "--json-model-override-args" not in options(evaluated), "in RL servers compute what the trainer computes"


def test_the_engine_inside_the_trainer_needs_none(load: Load) -> None:
    assert options(load()) == []
