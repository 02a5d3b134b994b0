"""Reading, overriding, refusing and writing settings."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_klear.config import RunSettings, Settings, TokenizerSettings, dump_settings, load_settings
from megatron_klear.config.curation import CURATION
from megatron_klear.config.described import TRAINING, Schema
from megatron_klear.config.evaluating import EVALUATION
from megatron_klear.config.loading import _known_keys, _read, _validated
from megatron_klear.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))


def test_the_papers_recipe_is_the_default(load):
    settings = load("data.max_prompt_tokens=64")
    assert settings.optimizer.lr == 1e-6
    assert settings.optimizer.schedule == "constant"
    assert (settings.rl.prompts_per_step, settings.rl.minibatch_prompts) == (128, 16)
    assert settings.rollout.responses_per_prompt == 8
    assert (settings.algorithm.kind, settings.algorithm.epsilon_high) == ("gppo", 0.28)
    assert settings.algorithm.lm_loss_weight == 0.1
    default = Settings(run=RunSettings(dir="r"), tokenizer=TokenizerSettings(dir="t"))
    assert default.packing.token_budget == 32 * 1024
    assert default.data.max_prompt_tokens + default.rollout.max_response_tokens == 32 * 1024


def test_overrides_win_over_the_file_and_are_read_as_yaml(load, tmp_path):
    settings = load("optimizer.lr=3e-5", "run.resume=false", f"data.heldout=[{tmp_path}/sft.jsonl]", "run.seed=7")
    assert settings.optimizer.lr == 3e-5
    assert settings.run.resume is False
    assert settings.data.heldout == (f"{tmp_path}/sft.jsonl",)
    assert settings.run.seed == 7


def test_an_environment_variable_can_be_used(load, monkeypatch, tmp_path):
    monkeypatch.setenv("KLEAR_TEST_RUN", str(tmp_path / "elsewhere"))
    assert load("run.dir=${oc.env:KLEAR_TEST_RUN}/a").run.dir == f"{tmp_path}/elsewhere/a"
    with pytest.raises(ConfigError, match="KLEAR_TEST_UNSET"):
        load("run.dir=${oc.env:KLEAR_TEST_UNSET}")


def test_values_that_a_file_leaves_to_its_user_must_be_given(config_file, load):
    text = config_file.read_text()
    config_file.write_text(text.replace(f"dir: {config_file.parent}/run\n", "dir: ???\n") + "optimizer:\n  lr: ???\n")
    with pytest.raises(ConfigError) as caught:
        load()
    lr, run = sorted(caught.value.problems)
    assert lr == "optimizer.lr: is ???, so it must be given"
    assert run.startswith("run.dir: required")
    assert load("run.dir=a", "optimizer.lr=1").optimizer.lr == 1.0


def test_loaded_settings_carry_every_size_of_the_model(load):
    settings = load("model.hidden_size=96")
    assert settings.model.hidden_size == 96
    assert settings.model.num_layers == 4
    assert settings.architecture.num_query_groups == 2


def test_settings_are_frozen(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().run.seed = 3


def test_every_problem_is_reported_at_once(problems):
    found = problems(
        "optimizer.lr=fast",
        "optimizer.adam_beta1=1.5",
        "modle.preset=qwen3-8b",
        "parallel.tensor=2",
        "rl.minibatch_prompts=7",
        "data.prompts=[missing.jsonl]",
        "reward.workers=0",
    )
    starts = {text.split(":")[0] for text in found}
    assert starts == {
        "optimizer.lr",
        "optimizer.adam_beta1",
        "modle",
        "parallel.tensor",
        "rl.prompts_per_step",
        "data.prompts",
        "reward.workers",
    }


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("run.see=3", "did you mean run.seed?"),
        ("model.tp=2", "did you mean parallel.tp?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("optimiser.lr=1", "did you mean optimizer?"),
        ("parallel.tensor_model_parallel_size=2", "--help lists all settings"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(problems, override, suggestion):
    (text,) = problems(override)
    assert text.startswith(override.split("=")[0].split(".")[0])
    assert "unknown" in text
    assert suggestion in text


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("run.seed=1.5", "run.seed: got 1.5, expected integer, at least 0 and below 2147483648"),
        ("run.seed='3'", "run.seed: got '3' (text), expected integer, at least 0 and below 2147483648"),
        ("run.resume=3", "run.resume: got 3, expected true or false"),
        ("parallel.tp=true", "parallel.tp: got true, expected integer, at least 1"),
        ("parallel.tp=null", "parallel.tp: got null, expected integer, at least 1"),
        ("optimizer.lr=.nan", "optimizer.lr: got nan, expected number, above 0"),
        ("optimizer.lr=.inf", "optimizer.lr: got inf, expected number, above 0"),
        ("data.sft=a.jsonl", "data.sft: got 'a.jsonl' (text), expected list of texts; write [a.jsonl]"),
        ("data.sft=[3]", "data.sft[0]: got 3, expected list of texts"),
        ("algorithm.kind=gpo", "algorithm.kind: got 'gpo' (text), allowed: gppo, clip, cispo; did you mean gppo?"),
        ("tokenizer=5", "tokenizer: got 5, expected a section with settings below it"),
    ],
)
def test_a_wrong_value_is_refused_in_words(problems, override, text):
    assert text in problems(override)


def test_a_missing_required_setting_is_named(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ConfigError) as caught:
        load_settings(path, entry="sft", world_size=1)
    starts = {text.split(":")[0] for text in caught.value.problems}
    assert {"run.dir", "tokenizer.dir", "model.preset", "data.sft", "sft.steps"} == starts


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("run: [1", "not valid YAML.*line 1"),
        ("run:\n  seed: 1\n  seed: 2\n", "seed"),
        ("- a\n", "holds a list"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, text):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        load_settings(path, entry="sft", world_size=1)


def test_a_missing_file_and_a_malformed_override_are_refused(tmp_path, config_file):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read"):
        load_settings(tmp_path / "nowhere.yaml", entry="sft", world_size=1)
    with pytest.raises(ConfigError) as caught:
        load_settings(config_file, ["run.seed", "=3", "data.sft=[a"], entry="sft", world_size=1)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("entry", ["sft", "rl"])
def test_dumped_settings_load_back_equal(load, tmp_path, entry, hf_dir):
    settings = load("model.preset=null", f"model.hf_dir={hf_dir}", entry=entry)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_settings(settings))
    assert load_settings(path, entry=entry, world_size=1) == settings


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="$\\{}a'\":1e-. \n#[],&*!|>%@`\té\u2028~ny=<", min_size=1),
    number=st.floats(min_value=1e-300, allow_infinity=False, allow_nan=False),
)
def test_any_text_and_number_survives_the_dump(text, number, tmp_path_factory):
    settings = Settings(run=RunSettings(dir=text), tokenizer=TokenizerSettings(dir="t", think_end=text))
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, sft=(text, "b")),
        optimizer=dataclasses.replace(settings.optimizer, lr=number),
    )
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    problems: list[str] = []
    again, broken = _validated(TRAINING, _known_keys(TRAINING, _read(path, ()), problems), problems)
    assert problems == []
    assert not broken
    assert again == settings


def test_every_shipped_settings_file_is_well_formed():
    """Paths in them may not exist yet, and their world size is the reader's; all else must hold."""
    for path in EXAMPLES:
        problems: list[str] = []
        # A layout is laid over a stage of the recipe beside it.
        stage = path.parent.parent / ("sft.yaml" if path.name.startswith("sft") else "math.yaml")
        files = (stage, str(path)) if path.parent.name == "layouts" else (path,)
        schema: Schema[Any] = {"evaluation": EVALUATION, "curation": CURATION}.get(path.parent.name, TRAINING)
        settings, _ = _validated(schema, _known_keys(schema, _read(files[0], files[1:]), problems), problems)
        assert problems == [], path
        assert settings is not None


