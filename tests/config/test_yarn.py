"""Which YaRN applies where, and contradictions that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klear.config import PRESETS, Settings
from megatron_klear.config.yarn import Yarn, YarnSettings, yarn_of_hf_config

ARCH = PRESETS["qwen3-8b"]
YARN = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512}


def test_training_and_evaluation_have_their_own_positions() -> None:
    paper = YarnSettings(factor=2.5, original_positions=32768)
    assert paper.in_training(ARCH) is None
    assert paper.scaling(ARCH) == Yarn(factor=2.5, original_positions=32768)
    assert (paper.training_positions(ARCH), paper.evaluation_positions(ARCH)) == (40960, 81920)
    everything = YarnSettings(factor=2.0, apply_to="everything")
    assert everything.in_training(ARCH) == everything.scaling(ARCH) == Yarn(factor=2.0, original_positions=40960)
    assert everything.training_positions(ARCH) == 81920
    assert YarnSettings().scaling(ARCH) is None
    # A factor that gives fewer positions than the model has takes none away.
    assert YarnSettings(factor=1.1, original_positions=32768).evaluation_positions(ARCH) == 40960


def test_longer_evaluations_need_it_and_longer_training_needs_it_everywhere(problems: Callable[..., list[str]]) -> None:
    evaluate = ["model.max_position_embeddings=256", "evaluation.max_response_tokens=400"]
    (text,) = problems(*evaluate)
    assert text.startswith("evaluation.max_response_tokens:")
    assert not problems(*evaluate, "yarn.factor=2.5")
    train = ["model.max_position_embeddings=100", "evaluation.at_end=false", "yarn.factor=2"]
    (text,) = problems(*train)
    assert text.startswith("rollout.max_response_tokens: got 128; with data.max_prompt_tokens = 64")
    assert not problems(*train, "yarn.apply_to=everything")


@pytest.mark.parametrize(
    ("overrides", "entry", "path", "words"),
    [
        (["yarn.factor=1"], "rl", "yarn.factor", "above 1"),
        (["yarn.original_positions=64"], "rl", "yarn.original_positions", "needs yarn.factor"),
        (["yarn.factor=2", "yarn.original_positions=9999"], "sft", "yarn.original_positions", "4096"),
        (["yarn.factor=2", "rollout.engine=sglang"], "rl", "yarn.apply_to", "one rotary embedding"),
        (
            ["yarn.factor=2", "rollout.engine=sglang", "weight_sync.verify=logprobs"],
            "sft",
            "weight_sync.verify",
            "YaRN",
        ),
    ],
)
def test_contradictions(
    overrides: list[str], entry: str, path: str, words: str, problems: Callable[..., list[str]]
) -> None:
    found = [text for text in problems(*overrides, entry=entry) if not text.startswith("sglang.venv")]
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert words in found[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["yarn.apply_to=everything"],
        ["evaluation.at_end=false"],
        ["data.heldout=[]"],
        ["rollout.engine=local"],
    ],
)
def test_servers_in_rl_take_the_trainers_embedding(overrides: list[str], problems: Callable[..., list[str]]) -> None:
    found = problems("yarn.factor=2", "rollout.engine=sglang", *overrides)
    assert [text for text in found if not text.startswith("sglang.venv")] == []


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_a_model_whose_config_asks_for_it(
    form: str, load: Callable[..., Settings], problems: Callable[..., list[str]], hf_dir: Path
) -> None:
    rope = {**YARN, "rope_theta": 5e5} if form == "rope_parameters" else YARN
    plain = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps({**plain, "max_position_embeddings": 1280, form: rope}))
    model = ["model.preset=null", f"model.hf_dir={hf_dir}"]
    (text,) = problems(*model)
    assert "config.json in model.hf_dir asks for YaRN" in text
    assert "yarn.factor=2.5 yarn.original_positions=512" in text
    assert problems(*model, "yarn.factor=4")[0].startswith("yarn.factor: got 4.0")
    settings = load(*model, "yarn.factor=2.5")
    assert settings.architecture.max_position_embeddings == 512, "positions of training"
    assert settings.yarn.evaluation_positions(settings.architecture) == 1280


def test_constants_of_their_own_are_not_taken_for_the_defaults() -> None:
    assert yarn_of_hf_config({"rope_scaling": YARN}) == Yarn(factor=2.5, original_positions=512)
    for other in ({"beta_fast": 16}, {"attention_factor": 1.2}, {"factor": 0.5}, {"rope_type": "linear"}):
        assert yarn_of_hf_config({"rope_scaling": {**YARN, **other}}) is None
