"""One process with its groups, a tiny Qwen3 in both implementations, and packs of ragged sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from megatron_klear import parallel
from megatron_klear.config import Architecture, ModelSettings, ParallelSettings
from megatron_klear.conformance.reference import reference_model
from megatron_klear.model import Qwen3Model, build_qwen3, load_hf_weights
from megatron_klear.records import ParallelContext, TrainSequence

LENGTHS = (7, 1, 19, 2, 33, 12)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """A launch of one process, ended with the module so that others may start their own."""
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


@pytest.fixture
def make_arch() -> Callable[..., Architecture]:
    """Grouped heads, a head size that is not hidden / heads, a vocabulary that needs padding."""

    def make(**changes: Any) -> Architecture:
        sizes: dict[str, Any] = {
            "num_layers": 2,
            "hidden_size": 24,
            "ffn_hidden_size": 40,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "head_dim": 16,
            "vocab_size": 61,
            "max_position_embeddings": 64,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": False,
            "init_std": 0.02,
        }
        return Architecture(**(sizes | changes))

    return make


@pytest.fixture
def make_model(context: ParallelContext) -> Callable[..., Qwen3Model]:
    """Our model with the weights of `reference_model`."""

    def make(arch: Architecture, **settings: Any) -> Qwen3Model:
        chosen = {"dtype": "float32", "layer_spec": "local", "vocab_multiple": 16} | settings
        model = build_qwen3(arch, ModelSettings(**asdict(arch), **chosen), ParallelSettings(), context)
        load_hf_weights(model, arch, context, reference_model(arch).state_dict().__getitem__)
        return model

    return make


@pytest.fixture
def make_sequences() -> Callable[..., list[TrainSequence]]:
    """Random tokens; every token but the first has a language-model weight."""

    def make(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[TrainSequence]:
        rng = np.random.default_rng(3)
        sequences = []
        for number, length in enumerate(lengths):
            zeros = np.zeros(length, dtype=np.float32)
            sequences.append(
                TrainSequence(
                    sequence_id=f"s{number}",
                    token_ids=rng.integers(0, vocab_size, length),
                    policy_weight=zeros,
                    lm_weight=(np.arange(length) > 0).astype(np.float32) / 50,
                    advantages=zeros,
                    old_logprobs=zeros,
                    rollout_logprobs=zeros,
                )
            )
        return sequences

    return make
