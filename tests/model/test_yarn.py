"""YaRN against transformers: frequencies, attention scale, whole forward passes, engine and exported config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor_from_config,
)
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megatron_klear import parallel
from megatron_klear.config import PRESETS, Architecture, ModelSettings, ParallelSettings
from megatron_klear.config.yarn import Yarn
from megatron_klear.errors import RolloutError
from megatron_klear.model import HeadRequest, build_qwen3, forward_microbatch, hf_config, load_hf_weights
from megatron_klear.model.qwen3 import transformer_config
from megatron_klear.packing import pack, unpack
from megatron_klear.records import ParallelContext, Prompt, TrainSequence
from megatron_klear.rollout import LocalEngine, SamplingParams

ARCH = Architecture(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=61,
    max_position_embeddings=32,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    init_std=0.4,  # large, so that attention depends on positions
)
YARN = Yarn(factor=2.5, original_positions=32)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


def theirs(arch: Architecture, yarn: Yarn | None) -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    return Qwen3ForCausalLM(Qwen3Config.from_dict(hf_config(arch, dtype="float32", yarn=yarn))).eval()


@pytest.mark.parametrize(
    ("arch", "yarn"),
    [
        (PRESETS["qwen3-8b"], Yarn(factor=2.5, original_positions=32768)),  # the paper
        (PRESETS["qwen3-8b"], Yarn(factor=4.0, original_positions=40960)),
        (ARCH, YARN),
    ],
)
def test_frequencies_and_attention_scale_are_those_of_transformers_and_of_the_paper(
    arch: Architecture, yarn: Yarn, context: ParallelContext
) -> None:
    reference = Qwen3RotaryEmbedding(Qwen3Config.from_dict(hf_config(arch, yarn=yarn)))
    config = transformer_config(arch, ModelSettings(layer_spec="local"), ParallelSettings(), yarn=yarn)
    ours = YarnRotaryEmbedding(
        kv_channels=arch.head_dim,
        rotary_base=arch.rope_theta,
        use_cpu_initialization=True,
        scaling_factor=config.yarn_rotary_scaling_factor,
        original_max_position_embeddings=config.yarn_original_max_position_embeddings,
        beta_fast=config.yarn_beta_fast,
        beta_slow=config.yarn_beta_slow,
        mscale=config.yarn_mscale,
        mscale_all_dim=config.yarn_mscale_all_dim,
        correction_range_round_to_int=config.yarn_correction_range_round_to_int,
    )
    with parallel.cuda_means_cpu():
        angles, scale = ours.get_emb(2)
    half = arch.head_dim // 2
    torch.testing.assert_close(angles[1, 0, 0, :half], reference.inv_freq, rtol=4 * 2**-24, atol=0)
    assert scale == _yarn_get_concentration_factor_from_config(config) == reference.attention_scaling
    assert scale == pytest.approx(0.1 * math.log(yarn.factor) + 1)

    # By hand, in float64: dimensions that turn more than 32 times in the original length stay, those that turn less
    # than once are slowed down by the factor, and in between they are mixed linearly.
    base = arch.rope_theta ** (-2.0 * np.arange(half) / arch.head_dim)

    def dimension(turns: float) -> float:
        return arch.head_dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (
            2 * math.log(arch.rope_theta)
        )  # fmt: skip

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), arch.head_dim - 1)
    slowed = np.clip((np.arange(half) - low) / (high - low), 0, 1)
    by_hand = base * (1 - slowed) + base / yarn.factor * slowed
    np.testing.assert_allclose(reference.inv_freq.double().numpy(), by_hand, rtol=16 * 2**-24)


def sequences(*lengths: int) -> list[TrainSequence]:
    rng = np.random.default_rng(1)
    zeros = [np.zeros(length, dtype=np.float32) for length in lengths]
    return [
        TrainSequence(
            sequence_id=str(i), token_ids=rng.integers(0, ARCH.vocab_size, length), policy_weight=zeros[i],
            lm_weight=zeros[i], advantages=zeros[i], old_logprobs=zeros[i], rollout_logprobs=zeros[i],
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize("yarn", [None, YARN])
def test_a_forward_pass_beyond_the_trained_length_is_that_of_transformers(
    yarn: Yarn | None, context: ParallelContext
) -> None:
    reference = theirs(ARCH, yarn)
    model_settings = ModelSettings(**dataclasses.asdict(ARCH), dtype="float32", layer_spec="local", vocab_multiple=8)
    model = build_qwen3(ARCH, model_settings, ParallelSettings(), context, yarn=yarn)
    load_hf_weights(model, ARCH, context, reference.state_dict().__getitem__)
    rows = sequences(80, 7, 50)
    batch = pack(rows)
    with torch.no_grad(), parallel.cuda_means_cpu():
        answer = forward_microbatch(model, HeadRequest(batch=batch, objective=None), context, transformer_engine=False)
    found = unpack([answer.logprobs], batch)
    double, plain = reference.double(), theirs(ARCH, None).double()
    for row, ours in zip(rows, found, strict=True):
        tokens = torch.as_tensor(row.token_ids)[None]
        with torch.no_grad():
            wanted, without = (
                torch.log_softmax(m(tokens).logits[0, :-1], -1).gather(1, tokens[0, 1:, None]).squeeze(1).numpy()
                for m in (double, plain)
            )
        # Two layers of float32 under logits of about 20.
        np.testing.assert_allclose(ours[1:], wanted, rtol=1e-4, atol=2e-4)
        if yarn is not None and len(wanted) > 20:
            assert np.abs(wanted - without).max() > 0.05, "YaRN makes a difference that the comparison can see"


def test_the_engine_computes_with_yarn_for_a_while_and_then_as_before() -> None:
    reference = theirs(ARCH, None)
    engine = LocalEngine(hf_config(ARCH, dtype="float32"), dtype=torch.float32)
    engine.update_weights(reference.state_dict().items(), version=0)
    (row,) = sequences(20)
    prompt = Prompt(prompt_id="p", domain="math", token_ids=row.token_ids, reference="")
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=40, stop_token_ids=())
    short = dataclasses.replace(sampling, max_response_tokens=12)

    def generate(settings: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        rollout = engine.generate([prompt], num_responses=1, sampling=settings, seed=1)[0].rollouts[0]
        return rollout.response_ids, rollout.rollout_logprobs

    before = generate(short)
    with engine.other_positions(hf_config(ARCH, dtype="float32", yarn=YARN)):
        response, logprobs = generate(sampling)
    assert len(response) == 40, "60 tokens are more than the 32 positions without YaRN"
    tokens = torch.as_tensor(np.concatenate([row.token_ids, response]))[None]
    with torch.no_grad():
        logits = theirs(ARCH, YARN).double()(tokens).logits[0, len(row.token_ids) - 1 : -1]
    wanted = torch.log_softmax(logits, -1).gather(1, tokens[0, len(row.token_ids) :, None]).squeeze(1)
    np.testing.assert_allclose(logprobs, wanted.numpy(), rtol=1e-4, atol=2e-4)
    after = generate(short)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    with pytest.raises(RolloutError, match=r"exceeds model\.max_position_embeddings of 32"):
        generate(sampling)
