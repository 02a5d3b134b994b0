"""A model asked real problems through the command: resumed, counted, and told what is wrong before anything starts."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_klear import evaluate
from megatron_klear.config.evaluating import load_evaluation
from megatron_klear.errors import ConfigError
from megatron_klear.evaluation.asking import facts_of, rope_changes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of random weights with the quickstart's tokenizer."""
    import subprocess
    import sys

    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = Path(__file__).resolve().parents[2]
    here = tmp_path_factory.mktemp("model")
    subprocess.run(
        [sys.executable, "examples/quickstart_data.py", "--out", str(here), "--sft-rows", "2", "--prompts", "2",
         "--heldout", "3"],
        check=True, cwd=root, capture_output=True,
    )  # fmt: skip
    vocab_size = len(json.loads((here / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]) + 32
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    directory = here / "hf"
    Qwen3ForCausalLM(config).save_pretrained(directory)
    for file in (here / "tokenizer").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """Settings of a small evaluation of the held-out problems."""
    file = tmp_path / "evaluation.yaml"
    values = {
        "run": {"dir": str(tmp_path / "out"), "seed": 1},
        "benchmarks": {"files": [str(model.parent / "heldout.jsonl")]},
        "sampler": {
            "hf_dir": str(model), "responses": 4, "max_prompt_tokens": 128, "max_response_tokens": 24,
            "dtype": "float32", "batch_responses": 8,
        },
        "reward": {"workers": 1},
    }  # fmt: skip
    file.write_text(json.dumps(values))
    return file


def results(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "results.json").read_text())
    return value


def test_a_model_is_asked_once_and_a_resume_draws_what_is_missing(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate.main([str(config)]) == 0
    first = (out / "generations.jsonl").read_text()
    (result,) = results(out)["benchmarks"]
    assert (result["label"], result["num_problems"], result["num_responses"]) == ("avg@4", 3, 12)
    assert sum(result["outcomes"].values()) == 12
    assert list(result["pass_at_k"]) == ["1", "2", "4"]
    assert results(out)["facts"]["temperature"] == 0.6
    # As after a kill: some responses are there, others are not, one is damaged.
    with sqlite3.connect(out / "responses.sqlite") as cache:
        cache.execute("DELETE FROM responses WHERE rowid IN (2, 5)")
        cache.execute("UPDATE responses SET token_ids = X'0000' WHERE rowid = 7")
    cache.close()
    for name in ("generations.jsonl", "grades.jsonl", "results.json"):
        (out / name).unlink()
    assert evaluate.main([str(config)]) == 0
    assert (out / "generations.jsonl").read_text() == first  # each response has randomness of its own
    # What was generated can be graded again without the model, to the same figures.
    graded = tmp_path / "graded"
    problems = json.loads(config.read_text())["benchmarks"]["files"]
    arguments = ["--grade", str(out / "generations.jsonl"), "--problems", *problems, "--out", str(graded)]
    assert evaluate.main([*arguments, "--seed", "1", "--require-think", "--workers", "1"]) == 0
    (again,) = results(graded)["benchmarks"]
    assert again == result
    # Or by the settings of the evaluation, which are all that is needed.
    shutil.rmtree(graded)
    arguments = ["--grade", str(out / "generations.jsonl"), "--out", str(graded), "--config", str(config)]
    assert evaluate.main([*arguments, "sampler.hf_dir=/gone"]) == 0
    assert results(graded)["benchmarks"] == [result]
    assert results(graded)["facts"]["grading rules"] == results(out)["facts"]["grading rules"]


def test_presets_are_the_papers_and_yield_to_the_file_and_the_command_line(config: Path, tmp_path: Path) -> None:
    values = json.loads(config.read_text())
    directory = tmp_path / "long"
    shutil.copytree(values["sampler"]["hf_dir"], directory)
    sizes = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**sizes, "max_position_embeddings": 32768}))
    values["sampler"] = {"hf_dir": str(directory), "top_p": 0.5}
    config.write_text(json.dumps(values))
    found = load_evaluation(config, ["run.preset=64k", "sampler.responses=8"])
    sampler = found.sampler
    assert (sampler.temperature, sampler.top_p, sampler.responses) == (0.6, 0.5, 8)
    assert sampler.max_prompt_tokens + sampler.max_response_tokens == 65536
    assert found.yarn.factor == 2.5
    short = load_evaluation(config, ["run.preset=32k"]).sampler
    assert (short.responses, short.max_prompt_tokens + short.max_response_tokens) == (64, 32768)