def test_torch_is_not_imported():
    """Bad settings are refused before anything slow starts."""
    program = (
        "import sys\n"
        "from megatron_klear.config import load_settings, settings_help\n"
        "from megatron_klear.errors import ConfigError\n"
        "try:\n    load_settings('nowhere.yaml', [], entry='rl', world_size=1)\n"
        "except ConfigError:\n    pass\n"
        "settings_help('sft')\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_files_are_laid_over_in_the_order_given(load, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("optimizer: {lr: 3.0e-5}\nrun: {seed: 7}\ndata: {heldout: []}\n")
    settings = load(str(over), "optimizer.lr=4.0e-5")
    assert (settings.optimizer.lr, settings.run.seed, settings.data.heldout) == (4e-5, 7, ())
    assert settings.data.prompts == (str(tmp_path / "prompts.jsonl"),)
    assert load("optimizer.lr=4.0e-5", str(over)).optimizer.lr == 3e-5


def test_a_file_laid_over_that_cannot_be_used_is_named(problems, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert problems(f"{tmp_path}/list.yaml") == [
        f"{tmp_path}/list.yaml: holds a list, expected sections such as `run:`"
    ]
    assert "cannot read the settings file" in problems(f"{tmp_path}/absent.yml")[0]
    (tmp_path / "typo.yaml").write_text("optimiser: {lr: 1.0}\n")
    assert "optimiser: unknown section; did you mean optimizer?" in problems(f"{tmp_path}/typo.yaml")
