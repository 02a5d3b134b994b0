"""The records that travel between rooms: frozen, keyword-only, with shapes in the docstrings.

Letters: L tokens of one sequence, T packed tokens, N sequences in a pack, M responses per prompt.
Host-side records hold numpy arrays (they are gathered between processes and stored); `PackedBatch`
holds torch tensors (it is what the model eats).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Domain = Literal["math", "code"]
Outcome = Literal["correct", "wrong", "partial", "malformed", "ungraded"]
FinishReason = Literal["stop", "length", "abort"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

IGNORED_LABEL = -100
"""Label of a packed position that predicts nothing (padding, last token of a sequence)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A problem to answer.

    Attributes:
        prompt_id: unique within its source; the key of ledgers, seeds and messages.
        domain: which grader judges the answers.
        token_ids: int64 [L], chat template applied, ready for generation.
        reference: gold answer (math), or the tests as JSON (code).
        text: the problem as a person reads it.
    """

    prompt_id: str
    domain: Domain
    token_ids: IntArray
    reference: str
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One sampled response.

    Attributes:
        response_ids: int64 [L], the end token included when the model produced it.
        rollout_logprobs: float32 [L], log-probability of each token under the engine's sampling
            temperature and the full vocabulary (before top-p renormalisation).
        finish_reason: `stop` at an end token, `length` at the token budget, `abort` if interrupted.
        policy_versions: (version, number of tokens) per run of tokens, in order; tokens sum to L.
    """

    response_ids: IntArray
    rollout_logprobs: FloatArray
    finish_reason: FinishReason
    policy_versions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutGroup:
    """The M responses to one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What a grader says of one response.

    Attributes:
        outcome: `ungraded` means the grader failed, never that the answer is wrong.
        reward: what the policy is trained on; meaningless (0.0) when ungraded.
        reason: a short text for people.
        tests: fingerprint of the tests that a code answer was scored by: their number, content, order and limits.
            Empty where none were run. No part of what makes two grades equal.
    """

    outcome: Outcome
    reward: float
    reason: str = ""
    tests: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredGroup:
    """A group with its grades and advantages.

    Attributes:
        group: prompt and responses [M].
        grades: one per response [M].
        rewards: float32 [M], 0 where ungraded.
        is_correct: bool [M], the positive mask Phi of Eq. 13.
        graded: bool [M]; ungraded responses carry no gradient and enter no mean.
        advantages: float32 [M], A-tilde of Eq. 4 over the graded responses, 0 elsewhere.
    """

    group: RolloutGroup
    grades: tuple[Grade, ...]
    rewards: FloatArray
    is_correct: NDArray[np.bool_]
    graded: NDArray[np.bool_]
    advantages: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainSequence:
    """One sequence to train on, in the token frame: entry i of every array speaks of `token_ids[i]`.

    Weights hold every mask and denominator already: the training loss is the plain sum over tokens,
    microbatches and ranks. Entry 0 is never predicted, so its weights must be 0.

    Attributes:
        sequence_id: names it in messages.
        token_ids: int64 [L].
        policy_weight: float32 [L], factor of the policy loss of each token.
        lm_weight: float32 [L], factor of -logprob of each token (SFT, or alpha * LM loss of Eq. 13).
        advantages, old_logprobs, rollout_logprobs: float32 [L]; zeros where they do not apply.
    """

    sequence_id: str
    token_ids: IntArray
    policy_weight: FloatArray
    lm_weight: FloatArray
    advantages: FloatArray
    old_logprobs: FloatArray
    rollout_logprobs: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """One microbatch of packed sequences (THD), as one context-parallel rank sees it.

    Index t predicts `labels[t]`; the shift from the token frame is done once, in `packing/`.
    T is the number of tokens on this rank; offsets count tokens of the whole context-parallel group.

    Attributes:
        token_ids, labels, position_ids: int64 [T]; `labels` is IGNORED_LABEL where nothing is predicted.
        cu_seqlens: int32 [N+1], offsets of the sequences without padding.
        cu_seqlens_padded: int32 [N+1], offsets with each sequence padded to the layout's multiple.
        max_seqlen: longest padded sequence, in tokens.
        policy_weight, lm_weight, advantages, old_logprobs, rollout_logprobs: float32 [T], 0 where ignored.
        sequence_ids: [N] names for messages.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_padded: torch.Tensor
    max_seqlen: int
    policy_weight: torch.Tensor
    lm_weight: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    sequence_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelAxis:
    """This process's place on one axis of the layout.

    Attributes:
        rank: 0 .. size-1.
        size: number of ranks on the axis.
        group: torch.distributed process group; always there, also when size is 1.
    """

    rank: int
    size: int
    group: torch.distributed.ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """The layout as this process sees it; `world` is all ranks."""

    world: ParallelAxis
    tp: ParallelAxis
    cp: ParallelAxis
    pp: ParallelAxis
    dp: ParallelAxis
    dp_cp: ParallelAxis
    device: torch.device


class EncodedJson(Mapping[str, Any]):
    """A JSON object that is large and goes to many: it is its bytes, which all of them are sent.

    Reading an entry decodes all of it, every time.

    Args:
        data: the object in UTF-8.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __getitem__(self, key: str) -> Any:
        return self._decoded()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __len__(self) -> int:
        return len(self._decoded())

    def _decoded(self) -> dict[str, Any]:
        decoded: dict[str, Any] = json.loads(self.data)
        return decoded
