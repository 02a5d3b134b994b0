"""FP8 settings as Megatron's fields, through Megatron's own validation; hardware that cannot; weights stored in FP8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_klear.config import (
    PRESETS,
    Fp8Settings,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.errors import ConfigError
from megatron_klear.model import precision
from megatron_klear.model.layer_spec import attention_backend, describe_attention, pick_layer_spec
from megatron_klear.model.precision import (
    fp8_problems,
    megatron_fp8_fields,
    note_loaded,
    plain,
    require_hardware,
)
from megatron_klear.model.qwen3 import transformer_config

ARCH = PRESETS["qwen3-8b"]
MODEL = ModelSettings(preset="qwen3-8b")


def config(fp8: Fp8Settings, parallel: ParallelSettings | None = None) -> TransformerConfig:
    return transformer_config(ARCH, MODEL, parallel or ParallelSettings(), fp8=fp8)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_megatron_accepts_every_recipe_and_sees_it(recipe: Any) -> None:
    whole = {} if recipe == "delayed" else {"first_layers_bf16": 1, "last_layers_bf16": 3}
    made = config(Fp8Settings(recipe=recipe, parameters=True, **whole), ParallelSettings(tp=2, pp=4))
    assert (made.fp8, made.fp8_recipe, made.fp8_param) == ("e4m3" if recipe == "blockwise" else "hybrid", recipe, True)
    assert made.first_last_layers_bf16 == bool(whole)
    assert (made.num_layers_at_start_in_bf16, made.num_layers_at_end_in_bf16) == ((1, 3) if whole else (0, 0))
    assert made.fp8_amax_history_len == (1024 if recipe == "delayed" else 1)
    assert not made.fp8_dot_product_attention
    assert not made.fp8_multi_head_attention


def test_without_a_recipe_nothing_is_passed_on() -> None:
    assert megatron_fp8_fields(Fp8Settings()) == {}
    made = config(Fp8Settings())
    assert not made.fp8
    assert not made.fp8_param


def test_what_the_settings_refuse_megatron_refuses_too() -> None:
    """The reasons for the checks in config/precision.py, which speaks before torch is imported."""
    with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer"):
        config(Fp8Settings(recipe="delayed", first_layers_bf16=1))
    with pytest.raises(ValueError, match="num_layers_at_end_in_bf16"):
        config(Fp8Settings(recipe="tensorwise", last_layers_bf16=10), ParallelSettings(pp=4))


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "words"),
    [
        ("delayed", (8, 0), "13.0", "capability 8.9 or above, and Testchip has 8.0; set fp8.recipe=none"),
        ("tensorwise", (8, 9), "12.8", ""),
        ("tensorwise", (9, 0), "12.8", ""),
        ("blockwise", (8, 9), "13.0", "set fp8.recipe=tensorwise"),
        ("blockwise", (9, 0), "12.8", "and this is Testchip (9.0) with CUDA 12.8; set fp8.recipe=tensorwise"),
        ("blockwise", (9, 0), "13.0", ""),
        ("none", (7, 0), "12.0", ""),
    ],
)
def test_hardware(recipe: Any, capability: tuple[int, int], cuda: str, words: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Testchip")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(precision, "transformer_engine_is_there", lambda: True)
    found = fp8_problems(Fp8Settings(recipe=recipe), torch.device("cuda"))
    assert len(found) == bool(words)
    assert words in "".join(found)
    monkeypatch.setattr(precision, "transformer_engine_is_there", lambda: False)
    if recipe != "none" and not words:
        # Megatron would leave FP8 out without a word.
        assert "needs Transformer Engine" in fp8_problems(Fp8Settings(recipe=recipe), torch.device("cuda"))[0]


def test_a_machine_without_a_gpu_is_told_before_anything_is_built() -> None:
    (text,) = fp8_problems(Fp8Settings(recipe="delayed"), torch.device("cpu"))
    assert text.startswith("fp8.recipe: got delayed, which needs a GPU")


def test_environment_variables_that_contradict_the_settings_are_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "pick_layer_spec", lambda model: "te")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1")
    settings = Settings(
        run=RunSettings(dir="unused"), tokenizer=TokenizerSettings(dir="unused"),
        model=ModelSettings(preset="qwen3-8b", attention="cudnn"), fp8=Fp8Settings(recipe="delayed"),
    )  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        require_hardware(settings)
    first, *others = refused.value.problems
    assert first.startswith("fp8.recipe: ")
    assert [text.split("has ")[1] for text in others] == [
        "NVTE_FLASH_ATTN=1; unset it",
        "NVTE_UNFUSED_ATTN=1; unset it",
    ]


def test_flash_attention_that_is_not_there_is_told(monkeypatch: Any) -> None:
    settings = Settings(
        run=RunSettings(dir="unused"), tokenizer=TokenizerSettings(dir="unused"),
        model=ModelSettings(preset="qwen3-8b", attention="flash"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.attention: got flash, which needs a GPU"):
        require_hardware(settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "pick_layer_spec", lambda model: "local")
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        require_hardware(settings)


def test_the_optimizer_starts_from_loaded_weights_where_they_are_stored_in_fp8(monkeypatch: Any) -> None:
    stored = torch.nn.Parameter(torch.zeros(3))
    stored._high_precision_init_val = torch.full((3,), 9.0)
    stored.get_high_precision_init_val = lambda: stored._high_precision_init_val
    note_loaded(stored, torch.tensor([1.0, 2.0, 3.0]))
    assert stored.get_high_precision_init_val().tolist() == [1.0, 2.0, 3.0]
    ordinary = torch.nn.Parameter(torch.zeros(3))
    note_loaded(ordinary, torch.ones(3))
    assert not hasattr(ordinary, "_high_precision_init_val")
    assert plain(ordinary) is ordinary
    monkeypatch.setattr(precision, "is_float8tensor", lambda tensor: tensor is stored)
    monkeypatch.setattr(precision, "dequantize_fp8_tensor", lambda tensor: tensor + 1)
    assert plain(stored).tolist() == [1.0, 1.0, 1.0]


def test_which_attention_is_taken_and_how_it_is_called(monkeypatch: Any) -> None:
    backends = {
        name: attention_backend(ModelSettings(attention=name)).name for name in ("auto", "te", "flash", "cudnn")
    }
    assert backends == {"auto": "auto", "te": "auto", "flash": "flash", "cudnn": "fused"}
    with pytest.raises(ConfigError, match=r"model\.attention: cudnn was asked for but transformer_engine"):
        pick_layer_spec(ModelSettings(attention="cudnn"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert describe_attention(ModelSettings(), "local", cpu) == "torch SDPA"
    versions = {"flash-attn": "2.8.3", "transformer-engine": "2.14.1"}
    monkeypatch.setattr("megatron_klear.model.layer_spec._version", lambda package: versions[package])
    monkeypatch.setattr("megatron_klear.model.layer_spec._cudnn", lambda: "9.1.0")
    said = {name: describe_attention(ModelSettings(attention=name), "te", cuda) for name in ("auto", "flash", "cudnn")}
    assert said == {
        "auto": "Transformer Engine 2.14.1's choice of cuDNN 9.1.0 and flash-attn 2.8.3",
        "flash": "flash-attn 2.8.3 in Transformer Engine 2.14.1",
        "cudnn": "cuDNN 9.1.0 in Transformer Engine 2.14.1",
    }
