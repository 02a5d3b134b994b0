"""Token weights against loops that average the way the equations do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.algorithm import (
    batch_token_weights,
    group_token_weights,
    lm_token_weights,
    masked_token_weights,
    policy_token_weights,
    sequence_token_weights,
    sft_token_weights,
)

GROUPS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=5)


def plain_mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(counts=GROUPS, seed=st.integers(0, 1000))
def test_weighted_sums_are_the_means_of_the_equations(counts: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = [[rng.normal(size=count).tolist() for count in group] for group in counts]
    present = [[tokens for tokens in group if tokens] for group in losses]
    present = [group for group in present if group]

    def weighted(weights: list[np.ndarray]) -> float:
        return sum(
            float(weights[g][j]) * loss
            for g, group in enumerate(losses)
            for j, tokens in enumerate(group)
            for loss in tokens
        )

    if not present:
        for name in ("group", "sequence", "batch"):
            assert all(not w.any() for w in policy_token_weights(counts, name))  # type: ignore[arg-type]
        return
    token_level = plain_mean([plain_mean([x for tokens in group for x in tokens]) for group in present])
    sequence_level = plain_mean([plain_mean([plain_mean(tokens) for tokens in group]) for group in present])
    whole = plain_mean([x for group in present for tokens in group for x in tokens])
    assert weighted(group_token_weights(counts)) == pytest.approx(token_level, abs=1e-12)
    assert weighted(sequence_token_weights(counts)) == pytest.approx(sequence_level, abs=1e-12)
    assert weighted(batch_token_weights(counts)) == pytest.approx(whole, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts=GROUPS, name=st.sampled_from(["group", "sequence", "batch"]))
def test_weights_sum_to_one_and_skip_absent_responses(counts: list[list[int]], name: str) -> None:
    weights = policy_token_weights(counts, name)  # type: ignore[arg-type]
    total = sum(float(np.dot(w, group)) for w, group in zip(weights, counts, strict=True))
    assert total == pytest.approx(1.0 if any(map(any, counts)) else 0.0)
    for w, group in zip(weights, counts, strict=True):
        assert w.dtype == np.float64
        assert [bool(value) for value in w] == [count > 0 for count in group]


def test_by_hand() -> None:
    counts = [[2, 6], [4, 0]]
    assert [w.tolist() for w in group_token_weights(counts)] == [[1 / 16, 1 / 16], [1 / 8, 0.0]]
    assert [w.tolist() for w in sequence_token_weights(counts)] == [[1 / 8, 1 / 24], [1 / 8, 0.0]]
    assert [w.tolist() for w in batch_token_weights(counts)] == [[1 / 12, 1 / 12], [1 / 12, 0.0]]
    lm = lm_token_weights(counts, [[True, False], [True, True]], lm_loss_weight=0.3)
    assert [w.tolist() for w in lm] == [[pytest.approx(0.05), 0.0], [pytest.approx(0.05), 0.0]]
    assert sft_token_weights([3, 0, 5]).tolist() == [0.5, 0.0, 0.5]
    assert sft_token_weights([3, 0, 5], "token").tolist() == [0.125, 0.0, 0.125]


def test_no_correct_response_and_nothing_at_all() -> None:
    assert lm_token_weights([[3, 4]], [[False, False]])[0].tolist() == [0.0, 0.0]
    assert group_token_weights([]) == []
    assert sft_token_weights([]).tolist() == []


def test_minibatch_is_the_sum_of_what_ranks_hold() -> None:
    counts = [[5, 3], [8, 2], [1, 1], [7, 9]]
    everywhere = group_token_weights(counts)
    shares = [sum(float(np.dot(everywhere[g], counts[g])) for g in rank) for rank in ((0, 2), (1, 3))]
    assert sum(shares) == pytest.approx(1.0)


def test_mask() -> None:
    result = masked_token_weights(0.1, np.array([False, True, True, False]))
    assert result.dtype == np.float32
    assert result.tolist() == [0.0, pytest.approx(0.1), pytest.approx(0.1), 0.0]


def test_refusals_name_the_group() -> None:
    with pytest.raises(ValueError, match="group 1"):
        group_token_weights([[1, 2], [-1, 2]])
    with pytest.raises(ValueError, match="whole numbers"):
        batch_token_weights([np.array([1.5])])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="allowed are group, sequence, batch"):
        policy_token_weights([[1]], "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed are sequence, token"):
        sft_token_weights([1], "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one entry per response"):
        lm_token_weights([[1, 2]], [[True]])
    with pytest.raises(ValueError, match="one entry per response"):
        lm_token_weights([[1, 2]], [])
