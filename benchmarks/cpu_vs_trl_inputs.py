"""What both sides of benchmarks/cpu_vs_trl.py train: a tiny random Qwen3, its tokenizer, sequences and prompts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PAD, END = 0, 1
FIRST_WORD = 4
"""Ids below are kept for special tokens and never drawn."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes; a step of SFT is one optimizer update, a step of RL is a rollout batch and its updates.

    The output layer does a quarter of the model's products, as in Qwen3-0.6B.
    """

    model: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "initializer_range": 0.05,
        }
    )
    seed: int = 0
    sft_sequences: int = 16
    """Per step."""
    sft_median_tokens: float = 96.0
    """Lengths are lognormal with sigma 0.8, as responses are: many short, few long."""
    sft_longest: int = 512
    prompts: int = 8
    """Per step."""
    responses: int = 8
    """Per prompt."""
    updates: int = 4
    """Per rollout batch, each on its share of the prompts."""
    mean_response_tokens: int = 64
    longest_response: int = 192
    steps: int = 400
    """For how many steps there are data."""
    learning_rate: float = 1e-6


def make_inputs(directory: Path, work: Workload) -> None:
    """Write hf/, sft.json, prompts.json and workload.json."""
    _make_model(directory / "hf", work)
    random = np.random.default_rng(work.seed)
    count, words = work.sft_sequences * work.steps, work.model["vocab_size"]
    lengths = np.clip(random.lognormal(np.log(work.sft_median_tokens), 0.8, count), 8, work.sft_longest).astype(int)
    sequences = [random.integers(FIRST_WORD, words, size=n).tolist() for n in lengths]
    prompts = [
        random.integers(FIRST_WORD, words, size=n).tolist() for n in random.integers(12, 33, work.prompts * work.steps)
    ]
    (directory / "sft.json").write_text(json.dumps(sequences))
    (directory / "prompts.json").write_text(json.dumps(prompts))
    (directory / "workload.json").write_text(json.dumps(asdict(work)))


def _make_model(directory: Path, work: Workload) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(work.seed)
    model = Qwen3ForCausalLM(Qwen3Config(**work.model, eos_token_id=END, pad_token_id=PAD))
    _set_end_probability(model, 1.0 / work.mean_response_tokens)
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD, do_sample=True)
    model.save_pretrained(directory)
    vocabulary = {"<pad>": PAD, "<end>": END, "<unknown>": 2, "<other>": 3}
    vocabulary |= {f"w{i}": i for i in range(FIRST_WORD, work.model["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(directory)


def _set_end_probability(model: Any, wanted: float) -> None:
    """Let responses end, so that lengths vary as they do in a real rollout.

    One channel is given to all embeddings alike, so that hidden states have a mean, along which the end token lies.
    """
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        ids = torch.randint(FIRST_WORD, model.config.vocab_size, (8, 64))
        hidden = model.model(ids).last_hidden_state.flatten(0, 1)
        direction = hidden.mean(0) / hidden.mean(0).square().sum()
        head, low, high = model.lm_head.weight, 0.0, 20.0
        for _ in range(30):
            middle = (low + high) / 2
            head[END] = middle * direction
            found = float(torch.softmax(hidden @ head.T, -1)[:, END].mean())
            low, high = (middle, high) if found < wanted else (low, middle)


def words_of(token_ids: list[int]) -> str:
    """The text that the tokenizer turns into these ids."""
    return " ".join(f"w{i}" for i in token_ids)


def reward(token_ids: list[int]) -> float:
    """A reward that is as good as random, so that hardly any group of responses has equal ones."""
    return 1.0 if sum(int(i) for i in token_ids) % 5 < 2 else -1.0
