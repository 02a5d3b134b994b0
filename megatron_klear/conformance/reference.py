"""The independent side of the comparison: transformers' Qwen3, one sequence at a time, in float64.

Shares no code with the training path: other model implementation, no packing, no sharding, full logits, the paper's
formulas spelled out (Eq. 11 with its literal quotient) and torch's own autograd and AdamW. In float32 or bfloat16 the
same computation tells what that data type costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import Architecture, OptimizerSettings
from megatron_klear.records import TrainSequence


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
    return [
        replace(s, old_logprobs=np.where(s.policy_weight != 0, values + s.old_logprobs, 0.0).astype(np.float32))
        for s, values in zip(sequences, logprobs, strict=True)
    ]


def sequence_logprobs(model: Any, token_ids: np.ndarray, temperature: float) -> torch.Tensor:
    """Logprob of each token given those before it, [L]; entry 0 is 0. Full logits; float32 at least from there on."""
    ids = torch.as_tensor(token_ids)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    picked = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
    return torch.cat([picked.new_zeros(1), picked])


def policy_objective(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, objective: PolicyObjective
) -> torch.Tensor:
    """The summands of Eq. 7 (clip), Eq. 11 with its literal quotient (gppo) or Eq. 15 (cispo), to be maximised, [L]."""
    delta = torch.exp(logprobs - old_logprobs)
    frozen = delta.detach()
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    if objective.kind == "cispo":
        return frozen.clamp(low, high) * advantages * logprobs
    if objective.kind == "clip":
        return torch.minimum(delta * advantages, delta.clamp(low, high) * advantages)
    clipped = torch.where(frozen < low, low / frozen * delta, torch.where(frozen > high, high / frozen * delta, delta))
    return torch.minimum(delta * advantages, clipped * advantages)


def reference_loss(
    model: Any, sequences: Sequence[TrainSequence], objective: PolicyObjective, temperature: float
) -> tuple[torch.Tensor, float]:
    """The joint objective of Eq. 14 with weights folded in, negated, a scalar; and the sum of its terms' sizes."""
    total, sizes = torch.zeros(()), 0.0
    for s in sequences:
        logprobs = sequence_logprobs(model, s.token_ids, temperature)
        weight, lm, advantage, old = (
            torch.as_tensor(x).to(logprobs.dtype) for x in (s.policy_weight, s.lm_weight, s.advantages, s.old_logprobs)
        )
        policy = policy_objective(logprobs, old, advantage, objective)
        total = total - (weight * policy).sum() - (lm * logprobs).sum()
        sizes += float(((weight * policy).abs() + (lm * logprobs).abs()).sum())
    return total, sizes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceResult:
    """What one process computes.

    Attributes:
        loss: the training loss.
        loss_terms: sum of the absolute values of its terms, which rounding errors grow with.
        logprobs: per sequence [L], before the update.
        logprobs_after: per sequence [L], after it.
        grads: gradient by Hugging Face name.
        grad_norm: L2 norm of all of them.
        updated: weights after the optimizer update, by Hugging Face name.
    """

    loss: float
    loss_terms: float
    logprobs: list[np.ndarray]
    logprobs_after: list[np.ndarray]
    grads: dict[str, torch.Tensor]
    grad_norm: float
    updated: dict[str, torch.Tensor]


def train_reference(
    model: Any,
    sequences: Sequence[TrainSequence],
    objective: PolicyObjective,
    optimizer: OptimizerSettings,
    *,
    temperature: float = 1.0,
    updates: int = 1,
) -> ReferenceResult:
    """Loss, gradients and clipped AdamW updates (no decay on vectors) by transformers and torch.

    Args:
        model: from `reference_model`, cast to the data type to compute in; its weights are updated.
        sequences: with weights.
        objective: the policy loss.
        optimizer: AdamW, without warm-up.
        temperature: divides the logits.
        updates: how many, all on the same sequences; the result is that of the last.
    """
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
    )
    for _ in range(updates):
        logprobs = all_logprobs(model, sequences, temperature)
        adam.zero_grad()
        loss, loss_terms = reference_loss(model, sequences, objective, temperature)
        loss.backward()
        grads = {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad)
        adam.step()
    return ReferenceResult(
        loss=float(loss.detach()),
        loss_terms=loss_terms,
        logprobs=logprobs,
        logprobs_after=all_logprobs(model, sequences, temperature),
        grads=grads,
        grad_norm=float(norm),
        updated={name: p.detach().clone() for name, p in named.items()},
    )


def all_logprobs(model: Any, sequences: Sequence[TrainSequence], temperature: float) -> list[np.ndarray]:
    """Logprobs of every sequence, float64 [L] each, without gradient."""
    with torch.no_grad():
        return [sequence_logprobs(model, s.token_ids, temperature).double().numpy() for s in sequences]
