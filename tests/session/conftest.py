"""Scored groups of made-up responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from megatron_klear.algorithm import group_advantages
from megatron_klear.records import Grade, Prompt, Rollout, RolloutGroup, ScoredGroup

MakeGroup = Callable[..., ScoredGroup]


@pytest.fixture
def make_group() -> MakeGroup:
    """A prompt's group from its rewards: 1 is correct, None ungraded, anything else wrong."""

    def make(
        name: str, rewards: Sequence[float | None], *, lengths: Sequence[int] | None = None, vocab_size: int = 29
    ) -> ScoredGroup:
        rng = np.random.default_rng(list(name.encode()))
        lengths = lengths or [int(n) for n in rng.integers(2, 12, len(rewards))]
        rollouts = tuple(
            Rollout(
                response_ids=rng.integers(0, vocab_size, length),
                rollout_logprobs=rng.uniform(-4.0, -1.0, length).astype(np.float32),
                finish_reason="length" if length > 8 else "stop",
                policy_versions=((0, length),),
            )
            for length in lengths
        )
        outcomes = ["ungraded" if r is None else "correct" if r == 1 else "wrong" for r in rewards]
        graded = np.array([r is not None for r in rewards])
        values = np.array([r or 0.0 for r in rewards], dtype=np.float32)
        advantages = group_advantages(torch.from_numpy(values), torch.from_numpy(graded)).numpy()
        prompt = Prompt(prompt_id=name, domain="math", token_ids=rng.integers(0, vocab_size, 4), reference="1")
        return ScoredGroup(
            group=RolloutGroup(prompt=prompt, rollouts=rollouts),
            grades=tuple(Grade(outcome=o, reward=float(v)) for o, v in zip(outcomes, values, strict=True)),
            rewards=values,
            is_correct=np.array([o == "correct" for o in outcomes]),
            graded=graded,
            advantages=advantages,
        )

    return make
