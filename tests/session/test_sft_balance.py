"""Waiting ranks are told of before the first step, with the setting that helps."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_klear.config import PRESETS, PackingSettings, SftSettings
from megatron_klear.data import BinSteps, DataCursor, SequenceSteps, Steps
from megatron_klear.packing import attention_share
from megatron_klear.session.sft_balance import slowest_rank, warn_of_waiting
from megatron_klear.trainer import PackLayout

BUDGET = 1000
SHARE = 0.002  # attention costs up to twice the products, as at lengths far beyond 32K


@pytest.fixture(scope="module")
def data() -> Any:
    drawn = np.random.default_rng(0).lognormal(np.log(250), 0.9, 4000)
    return SimpleNamespace(lengths=np.clip(drawn, 8, BUDGET - 40).astype(np.int64))


def settings_with(**sft: Any) -> Any:
    """The two sections that count; the others would want files."""
    return SimpleNamespace(sft=SftSettings(**sft), packing=PackingSettings(token_budget=BUDGET))


def steps_of(data: Any, settings: Any) -> Steps:
    if settings.sft.batch_bins is None:
        return SequenceSteps(DataCursor(len(data.lengths), settings.sft.batch_sequences, seed=0))
    return BinSteps(
        data.lengths, batch_bins=settings.sft.batch_bins, token_budget=BUDGET, multiple=32, share=SHARE, seed=0
    )


@pytest.mark.parametrize(
    ("sft", "dp", "said"),
    [
        ({"batch_sequences": 16}, 8, "sft.batch_sequences=16: the slowest of 8 data-parallel ranks has "),
        ({"batch_sequences": 256}, 8, ""),
        ({"batch_sequences": 16}, 1, ""),
        ({"batch_bins": 64}, 8, ""),
        ({"batch_bins": 8}, 8, "sft.batch_bins=8: the slowest of 8 data-parallel ranks has "),
    ],
)
def test_ranks_that_would_wait_are_told_of(
    data: Any, sft: dict[str, int], dp: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_with(**sft)
    layout = PackLayout(token_budget=BUDGET, dp_size=dp, share=SHARE)
    steps = steps_of(data, settings)
    before = steps.state_dict()
    with caplog.at_level(logging.WARNING):
        warn_of_waiting(settings, data, steps, layout)
    assert steps.state_dict() == before
    assert (said in caplog.text) if said else not caplog.text


def test_the_bins_that_are_named_help(data: Any, caplog: pytest.LogCaptureFixture) -> None:
    layout = PackLayout(token_budget=BUDGET, dp_size=8, share=SHARE)
    for sft in ({"batch_sequences": 16}, {"batch_sequences": 30}, {"batch_bins": 8}):
        caplog.clear()
        settings = settings_with(**sft)
        uneven = slowest_rank(data, steps_of(data, settings), layout)
        warn_of_waiting(settings, data, steps_of(data, settings), layout)
        (named,) = (
            int(n) for n in re.findall(r"sft.batch_bins=(\d+)|(\d+) would be more even", caplog.messages[0])[-1] if n
        )
        better = settings_with(batch_bins=named)
        assert named % 8 == 0
        assert named >= 4 * 8
        assert slowest_rank(data, steps_of(data, better), layout) < uneven


def test_the_bins_that_are_named_make_long_chains_even_for_the_8b(caplog: pytest.LogCaptureFixture) -> None:
    """128 sequences fill 40 packs: as many for 64 ranks would be one each, a fifth over the mean, so more are named."""
    drawn = np.random.default_rng(0).lognormal(np.log(7600), 0.8, 8000)
    chains: Any = SimpleNamespace(lengths=np.clip(drawn, 64, 32768).astype(np.int64))
    layout = PackLayout(token_budget=32768, dp_size=64, share=attention_share(PRESETS["qwen3-8b"]))

    def settings(**sft: Any) -> Any:
        return SimpleNamespace(sft=SftSettings(**sft), packing=PackingSettings(token_budget=32768))

    def steps(bins: int) -> Steps:
        return BinSteps(chains.lengths, batch_bins=bins, token_budget=32768, multiple=32, share=layout.share, seed=0)

    few = SequenceSteps(DataCursor(len(chains.lengths), 128, seed=0))
    warn_of_waiting(settings(batch_sequences=128), chains, few, layout)
    (named,) = (int(n) for n in re.findall(r"sft.batch_bins=(\d+)", caplog.messages[0]))
    assert named == 256
    assert slowest_rank(chains, steps(64), layout) > 1.1
    assert slowest_rank(chains, steps(named), layout) < 1.03
    caplog.clear()
    warn_of_waiting(settings(batch_bins=named), chains, steps(named), layout)
    assert not caplog.messages
