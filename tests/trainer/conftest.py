"""One process with its groups, and trainers of a tiny Qwen3 on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from megatron_klear import parallel
from megatron_klear.config import (
    Architecture,
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.conformance.reference import reference_model
from megatron_klear.model import build_qwen3, load_hf_weights
from megatron_klear.records import ParallelContext, TrainSequence
from megatron_klear.trainer import Trainer, make_trainable


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """A launch of one process, ended with the module so that others may start their own."""
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


@pytest.fixture
def arch(request: pytest.FixtureRequest) -> Architecture:
    """The smallest model with grouped heads and a padded vocabulary; a parameter says whether embeddings are tied."""
    return Architecture(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=2,
        num_query_groups=1,
        head_dim=8,
        vocab_size=29,
        max_position_embeddings=64,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_embeddings=getattr(request, "param", False),
        init_std=0.02,
    )


@pytest.fixture
def make_trainer(context: ParallelContext, arch: Architecture) -> Callable[..., Trainer]:
    """A trainer of `reference_model`'s weights; keywords are the optimizer's, but for the few named here."""

    def make(
        *,
        total_updates: int = 10,
        token_budget: int = 64,
        distributed: bool = False,
        dtype: str = "float32",
        arch: Architecture = arch,
        **optimizer: Any,
    ) -> Trainer:
        sizes = ParallelSettings(distributed_optimizer=distributed)
        model_settings = ModelSettings(**asdict(arch), dtype=dtype, layer_spec="local", vocab_multiple=16)
        settings = Settings(
            run=RunSettings(dir="unused"),
            tokenizer=TokenizerSettings(dir="unused"),
            model=model_settings,
            parallel=sizes,
            packing=PackingSettings(token_budget=token_budget),
        )
        model = build_qwen3(arch, model_settings, sizes, context)
        load_hf_weights(model, arch, context, reference_model(arch).state_dict().__getitem__)
        chosen = OptimizerSettings(**({"lr": 1e-2, "weight_decay": 0.0} | optimizer))
        return Trainer(make_trainable(model, chosen, sizes, total_updates=total_updates), arch, settings, context)

    return make


@pytest.fixture
def sequences(arch: Architecture) -> list[TrainSequence]:
    """Six ragged sequences of 92 tokens; the second half of each is trained by both losses."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate((9, 21, 2, 14, 30, 16)):
        trained = np.arange(length) >= max(1, length // 2)
        made.append(
            TrainSequence(
                sequence_id=f"s{number}",
                token_ids=rng.integers(0, arch.vocab_size, length),
                policy_weight=(trained / 50).astype(np.float32),
                lm_weight=(trained / 80).astype(np.float32),
                advantages=(trained * rng.choice([-1.0, 0.8])).astype(np.float32),
                old_logprobs=(trained * rng.uniform(-4.5, -2.0, length)).astype(np.float32),
                rollout_logprobs=np.zeros(length, dtype=np.float32),
            )
        )
    return made
