"""The count of floating-point operations against torch's own counter on transformers' Qwen3, and by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_klear.config import PRESETS
from megatron_klear.model.hf_config import hf_config
from megatron_klear.observe.flops import FlopCount, causal_pairs, forward_flops, training_flops

TINY = dataclasses.replace(PRESETS["qwen3-tiny"], num_layers=3, vocab_size=1000)


def _counted(lengths: list[int], *, backward: bool) -> dict[str, float]:
    """torch's count for the sequences one by one: products by the module they are in."""
    model = Qwen3ForCausalLM._from_config(
        Qwen3Config.from_dict(hf_config(TINY, dtype="float32")), attn_implementation="eager"
    )
    parts = {"head": 0.0, "attention": 0.0, "projections": 0.0}
    for length in lengths:
        tokens = torch.arange(length)[None] % TINY.vocab_size
        with FlopCounterMode(display=False) as counter:
            logits = model(tokens, use_cache=False).logits
            if backward:
                logits.sum().backward()
        products = {
            name: {str(kind): count for kind, count in kinds.items()}
            for name, kinds in counter.get_flop_counts().items()
        }
        # The rotary angles are made by a product of positions and frequencies, which belongs to no weight.
        rotary = sum(products.get("Qwen3ForCausalLM.model.rotary_emb", {}).values())
        head = sum(products["Qwen3ForCausalLM.lm_head"].values())
        batched = products["Global"].get("aten.bmm", 0) - rotary
        parts["head"] += head
        parts["attention"] += batched
        parts["projections"] += sum(products["Global"].values()) - rotary - head - batched
    return parts


@pytest.mark.parametrize("backward", [False, True])
def test_the_count_is_that_of_torchs_counter_on_transformers(backward: bool) -> None:
    lengths = [7, 32, 1]
    counted = _counted(lengths, backward=backward)
    mine = training_flops(TINY, lengths, trained_tokens=sum(lengths)) if backward else forward_flops(TINY, lengths)
    # transformers computes logits of the last position too.
    head = mine.head + 2.0 * len(lengths) * TINY.hidden_size * TINY.vocab_size
    # Eager attention multiplies all pairs and masks half of them: L * L where the causal count has L * (L + 1) / 2.
    whole = mine.attention * sum(n * n for n in lengths) / causal_pairs(lengths)
    assert mine.projections == counted["projections"]
    assert whole == pytest.approx(counted["attention"], rel=1e-12)
    assert head == counted["head"]


def test_an_8b_at_32k_by_hand() -> None:
    arch = PRESETS["qwen3-8b"]
    mine = training_flops(arch, [32768])
    # 4096 wide, 36 layers, 32 query and 8 key heads of 128, 12288 in the feed-forward layer, 151,936 words.
    per_layer = 4096 * 128 * (32 + 8 + 8) + 32 * 128 * 4096 + 3 * 4096 * 12288
    assert per_layer == 192_937_984
    assert mine.projections == 6 * 32768 * 36 * per_layer
    assert mine.attention == 36 * 12 * 32 * 128 * (32768 * 32769 // 2)
    assert mine.head == 6 * 32767 * 4096 * 151936
    assert mine.total == mine.projections + mine.attention + mine.head
    # Published "6 N D" leaves attention out, which is 38 % of the whole here.
    assert mine.attention / mine.total == pytest.approx(0.382, abs=0.02)


def test_sequences_attend_only_within_themselves() -> None:
    assert causal_pairs([3, 1]) == 1 + 2 + 3 + 1
    together, apart = forward_flops(TINY, [64]), forward_flops(TINY, [32, 32])
    assert together.projections == apart.projections
    assert together.attention / apart.attention == (64 * 65) / (2 * 32 * 33)


def test_only_trained_tokens_need_the_heads_gradient() -> None:
    per_token = 2.0 * TINY.hidden_size * TINY.vocab_size
    assert training_flops(TINY, [10, 6], trained_tokens=5).head == per_token * (14 + 2 * 5)
    assert training_flops(TINY, [10, 6]).head == per_token * 14 * 3


def test_counts_add_up() -> None:
    both = forward_flops(TINY, [5]) + training_flops(TINY, [9])
    assert both.total == forward_flops(TINY, [5]).total + training_flops(TINY, [9]).total
    assert FlopCount().total == 0