def test_all_mistakes_are_told_at_once_before_anything_starts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        evaluate.main(
            [str(config), "benchmarks.files=[none.jsonl,a/none.jsonl]", "sampler.hf_dir=nowhere", "run.preset=48k",
             "benchmarks.pass_at=[5]", "reward.wrong=2", "yarn.factor=2", "yarn.original_positions=64",
             "sampler.answers=3", "benchmarks.contests_from=2025-2-1", "benchmarks.contests_until=2025-02-30"]
        )  # fmt: skip
    assert leaving.value.code == 2
    told = capsys.readouterr().err
    for text in (
        "benchmarks.files: no file none.jsonl",
        "would both be called 'none'",
        "sampler.hf_dir: no directory nowhere",
        "run.preset: got '48k' (text), allowed: none, 32k, 64k",
        "benchmarks.pass_at: got 5, must be from 1 to sampler.responses = 4",
        "reward.wrong: got 2.0, must be below reward.correct = 1.0",
        "sampler.max_response_tokens: prompt and response may take 152 tokens, but the model has 128 positions",
        "sampler.answers: unknown setting",
        "benchmarks.contests_from: got '2025-2-1', must be a day such as 2025-02-01",
        "benchmarks.contests_until: got '2025-02-30', must be a day such as 2025-02-01",
    ):
        assert text in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("reward.malformed=0", "reward.malformed: got 0.0, must not be above reward.wrong = -1.0"),
        ("code_reward.malformed=0.5", "code_reward.malformed: got 0.5, must not be above code_reward.wrong = 0.0"),
        ("code_reward.wrong=1", "code_reward.wrong: got 1.0, must be below code_reward.correct = 1.0"),
        ("code_reward.cpu_seconds=30", "code_reward.wall_seconds: got 20.0, must not be below code_reward.cpu_seconds"),
    ],
)
def test_what_graders_would_refuse_is_refused_before_any_response_is_drawn(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, told: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        evaluate.main([str(config), setting])
    assert leaving.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_days_of_contests_are_settings(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(config.read_text())
    values["benchmarks"] |= {"contests_from": "2024-08-01"}
    config.write_text(yaml.safe_dump(values).replace("'2024-08-01'", "2024-08-01"))  # as a person writes it
    found = load_evaluation(config, ["benchmarks.contests_until=2025-02-01"])
    assert (found.benchmarks.contests_from, found.benchmarks.contests_until) == ("2024-08-01", "2025-02-01")
    assert facts_of(found)["contests"] == "2024-08-01 to 2025-02-01"
    with pytest.raises(ConfigError, match=r"contests_until: got 2024-07-31, which is before benchmarks.contests_from"):
        load_evaluation(config, ["benchmarks.contests_until=2024-07-31"])


def test_a_problem_that_is_too_long_is_refused_and_not_left_out(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(config), "sampler.max_prompt_tokens=4"]) == 2
    told = capsys.readouterr().err
    assert "heldout.jsonl:1: has " in told
    assert "Set sampler.max_prompt_tokens to at least" in told


def test_more_positions_than_the_model_has_are_refused_unless_yarn_gives_them(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    longer = ["sampler.max_response_tokens=300", "benchmarks.problems=1", "sampler.responses=1"]
    with pytest.raises(SystemExit) as leaving:
        evaluate.main([str(config), *longer])
    assert leaving.value.code == 2
    assert "the model has 256 positions" in capsys.readouterr().err
    yarn = ["yarn.factor=2", "yarn.original_positions=256", "sampler.max_response_tokens=200"]
    assert evaluate.main([str(config), *longer, *yarn]) == 0
    assert results(tmp_path / "out")["facts"]["yarn_factor"] == 2.0


@pytest.mark.parametrize("form", ["rope_parameters", "rope_theta"])
def test_yarn_keeps_the_models_own_base(form: str, config: Path, model: Path, tmp_path: Path) -> None:
    from transformers import Qwen3Config

    changed = json.loads((model / "config.json").read_text())
    changed.pop("rope_parameters", None)
    changed |= {"rope_theta": 5e6} if form == "rope_theta" else {form: {"rope_type": "default", "rope_theta": 5e6}}
    directory = tmp_path / "changed"
    shutil.copytree(model, directory)
    (directory / "config.json").write_text(json.dumps(changed))
    yarn = ["yarn.factor=2.5", "yarn.original_positions=256", f"sampler.hf_dir={directory}"]
    found = rope_changes(load_evaluation(config, yarn))
    parameters = Qwen3Config.from_dict({**changed, **found}).rope_parameters
    assert parameters == {
        "rope_type": "yarn", "rope_theta": 5e6, "factor": 2.5, "original_max_position_embeddings": 256,
    }  # fmt: skip
    assert found["max_position_embeddings"] == 640
