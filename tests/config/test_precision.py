"""FP8 settings that cannot work, each told by its name, all at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Problems = Callable[..., list[str]]

BIG = [
    "model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.head_dim=64",
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_good_settings(recipe: str, problems: Problems) -> None:
    assert problems(*BIG, f"fp8.recipe={recipe}", "fp8.parameters=true") == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "path", "words"),
    [
        (["run.device=cpu"], 1, "fp8.recipe", "run.device is cpu; set fp8.recipe=none"),
        (["model.dtype=float32"], 1, "fp8.recipe", "needs model.dtype=bfloat16"),
        (["model.layer_spec=local"], 1, "fp8.recipe", "model.layer_spec is local"),
        (["model.attention=sdpa"], 1, "fp8.recipe", "set model.attention=auto"),
        (["model.attention=flash"], 1, "fp8.recipe", "or model.layer_spec=te"),
        (["parallel.distributed_optimizer=false", "fp8.parameters=true"], 1, "fp8.parameters", "distributed_optimizer"),
        (["fp8.recipe=delayed", "fp8.first_layers_bf16=1"], 1, "fp8.first_layers_bf16", "fp8.recipe=tensorwise"),
        (["parallel.pp=4", "fp8.last_layers_bf16=2"], 4, "fp8.last_layers_bf16", "a pipeline stage has 1 layers"),
        (["model.hidden_size=200"], 1, "model.hidden_size", "multiple of 16"),
        (["model.ffn_hidden_size=520", "parallel.tp=2"], 2, "model.ffn_hidden_size", "ffn_hidden_size / parallel.tp"),
        (
            ["fp8.recipe=blockwise", "model.head_dim=16"],
            1,
            "model.num_attention_heads",
            "= 64 must be a multiple",
        ),
        (
            ["packing.token_budget=1000"],
            1,
            "packing.token_budget",
            "lcm(2 * parallel.cp, 16 (fp8.recipe)",
        ),
    ],
)
def test_one_problem(overrides: list[str], world_size: int, path: str, words: str, problems: Problems) -> None:
    found = problems(*BIG, "fp8.recipe=tensorwise", *overrides, world_size=world_size)
    assert [text for text in found if text.startswith(f"{path}: ") and words in text], found
    assert {text.split(":")[0] for text in found} <= {path, "model.num_query_groups"}


def test_a_token_budget_for_every_split(problems: Problems) -> None:
    layout = ["parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true", "fp8.recipe=blockwise"]
    budget = ["data.max_prompt_tokens=64", "rollout.max_response_tokens=128"]
    (text,) = problems(*BIG, *layout, *budget, "packing.token_budget=768", world_size=4)
    assert "lcm(2 * parallel.cp, 128 (fp8.recipe) * parallel.cp * parallel.tp) = 512" in text
    assert problems(*BIG, *layout, *budget, "packing.token_budget=1024", world_size=4) == []


def test_all_at_once(problems: Problems) -> None:
    found = problems(
        "fp8.recipe=delayed", "fp8.last_layers_bf16=1", "fp8.parameters=true", "run.device=cpu", "model.dtype=float32",
        "parallel.distributed_optimizer=false",
    )  # fmt: skip
    assert len(found) == 4
    assert sum(text.startswith("fp8.recipe: ") for text in found) == 2


@pytest.mark.parametrize("name", ["first_layers_bf16=1", "last_layers_bf16=2", "parameters=true"])
def test_fp8_settings_without_a_recipe(name: str, problems: Problems) -> None:
    (text,) = problems(f"fp8.{name}")
    assert text.startswith(f"fp8.{name.split('=')[0]}: needs a recipe")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.attention=cudnn", "run.device=cpu"], "got cudnn, which needs a GPU"),
        (["model.attention=cudnn", "model.layer_spec=local"], "got cudnn, needs model.layer_spec=te"),
        (["model.attention=sdpa", "model.layer_spec=te"], "got sdpa, which only the local layers have"),
    ],
)
def test_attentions_and_layers_that_do_not_go_together(overrides: list[str], words: str, problems: Problems) -> None:
    (text,) = problems(*overrides)
    assert text.startswith("model.attention: ")
    assert words in text
