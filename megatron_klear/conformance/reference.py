"""The independent side of the comparison: transformers' Qwen3, one sequence at a time, in float64.

Shares no code with the training path: other model implementation, no packing, no sharding, full logits, the paper's
formulas spelled out (Eq. 11 with its literal quotient) and torch's own autograd and AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import Architecture, OptimizerSettings
from megatron_klear.records import TrainSequence

OBJECTIVE = PolicyObjective(kind="gppo", epsilon_low=0.2, epsilon_high=0.28)


def reference_model(arch: Architecture, *, seed: int = 0) -> Any:
    """transformers' Qwen3ForCausalLM in float32 with random weights (norms included), the same on every process."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_position_embeddings,
        rms_norm_eps=arch.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
        tie_word_embeddings=arch.tie_embeddings,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Wide enough that logprobs differ from token to token and every norm weight matters.
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.08)
    return model


def reference_sequences(arch: Architecture, lengths: Sequence[int], *, kind: str, seed: int = 1) -> list[TrainSequence]:
    """Weighted sequences whose ratios fall into all four clip regions and between.

    Args:
        arch: sizes of the model.
        lengths: tokens of each sequence, at least 2.
        kind: `sft` (language-model weights only) or `rl` (policy and language-model weights, prompts masked).
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    total = float(sum(lengths))
    sequences = []
    for number, length in enumerate(lengths):
        response = np.arange(length) >= max(1, length // 3)
        policy = response if kind == "rl" else np.zeros(length, dtype=bool)
        correct = kind == "sft" or number % 2 == 0
        sequences.append(
            TrainSequence(
                sequence_id=f"s{number}",
                token_ids=rng.integers(0, arch.vocab_size, length),
                policy_weight=(policy / total).astype(np.float32),
                lm_weight=((response & correct) * (0.1 if kind == "rl" else 1.0) / total).astype(np.float32),
                advantages=np.full(length, rng.choice([-1.3, 0.7]), dtype=np.float32) * policy.astype(np.float32),
                # Around a uniform guess: after the shift below, ratios spread from 0.4 to 2.5.
                old_logprobs=(rng.uniform(-0.9, 0.9, length) * policy).astype(np.float32),
                rollout_logprobs=np.zeros(length, dtype=np.float32),
            )
        )
    return sequences


def with_old_logprobs(sequences: Sequence[TrainSequence], logprobs: Sequence[np.ndarray]) -> list[TrainSequence]:
    """Turn the offsets in `old_logprobs` into old logprobs around the given ones."""
    from dataclasses import replace

    return [
        replace(s, old_logprobs=np.where(s.policy_weight != 0, values + s.old_logprobs, 0.0).astype(np.float32))
        for s, values in zip(sequences, logprobs, strict=True)
    ]


def sequence_logprobs(model: Any, token_ids: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """Logprob of each token given those before it, [L]; entry 0 is 0. Full logits, in the model's data type."""
    ids = torch.as_tensor(token_ids)
    logits = model(input_ids=ids[None]).logits[0, :-1] / temperature
    picked = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
    return torch.cat([picked.new_zeros(1), picked])


def reference_loss(model: Any, sequences: Sequence[TrainSequence]) -> torch.Tensor:
    """The joint objective of Eq. 14 with weights folded in, Eq. 11 written with its literal quotient."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for s in sequences:
        logprobs = sequence_logprobs(model, s.token_ids)
        weight, lm, advantage, old = (
            torch.as_tensor(x).to(logprobs.dtype) for x in (s.policy_weight, s.lm_weight, s.advantages, s.old_logprobs)
        )
        delta = torch.exp(logprobs - old)
        frozen = delta.detach()
        low, high = 1 - OBJECTIVE.epsilon_low, 1 + OBJECTIVE.epsilon_high
        clipped = torch.where(frozen < low, low / frozen * delta, torch.where(frozen > high, high / frozen * delta, delta))
        total = total - (weight * torch.minimum(delta * advantage, clipped * advantage)).sum() - (lm * logprobs).sum()
    return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceResult:
    """What one process computes.

    Attributes:
        loss: the training loss.
        grads: gradient by Hugging Face name.
        updated: weights after the optimizer update, by Hugging Face name.
        logprobs: per sequence [L].
    """

    loss: float
    grads: dict[str, torch.Tensor]
    updated: dict[str, torch.Tensor]
    logprobs: list[np.ndarray]


def compute_reference(
    arch: Architecture, sequences: Sequence[TrainSequence], optimizer: OptimizerSettings, dtype: torch.dtype
) -> ReferenceResult:
    """Loss, gradients and one clipped AdamW update (no decay on vectors) by transformers and torch in `dtype`."""
    model = reference_model(arch).to(dtype)
    with torch.no_grad():
        logprobs = [sequence_logprobs(model, s.token_ids).double().numpy() for s in sequences]
    loss = reference_loss(model, sequences)
    loss.backward()
    named = dict(model.named_parameters())
    grads = {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
    torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
    ).step()
    updated = {name: p.detach().clone() for name, p in named.items()}
    return ReferenceResult(loss=float(loss.detach()), grads=grads, updated=updated, logprobs=logprobs)
