"""What FP8 keeps and sends, against bytes worked out by hand and tensors made as Transformer Engine shapes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megatron_klear.config import Settings
from megatron_klear.planning import DEVICES, make_plan
from megatron_klear.planning.activations import backward_workspace, layer_bytes, widths
from megatron_klear.planning.fp8 import largest_values_bytes, weight_copies
from megatron_klear.planning.parameters import stage_parameters
from megatron_klear.planning.traffic import Passes, data_bytes, tensor_bytes

Make = Callable[..., Settings]
MATRICES = {"linear_qkv": (6144, 4096), "linear_proj": (4096, 4096), "linear_fc1": (24576, 4096),
            "linear_fc2": (4096, 12288)}  # fmt: skip
"""Of a layer of the 8B: rows are outputs, columns inputs."""
LAYER = sum(rows * columns for rows, columns in MATRICES.values())
TOKENS = 32768


def tensors(recipe: str, rows: int, columns: int, *, blackwell: bool) -> dict[str, np.ndarray]:
    """What Transformer Engine's quantizers make of a weight: `Float8Quantizer` and `Float8BlockQuantizer`."""
    along_rows = {"data": np.empty((rows, columns), np.uint8)}
    if recipe != "blockwise":
        return along_rows if blackwell else {**along_rows, "transpose": np.empty((columns, rows), np.uint8)}

    def scales(tall: int, wide: int) -> np.ndarray:
        blocks_down, blocks_across = len(range(0, tall, 128)), len(range(0, wide, 128))
        while blocks_across % 4:
            blocks_across += 1
        return np.empty((blocks_down, blocks_across), np.float32)

    return {
        **along_rows,
        "scales": scales(rows, columns),
        "transpose": np.empty((columns, rows), np.uint8),
        "transposed scales": scales(columns, rows),
    }


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("device", ["h100", "b200"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_weights_in_memory(settings_for: Make, recipe: str, device: str, stored: bool, tp: int) -> None:
    """Every array is really made: beside the parameter all of them, or all but what is the parameter itself."""
    layout = (f"parallel.tp={tp}", f"parallel.sequence_parallel={str(tp > 1).lower()}")
    settings = settings_for(f"fp8.recipe={recipe}", f"fp8.parameters={str(stored).lower()}", *layout)
    one_layer = 0
    for name, (rows, columns) in MATRICES.items():
        split = (rows, columns // tp) if name in ("linear_proj", "linear_fc2") else (rows // tp, columns)
        made = tensors(recipe, *split, blackwell=device == "b200")
        one_layer += sum(array.nbytes for part, array in made.items() if not (stored and part == "data"))
    assert weight_copies(settings, 0, transposes=DEVICES[device].fp8_transposes) == 36 * one_layer


def test_copies_per_weight_by_device_and_recipe(settings_for: Make) -> None:
    """Hopper holds two of any recipe; Blackwell one, but for blocks."""
    found = {
        (recipe, device): make_plan(
            settings_for(f"fp8.recipe={recipe}"), entry="sft", gpus=8, device_name=device
        ).stages[0].fp8_copies / (36 * LAYER)
        for recipe in ("delayed", "tensorwise", "blockwise")
        for device in ("h100", "h200", "b200")
    }  # fmt: skip
    blocks = 2 * (1 + 4 / 128**2)  # all sizes are multiples of 512
    assert found == {
        **{(recipe, device): 2 for recipe in ("delayed", "tensorwise") for device in ("h100", "h200")},
        ("delayed", "b200"): 1,
        ("tensorwise", "b200"): 1,
        **{("blockwise", device): pytest.approx(blocks, rel=1e-12) for device in ("h100", "h200", "b200")},
    }


def test_only_matrices_of_layers_that_are_not_kept_are_gathered_as_bytes(settings_for: Make) -> None:
    """By hand over two stages: 18 layers each, of which the first two and the last five stay bfloat16."""
    kept = ("fp8.first_layers_bf16=2", "fp8.last_layers_bf16=5", "fp8.parameters=true", "parallel.pp=2")
    for recipe, largest in (("tensorwise", 4 * 4), ("blockwise", 4 * LAYER // 128**2)):
        settings = settings_for(f"fp8.recipe={recipe}", *kept)
        vectors = 2 * 4096 + 2 * 128
        words = 151_936 * 4096
        for stage, in_fp8 in ((0, 16), (1, 13)):
            names = {p.name for p in stage_parameters(settings, stage) if p.fp8_shape is not None}
            assert len(names) == 4 * in_fp8
            assert all(".linear_" in name for name in names)
            others = (18 - in_fp8) * LAYER + 18 * vectors + words + (4096 if stage == 1 else 0)
            _, weights = data_bytes(settings, stage, dp=4)
            by_hand = 3 / 4 * (in_fp8 * LAYER + 2 * others + 2 * in_fp8 * largest)
            assert weights == pytest.approx(by_hand, rel=1e-7), "buckets are padded to 128 numbers"
            assert largest_values_bytes(settings, stage) == in_fp8 * largest


def test_without_stored_weights_everything_is_gathered_in_bfloat16(settings_for: Make) -> None:
    plain, cast = settings_for(), settings_for("fp8.recipe=delayed")
    assert data_bytes(cast, 0, dp=8) == data_bytes(plain, 0, dp=8)


def kept(settings: Settings, recipe: str, recompute: str) -> float:
    return layer_bytes(widths(settings), "te", recipe).kept(recompute) / TOKENS


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("recipe", ["none", "delayed", "tensorwise", "blockwise"])
def test_bytes_per_token_of_an_8b_layer_by_hand(settings_for: Make, recipe: str, recompute: str) -> None:
    settings = settings_for()
    one = {"none": 2.0, "delayed": 1.0, "tensorwise": 1.0, "blockwise": 1.0 + 4 / 128}[recipe]
    by_hand = {
        "inputs of the two norms, bfloat16": 2 * 4096 * 2,
        "a float32 of each row of them": 2 * 4,
        "their results, inputs of linear_qkv and linear_fc1": 2 * 4096 * one,
        "queries and keys copied for their norms": (4096 + 1024) * 2,
        "a float32 of each of their heads": (32 + 8) * 4,
        "rotated queries and keys": (4096 + 1024) * 2,
        "gate and up, bfloat16": 2 * 12288 * 2,
        "gate x up, input of linear_fc2": 12288 * one,
    }
    if recompute == "none":
        by_hand["values, copied to lie as keys do"] = 1024 * 2
        by_hand["softmax statistics of attention"] = 32 * 4
        by_hand["attention's result, which it keeps in bfloat16"] = 4096 * 2
        if recipe == "delayed":
            by_hand["the same, quantised by linear_proj"] = 4096
    elif recompute == "selective":  # what linear_proj keeps of attention's result is all there is of it
        by_hand["queries, keys and values, of which values are a view"] = (4096 + 2 * 1024) * 2
        by_hand["input of linear_proj"] = 4096 * (1 if recipe == "delayed" else 2)
    else:
        by_hand = {"the layer's input": 4096 * 2}
    assert kept(settings, recipe, recompute) == sum(by_hand.values())


def test_fp8_keeps_less_than_bfloat16_but_nothing_near_half(settings_for: Make) -> None:
    settings = settings_for()
    share = {
        r: kept(settings, r, "none") / kept(settings, "none", "none") for r in ("delayed", "tensorwise", "blockwise")
    }
    assert share["tensorwise"] < share["blockwise"] < share["delayed"] < 0.9
    assert share["tensorwise"] > 0.8


def test_sequence_parallel_ranks_keep_their_part_of_the_norms(settings_for: Make) -> None:
    settings = settings_for("parallel.tp=4", "parallel.sequence_parallel=true")
    assert kept(settings, "none", "none") - kept(settings, "tensorwise", "none") == (2 * 4096 + 12288) / 4


def test_gradients_in_flight_by_hand(settings_for: Make) -> None:
    """Of fc1's output in bfloat16 and quantised; on Blackwell that is no more than bfloat16's own largest moment."""
    w = widths(settings_for())
    hidden = 2 * 4096 * 2
    assert backward_workspace(w) == TOKENS * (3 * 12288 * 2 + hidden)
    assert backward_workspace(w, "tensorwise", transposes=True) == TOKENS * (2 * 12288 * (2 + 2) + hidden)
    assert backward_workspace(w, "tensorwise", transposes=False) == TOKENS * (2 * 12288 * (2 + 1) + hidden)
    for transposes in (False, True):
        blocks = 2 * (1 + 4 / 128)
        assert backward_workspace(w, "blockwise", transposes=transposes) == TOKENS * (2 * 12288 * (2 + blocks) + hidden)


def test_layers_in_bfloat16_keep_what_they_keep_without_fp8(settings_for: Make) -> None:
    """A stage's activations are a sum over its layers."""
    choices = {
        "none": (),
        "all": ("fp8.recipe=tensorwise",),
        "some": ("fp8.recipe=tensorwise", "fp8.first_layers_bf16=4", "fp8.last_layers_bf16=5"),
    }
    plan = {
        name: make_plan(settings_for(*more), entry="sft", gpus=8, device_name="h100").stages[0].activations
        for name, more in choices.items()
    }
    assert plan["none"] - plan["some"] == (plan["none"] - plan["all"]) * 27 / 36


def test_the_layer_computed_again_is_the_largest_one(settings_for: Make) -> None:
    """With full recomputation a layer in bfloat16 among others in FP8 is what the workspace has to hold."""
    full = settings_for("model.recompute=full", "fp8.recipe=tensorwise", "fp8.first_layers_bf16=1")
    w = widths(full)
    found = make_plan(full, entry="sft", gpus=8, device_name="b200").stages[0].workspace
    assert found == max(
        backward_workspace(w) + layer_bytes(w, "te").kept("none"),
        backward_workspace(w, "tensorwise") + layer_bytes(w, "te", "tensorwise").kept("none"),
    )
    assert found == backward_workspace(w) + layer_bytes(w, "te").kept("none")


@pytest.mark.parametrize(("recipe", "copied"), [("delayed", 1), ("tensorwise", 1), ("blockwise", 2)])
def test_what_sequence_parallel_layers_in_fp8_send(settings_for: Make, recipe: str, copied: int) -> None:
    """By hand, per layer and token: inputs of qkv and fc1 are gathered in FP8, forward and again backward, gradients of
    proj and fc2 backward (in blocks along rows and along columns); four sums of hidden states stay in bfloat16."""
    layout = ("parallel.tp=4", "parallel.sequence_parallel=true")
    kept_bf16 = 0 if recipe == "delayed" else 6  # it covers all layers alike
    settings = settings_for(*layout, f"fp8.recipe={recipe}", f"fp8.first_layers_bf16={kept_bf16}")
    plain = settings_for(*layout)
    passes = Passes(forward=2.0, again=1.0, backward=1.0)
    byte = 1 + (4 / 128 if recipe == "blockwise" else 0)
    forward, backward = 2 * byte + 2 * 2, 2 * byte + 2 * copied * byte + 2 * 2
    layers = 36 - kept_bf16
    in_bf16 = 2 * 2 * 2 * 3 + 2 * 3 * 2
    difference = layers * TOKENS * 4096 * 3 / 4 * (in_bf16 - 3 * forward - backward)
    w = widths(settings)
    assert tensor_bytes(plain, w, passes, 0) - tensor_bytes(settings, w, passes, 0) == pytest.approx(difference)


def test_without_sequence_parallel_nothing_is_gathered(settings_for: Make) -> None:
    passes = Passes(forward=1.0, again=0.0, backward=1.0)
    sent = [
        tensor_bytes(settings, widths(settings), passes, 0)
        for settings in (settings_for("parallel.tp=4"), settings_for("parallel.tp=4", "fp8.recipe=tensorwise"))
    ]
    assert sent[0] == sent[1] > 0
