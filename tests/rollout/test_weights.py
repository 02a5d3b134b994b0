from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_klear.errors import WeightSyncError
from megatron_klear.rollout.weights import load_weights

MakeReference = Callable[..., Qwen3ForCausalLM]


def test_every_parameter_becomes_the_one_sent_in_any_order_and_dtype(make_reference: MakeReference) -> None:
    source, target = make_reference(seed=1), make_reference(seed=2)
    load_weights(target, [(name, tensor.double()) for name, tensor in reversed(list(source.named_parameters()))])
    for (name, sent), (_, held) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        assert torch.equal(sent, held), name


def test_every_deviation_is_named_in_one_message(make_reference: MakeReference) -> None:
    tensors = dict(make_reference().named_parameters())
    q, up, norm = (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    )
    sent = [(name, tensor) for name, tensor in tensors.items() if name != up]
    sent = [(name, tensor.T if name == q else tensor) for name, tensor in sent]
    sent = [(name, tensor * float("nan") if name == norm else tensor) for name, tensor in sent]
    sent += [("model.layers.2.mlp.up_proj.weight", torch.zeros(1)), ("lm_head.weight", tensors["lm_head.weight"])]
    with pytest.raises(WeightSyncError) as caught:
        load_weights(make_reference(), sent)
    text = str(caught.value)
    for part in (
        f"1 missing: {up}",
        "1 unknown: model.layers.2.mlp.up_proj.weight",
        "1 repeated: lm_head.weight",
        f"1 of another shape: {q} (got [32, 48], needs [48, 32])",
        f"1 not finite: {norm}",
    ):
        assert part in text


def test_a_long_list_of_names_is_cut(make_reference: MakeReference) -> None:
    with pytest.raises(WeightSyncError, match=r"25 missing: model\.embed_tokens\.weight.* and 13 more"):
        load_weights(make_reference(), [])


def test_tied_models_take_the_embedding_alone_or_with_its_equal(make_reference: MakeReference) -> None:
    tied: dict[str, Any] = {"tie_word_embeddings": True}
    source, target = make_reference(seed=1, **tied), make_reference(seed=2, **tied)
    sent = list(source.named_parameters())
    assert "lm_head.weight" not in dict(sent)
    load_weights(target, sent)
    assert torch.equal(target.lm_head.weight, source.model.embed_tokens.weight)
    load_weights(target, [("lm_head.weight", source.lm_head.weight), *sent])
    with pytest.raises(WeightSyncError, match=r"unlike the embedding it is tied to: lm_head\.weight"):
        load_weights(target, [*sent, ("lm_head.weight", source.lm_head.weight + 1)])
