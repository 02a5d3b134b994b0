"""Plans of a whole epoch: nothing lost or doubled, full bins, steps alike, ranks even whatever their number."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.config import PRESETS
from megatron_klear.packing import EpochBins, attention_share, bins_of, deal_bins, plan_bins, sequence_cost
from megatron_klear.packing.fitting import fullest_with_room
from megatron_klear.packing.order import seeded_draws

BUDGET = 32768
SHARE = attention_share(PRESETS["qwen3-8b"])


def long_chains(count: int, seed: int = 0) -> np.ndarray:
    """Log-normal with a mean of about 10,000 tokens, cut at 32,768."""
    drawn = np.random.default_rng(seed).lognormal(np.log(8200), 0.8, size=count)
    return np.clip(drawn, 16, BUDGET).astype(np.int64)


def planned(lengths: np.ndarray, bins_per_step: int = 64, seeds: tuple[int, ...] | None = (1, 0)) -> EpochBins:
    return plan_bins(lengths, token_budget=BUDGET, bins_per_step=bins_per_step, multiple=32, share=SHARE, seeds=seeds)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    bins_per_step=st.integers(1, 9),
    seeds=st.one_of(st.none(), st.tuples(st.integers(0, 9), st.integers(0, 3))),
)
def test_every_sequence_is_in_exactly_one_bin_within_the_budget(
    lengths: list[int], bins_per_step: int, seeds: tuple[int, ...] | None
) -> None:
    plan = plan_bins(
        np.array(lengths), token_budget=64, bins_per_step=bins_per_step, multiple=8, share=0.01, seeds=seeds
    )
    steps = [plan.step(number) for number in range(plan.num_steps)]
    assert [len(bins) for bins in steps[:-1]] == [bins_per_step] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) < 1.5 * bins_per_step
    bins = [members.tolist() for step in steps for members in step]
    assert sorted(row for members in bins for row in members) == list(range(len(lengths)))
    for members in bins:
        assert 0 < sum(-(-lengths[row] // 8) * 8 for row in members) <= 64


@pytest.mark.parametrize("seed", [0, 1])
def test_long_chains_fill_98_percent_of_the_slots_and_ranks_are_within_3_percent(seed: int) -> None:
    lengths = long_chains(40_000, seed)
    plan = planned(lengths, bins_per_step=128, seeds=(seed, 3))
    num_bins = len(plan.starts) - 1
    assert lengths.sum() / (num_bins * BUDGET) >= 0.98
    counts = []
    for number in range(plan.num_steps - 1):
        bins = plan.step(number)
        # By hand: matrix products are linear in the tokens, causal attention quadratic in each sequence's length.
        cost = np.array([sum(float(p) + SHARE * float(p) ** 2 for p in -(-lengths[b] // 32) * 32) for b in bins])
        for dp in (1, 8, 16, 32):
            dealt = deal_bins(cost, dp)
            assert sorted(dealt.reshape(-1).tolist()) == list(range(128))
            per_rank = cost[dealt].sum(axis=1)
            assert per_rank.max() / per_rank.min() <= 1.03
        counts.append(sum(len(members) for members in bins))
    assert np.std(counts) / np.mean(counts) < 0.05, "1 / N is nearly the same in every step"


def test_qwen3_8b_attention_adds_two_thirds_at_32k() -> None:
    # Published sizes: 36 layers, hidden 4096, 32 query and 8 key-value heads of 128, FFN 12288, vocabulary 151936.
    per_layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    products = 2 * (36 * per_layer + 4096 * 151936)
    causal_attention = 36 * 2 * 2 * 4096 * (32768 / 2)  # scores and values, each multiplies and adds, half of L
    (cost,) = sequence_cost(np.array([32768]), SHARE)
    assert cost / 32768 == pytest.approx(1 + causal_attention / products, rel=1e-12)
    assert 1.6 < cost / 32768 < 1.7


def test_seed_and_epoch_decide_and_nothing_else() -> None:
    lengths = long_chains(2000)
    first, again = planned(lengths), planned(lengths)
    np.testing.assert_array_equal(first.rows, again.rows)
    np.testing.assert_array_equal(first.starts, again.starts)
    for seeds in ((2, 0), (1, 1)):
        other = planned(lengths, seeds=seeds)
        assert len(other.starts) == len(first.starts)
        assert (other.rows != first.rows).mean() > 0.9
    unshuffled = planned(lengths, seeds=None)
    np.testing.assert_array_equal(unshuffled.rows, planned(lengths, seeds=None).rows)


def test_a_known_plan_stays_the_same_over_versions() -> None:
    plan = plan_bins(
        np.array([5, 9, 3, 8, 2, 7, 1, 6, 4, 10]), token_budget=10, bins_per_step=2, multiple=1, share=0.1, seeds=(7, 0)
    )
    bins = [sorted(members.tolist()) for number in range(plan.num_steps) for members in plan.step(number)]
    # Best fit by hand: 10, 9 + 1, 8 + 2, 7 + 3, 6 + 4, and 5 alone, which waits for the last step.
    assert bins == [[7, 8], [9], [2, 5], [1, 6], [0], [3, 4]]


@pytest.mark.parametrize(("seeds", "digest"), [((3, 1), "af87a808261274ff"), (None, "679eac60015e6078")])
def test_a_plan_of_20000_sequences_keeps_every_bit(seeds: tuple[int, ...] | None, digest: str) -> None:
    lengths = (seeded_draws(20_000, 5) % 4000 + 1).astype(np.int64)
    plan = plan_bins(lengths, token_budget=4096, bins_per_step=32, multiple=32, share=1e-4, seeds=seeds)
    order = plan.rows.astype(np.int64).tobytes() + plan.starts.astype(np.int64).tobytes()
    assert hashlib.blake2b(order, digest_size=8).hexdigest() == digest


def test_planning_takes_few_bytes_per_sequence() -> None:
    lengths = (seeded_draws(100_000, 5) % 4000 + 1).astype(np.int64)
    tracemalloc.start()
    try:
        plan = plan_bins(lengths, token_budget=4096, bins_per_step=32, multiple=32, share=1e-4, seeds=(3, 1))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.rows.nbytes == 4 * len(lengths)
    # Two int64 arrays at a time (draws and their order) and a few of int32; a list per bin took over 200.
    assert peak < 64 * len(lengths)
    assert kept < 12 * len(lengths)


def best_fit_by_search(sizes: list[int], capacity: int) -> list[int]:
    """Look at every bin for each item; of equally full bins the one that became so last."""
    left: list[int] = []
    touched: list[int] = []
    found = []
    for time, size in enumerate(sizes):
        fits = [number for number, room in enumerate(left) if room >= size]
        if fits:
            number = min(fits, key=lambda number: (left[number], -touched[number]))
        else:
            number = len(left)
            left.append(capacity)
            touched.append(0)
        left[number] -= size
        touched[number] = time
        found.append(number)
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60))
def test_best_fit_is_what_a_search_over_all_bins_finds(sizes: list[int]) -> None:
    sizes.sort(reverse=True)
    wanted = best_fit_by_search(sizes, 40)
    assert fullest_with_room(sizes, 40).tolist() == wanted
    assert fullest_with_room(np.array(sizes, dtype=np.int32), 40).tolist() == wanted


def test_half_empty_bins_wait_for_the_last_step() -> None:
    lengths = np.array([BUDGET] * 10 + [100] * 3)
    plan = planned(lengths, bins_per_step=3)
    assert plan.num_steps == 4
    assert {10, 11, 12} <= set(plan.step(3)[0].tolist())


def test_positions_in_the_step() -> None:
    assert bins_of([np.array([8, 3]), np.array([5]), np.array([1, 2, 4])]) == [[0, 1], [2], [3, 4, 5]]
