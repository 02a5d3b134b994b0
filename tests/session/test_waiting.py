"""`--check` of an SFT run says what the run itself says at its start, with as many ranks as it is told."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_klear.config import load_settings
from megatron_klear.data import SftIndex, describe_source, prepare_index, sft_steps
from megatron_klear.packing import attention_share, deal_step, rank_costs
from megatron_klear.session.sft_balance import warn_of_waiting
from megatron_klear.session.waiting import word_on_waiting
from megatron_klear.train_sft import expected_waiting
from megatron_klear.trainer import PackLayout

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "examples" / "quickstart_sft.yaml")


@pytest.fixture(scope="module")
def data(make_chains: Callable[[Sequence[int]], Path]) -> Path:
    """The quickstart's tokenizer, and chains of very different lengths."""
    return make_chains(np.clip(np.random.default_rng(0).lognormal(np.log(4), 0.9, 600), 1, 12).astype(int).tolist())


def overrides(data: Path, *more: str) -> list[str]:
    return [f"tokenizer.dir={data / 'tokenizer'}", f"data.sft=[{data / 'sft.jsonl'}]", "data.heldout=[]",
            "evaluation.at_end=false", "packing.token_budget=512", *more]  # fmt: skip


def index_of(data: Path) -> SftIndex:
    source = describe_source([str(data / "sft.jsonl")], str(data / "tokenizer"), "<think>", "</think>")
    prepare_index(source, processes=1)
    return SftIndex(source.directory)


def test_without_an_index_lengths_are_assumed_and_that_is_said(data: Path, tmp_path: Path) -> None:
    """A copy of the data that is not tokenized."""
    rows = tmp_path / "sft.jsonl"
    rows.write_bytes((data / "sft.jsonl").read_bytes())
    settings = load_settings(
        CONFIG, [*overrides(data), f"data.sft=[{rows}]", "sft.batch_sequences=16"], entry="sft", world_size=8
    )
    lengths, waiting = expected_waiting(settings, 8).splitlines()
    assert "which is assumed since data.sft is not tokenized yet (python -m megatron_klear.data does that)" in lengths
    assert waiting.startswith("waiting: sft.batch_sequences=16: the slowest of 8 data-parallel ranks has ")
    assert not (tmp_path / "klear_index").exists(), "checking makes nothing"


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize(
    ("batch", "is_uneven"),
    [
        (["sft.batch_sequences=16"], True),
        (["sft.batch_sequences=200"], False),
        (["sft.batch_bins=8"], True),
        (["sft.batch_bins=9"], False),  # no multiple of the ranks, so that each step is packed anew
        (["sft.batch_bins=40"], False),
    ],
)
def test_check_says_what_the_start_says(
    data: Path, batch: list[str], is_uneven: bool, cp: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The same words, percentages and advice, for the run's own first steps."""
    index = index_of(data)
    settings = load_settings(
        CONFIG, overrides(data, *batch, f"parallel.cp={cp}", "run.seed=3"), entry="sft", world_size=8 * cp
    )
    lengths, waiting = expected_waiting(settings, 8 * cp).splitlines()
    assert lengths == (
        f"lengths: sequences of {index.lengths.mean():,.0f} tokens on average, the 600 of data.sft, by the index "
        f"{index.directory}"
    )
    layout = PackLayout(token_budget=512, dp_size=8, cp_size=cp, share=attention_share(settings.architecture))
    steps = sft_steps(settings, index.lengths)
    run: Any = SimpleNamespace(lengths=index.lengths)
    with caplog.at_level(logging.WARNING):
        warn_of_waiting(settings, run, steps, layout)
    assert bool(caplog.messages) is is_uneven
    if is_uneven:
        assert waiting == f"waiting: {caplog.messages[0]}"
    else:
        assert "the slowest of 8 data-parallel ranks has " in waiting
        assert "would be more even" not in waiting


def check(data: Path, tmp_path: Path, world_size: int, *more: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('megatron_klear.train_sft', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    arguments = ["--check", CONFIG, *overrides(data, *more), f"run.dir={tmp_path / 'run'}"]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "WORLD_SIZE": str(world_size)},
    )  # fmt: skip


def test_the_command_tells_it_for_the_ranks_it_is_given(data: Path, tmp_path: Path) -> None:
    index_of(data)
    eight = check(data, tmp_path, 8, "sft.batch_sequences=16")
    assert eight.returncode == 0, eight.stderr
    lines = dict(line.split(": ", 1) for line in eight.stdout.splitlines()[:-1])
    assert lines["run.dir"] == str(tmp_path / "run")
    assert lines["waiting"].startswith("sft.batch_sequences=16: the slowest of 8 data-parallel ranks has ")
    assert "sft.batch_bins=32" in lines["waiting"]
    assert eight.stdout.splitlines()[-1] == "[]", "no torch"
    one = check(data, tmp_path, 1, "sft.batch_sequences=16")
    assert one.returncode == 0
    assert "waiting: " not in one.stdout
    assert not (tmp_path / "run").exists()


def test_data_that_the_run_would_refuse_are_refused(data: Path, tmp_path: Path) -> None:
    longest = int(index_of(data).lengths.max())
    done = check(data, tmp_path, 2, f"packing.token_budget={longest - 1}", "sft.batch_sequences=16")
    assert done.returncode == 2
    assert f"not fit into a microbatch of packing.token_budget = {longest - 1} tokens" in done.stderr


@pytest.mark.parametrize(("slowest", "dp", "said"), [(1.029, 8, False), (1.031, 8, True), (2.0, 1, False)])
def test_little_waiting_is_not_worth_a_word(data: Path, slowest: float, dp: int, said: bool) -> None:
    settings = load_settings(CONFIG, overrides(data, "sft.batch_sequences=16"), entry="sft", world_size=8)
    word = word_on_waiting(settings, slowest=slowest, mean_tokens=100.0, dp=dp)
    assert (word is not None) is said


def test_costs_of_ranks_by_brute_force() -> None:
    """Every sequence is dealt once, no microbatch is over its budget, and costs are summed one by one."""
    lengths = np.random.default_rng(1).integers(1, 300, 90)
    bins = [list(range(start, start + 5)) for start in range(0, 40, 5)]
    for given, part in ((None, lengths), (bins, lengths[:40] // 8)):
        for dp in (2, 4):
            ranks = deal_step(part, given, token_budget=300, dp_size=dp, multiple=4, share=0.01)
            assert sorted(i for rank in ranks for members in rank for i in members) == list(range(len(part)))
            assert len({len(rank) for rank in ranks}) == 1
            assert all(sum(-(-int(part[i]) // 4) * 4 for i in members) <= 300 for rank in ranks for members in rank)
            by_hand = [sum(int(part[i]) + 0.01 * int(part[i]) ** 2 for m in rank for i in m) for rank in ranks]
            assert rank_costs(part, ranks, 0.01).tolist() == pytest.approx(by_hand, rel=1e-12)
