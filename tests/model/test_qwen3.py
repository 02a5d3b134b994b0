"""Our Qwen3 against transformers' on the same weights: logits, logprobs, gradients; packed and not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import Architecture, ModelSettings, ParallelSettings
from megatron_klear.conformance.reference import reference_model, sequence_logprobs
from megatron_klear.model import HeadRequest, Qwen3Model, forward_microbatch
from megatron_klear.model.qwen3 import FusedHead, rotary_frequencies, transformer_config
from megatron_klear.packing import pack, unpack
from megatron_klear.records import IGNORED_LABEL, ParallelContext, TrainSequence

SHAPES: list[dict[str, Any]] = [
    {"tie_embeddings": False},
    {"tie_embeddings": True},
    {"num_layers": 3, "num_query_groups": 4, "head_dim": 4, "rope_theta": 1e4},
    {"num_query_groups": 1, "vocab_size": 64, "rms_norm_eps": 1e-3},
    {"rope_theta": 2.75},
]


def request(
    sequences: Sequence[TrainSequence], objective: PolicyObjective | None = None, **keywords: Any
) -> HeadRequest:
    return HeadRequest(batch=pack(sequences), objective=objective, **keywords)


def full_logits(model: Qwen3Model, asked: HeadRequest, context: ParallelContext) -> torch.Tensor:
    """Logits [T, V] from the hidden states that reach the head; the head itself never builds them."""
    seen: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        hidden, weight, _ = arguments
        seen["hidden"], seen["weight"] = hidden[:, 0], module.weight if weight is None else weight

    handle = model.output_layer.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            forward_microbatch(model, asked, context, transformer_engine=False)
    finally:
        handle.remove()
    return (seen["hidden"] @ seen["weight"].T)[:, : model.output_layer.vocab_size]


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_equal_transformers(
    changes: dict[str, Any],
    make_arch: Callable[..., Architecture],
    make_model: Callable[..., Qwen3Model],
    make_sequences: Callable[..., list[TrainSequence]],
    context: ParallelContext,
) -> None:
    arch = make_arch(**changes)
    sequences = make_sequences(arch.vocab_size)
    logits = full_logits(make_model(arch), request(sequences), context)
    theirs = reference_model(arch)
    start = 0
    for sequence in sequences:
        with torch.no_grad():
            wanted = theirs(input_ids=torch.as_tensor(sequence.token_ids)[None]).logits[0]
        torch.testing.assert_close(logits[start : start + len(wanted)], wanted, rtol=1e-5, atol=1e-5)
        start += len(wanted)
    assert start == len(logits)
    assert logits.std() > 0.1, "logits that hardly differ would prove nothing"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tied", [False, True])
def test_logprobs_and_entropy_equal_transformers(
    tied: bool,
    temperature: float,
    make_arch: Callable[..., Architecture],
    make_model: Callable[..., Qwen3Model],
    make_sequences: Callable[..., list[TrainSequence]],
    context: ParallelContext,
) -> None:
    arch = make_arch(tie_embeddings=tied)
    sequences = make_sequences(arch.vocab_size)
    asked = request(sequences, temperature=temperature)
    with torch.no_grad():
        answer = forward_microbatch(make_model(arch), asked, context, transformer_engine=False)
    theirs = reference_model(arch).double()
    for sequence, found, entropy in zip(
        sequences, unpack([answer.logprobs], asked.batch), unpack([answer.entropy], asked.batch), strict=True
    ):
        with torch.no_grad():
            wanted = sequence_logprobs(theirs, sequence.token_ids, temperature).numpy()
            logits = theirs(input_ids=torch.as_tensor(sequence.token_ids)[None]).logits[0, :-1] / temperature
            # A sequence of one token predicts none: torch's check of its arguments refuses no rows at all.
            distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(entropy[1:], distribution.entropy().numpy(), rtol=1e-5, atol=1e-5)
        assert np.all(found[1:] < 0)
        assert found[0] == 0
    ignored = asked.batch.labels == IGNORED_LABEL
    assert ignored.sum() == len(sequences)
    assert not answer.logprobs[ignored].any()
    assert not answer.entropy[ignored].any()


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_transformers_and_padding_rows_get_none(
    tied: bool,
    make_arch: Callable[..., Architecture],
    make_model: Callable[..., Qwen3Model],
    make_sequences: Callable[..., list[TrainSequence]],
    context: ParallelContext,
) -> None:
    arch = make_arch(tie_embeddings=tied)
    sequences = make_sequences(arch.vocab_size)
    model, theirs = make_model(arch), reference_model(arch).double()
    answer = forward_microbatch(model, request(sequences, PolicyObjective()), context, transformer_engine=False)
    answer.loss.backward()
    loss = -sum(sequence_logprobs(theirs, s.token_ids, 1.0)[1:].sum() / 50 for s in sequences)
    loss.backward()
    torch.testing.assert_close(answer.loss.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(answer.lm_loss, answer.loss.detach())
    assert float(answer.policy_loss) == 0.0
    pairs = {
        model.embedding.word_embeddings.weight: theirs.model.embed_tokens.weight,
        model.decoder.final_layernorm.weight: theirs.model.norm.weight,
        model.decoder.layers[1].self_attention.linear_proj.weight: theirs.model.layers[1].self_attn.o_proj.weight,
        model.decoder.layers[0].self_attention.q_layernorm.weight: theirs.model.layers[0].self_attn.q_norm.weight,
        model.decoder.layers[0].mlp.linear_fc2.weight: theirs.model.layers[0].mlp.down_proj.weight,
    }
    if not tied:
        pairs[model.output_layer.weight] = theirs.lm_head.weight
    for mine, other in pairs.items():
        assert mine.grad is not None
        assert other.grad is not None
        rows = len(other)
        torch.testing.assert_close(mine.grad[:rows].double(), other.grad, rtol=1e-4, atol=1e-6)
        assert not mine.grad[rows:].any()
    assert len(model.embedding.word_embeddings.weight) == 64 > arch.vocab_size


def test_how_sequences_are_packed_changes_nothing(
    make_arch: Callable[..., Architecture],
    make_model: Callable[..., Qwen3Model],
    make_sequences: Callable[..., list[TrainSequence]],
    context: ParallelContext,
) -> None:
    arch = make_arch()
    sequences = make_sequences(arch.vocab_size)
    model = make_model(arch)

    def logprobs(together: Sequence[TrainSequence], **keywords: Any) -> list[np.ndarray]:
        batch = pack(together, **keywords)
        with torch.no_grad():
            answer = forward_microbatch(
                model, HeadRequest(batch=batch, objective=None), context, transformer_engine=False
            )
        return unpack([answer.logprobs], batch)

    alone = [logprobs([sequence])[0] for sequence in sequences]
    for found in (
        logprobs(sequences),
        logprobs(sequences[::-1])[::-1],
        logprobs(sequences, pad_to=200, pad_token_id=9),
    ):
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_a_pack_of_nothing_has_a_loss_of_zero_and_zero_gradients(
    make_arch: Callable[..., Architecture], make_model: Callable[..., Qwen3Model], context: ParallelContext
) -> None:
    model = make_model(make_arch())
    answer = forward_microbatch(model, request([], PolicyObjective()), context, transformer_engine=False)
    answer.loss.backward()
    assert float(answer.loss) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_angles_follow_positions_and_equal_transformers(make_arch: Callable[..., Architecture]) -> None:
    arch = make_arch()
    theirs = reference_model(arch).model.rotary_emb
    positions = torch.tensor([0, 1, 2, 0, 1, 5, 63])
    angles = rotary_frequencies(theirs.inv_freq, positions)
    assert angles.shape == (7, 1, 1, arch.head_dim)
    cos, sin = theirs(torch.zeros(1), positions[None])
    torch.testing.assert_close(angles[:, 0, 0].cos(), cos[0])
    torch.testing.assert_close(angles[:, 0, 0].sin(), sin[0])


def test_long_positions_keep_float32_accuracy() -> None:
    """At 40,000 tokens an angle in bfloat16 would be off by whole turns."""
    inv_freq = 1.0 / 1e6 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    positions = torch.tensor([32767, 40959])
    angles = rotary_frequencies(inv_freq.float(), positions)[:, 0, 0, :64].double()
    assert (angles - positions[:, None] * inv_freq).abs().max() < 5e-3


def test_the_head_is_the_layer_that_megatron_built(
    make_arch: Callable[..., Architecture], make_model: Callable[..., Qwen3Model]
) -> None:
    model = make_model(make_arch())
    assert isinstance(model.output_layer, FusedHead)
    assert model.output_layer.vocab_size == 61
    assert model.output_layer.weight.shape == (64, 24)
    assert "output_layer.weight" in dict(model.named_parameters())
    tied = make_model(make_arch(tie_embeddings=True))
    assert "output_layer.weight" not in dict(tied.named_parameters())


def test_the_loss_is_left_alone_by_megatron(make_arch: Callable[..., Architecture]) -> None:
    """Any other setting divides by microbatches or by ranks somewhere."""
    config = transformer_config(make_arch(), ModelSettings(dtype="float32"), ParallelSettings())
    assert config.calculate_per_token_loss is True
    assert config.hidden_dropout == config.attention_dropout == 0.0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("none", (None, None, None)), ("selective", ("selective", None, None)), ("full", ("full", "uniform", 1))],
)
def test_recomputation_is_passed_on(
    setting: str, expected: tuple[Any, ...], make_arch: Callable[..., Architecture]
) -> None:
    settings = replace(ModelSettings(dtype="float32"), recompute=setting)
    config = transformer_config(make_arch(), settings, ParallelSettings())
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == expected


def test_bfloat16_weights_and_float32_results(
    make_arch: Callable[..., Architecture],
    make_model: Callable[..., Qwen3Model],
    make_sequences: Callable[..., list[TrainSequence]],
    context: ParallelContext,
) -> None:
    arch = make_arch()
    model = make_model(arch, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    answer = forward_microbatch(model, request(make_sequences(61)), context, transformer_engine=False)
    assert answer.logprobs.dtype == answer.entropy.dtype == torch.float32
