"""Plans with the lengths of data that is tokenized already, against the index as Megatron-Core reads it and a run's own
walk over it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.config import Settings
from megatron_klear.config.plan_settings import judge_plan
from megatron_klear.data import SftIndex, describe_source, indexed_lengths, prepare_index, sft_steps
from megatron_klear.data.index import files
from megatron_klear.packing import attention_share
from megatron_klear.plan import main
from megatron_klear.planning import best_layouts, make_plan, stored_lengths
from megatron_klear.planning.lengths import StoredLengths
from megatron_klear.session.sft_balance import slowest_rank
from megatron_klear.trainer import PackLayout

ROOT = Path(__file__).parents[2]
ROWS = 400


@pytest.fixture(scope="module")
def rows(make_chains: Callable[[Sequence[int]], Path]) -> Path:
    """The quickstart's tokenizer, and chains of very different lengths."""
    return make_chains(np.clip(np.random.default_rng(0).lognormal(np.log(15), 0.8, ROWS), 1, 60).astype(int).tolist())


@pytest.fixture
def data(rows: Path, tmp_path: Path) -> Path:
    """A copy of them that nobody has tokenized."""
    return Path(shutil.copytree(rows, tmp_path / "data"))


@pytest.fixture
def overrides(data: Path) -> list[str]:
    return [f"data.sft=[{data / 'sft.jsonl'}]", f"tokenizer.dir={data / 'tokenizer'}", "data.prompts=[]",
            "packing.token_budget=1024"]  # fmt: skip


def tokenized(data: Path) -> SftIndex:
    source = describe_source([str(data / "sft.jsonl")], str(data / "tokenizer"), "<think>", "</think>")
    prepare_index(source, processes=1)
    return SftIndex(source.directory)


def settings_of(config: Path, *overrides: str, gpus: int = 8) -> Settings:
    settings, problems = judge_plan(config, overrides, entry="sft", world_size=gpus)
    assert problems == []
    return settings


def test_before_and_after_the_data_are_tokenized(
    config: Path, data: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*more: str) -> tuple[dict[str, Any], str]:
        main([str(config), *overrides, *more, "--gpus", "8", "--gpu", "h200", "--json"])
        plan = json.loads(capsys.readouterr().out)["plan"]
        return plan["step"], " ".join(plan["assumptions"])

    step, told = planned()
    assert step["lengths_from"] is None
    assert (
        "log-normal with a spread of 1, cut off at 1,024, which is assumed since data.sft is not tokenized yet" in told
    )
    index = tokenized(data)
    step, told = planned()
    assert step["lengths_from"] == str(index.directory)
    assert step["mean_tokens"] == index.lengths.mean()
    assert f"the {ROWS:,} of data.sft, by the index {index.directory}, packed as the run packs them" in told
    assert "log-normal" not in told
    step, told = planned("--mean-tokens", "77")
    assert (step["lengths_from"], step["mean_tokens"]) == (None, 77)
    assert "assumed since --mean-tokens asks for that" in told


@pytest.mark.parametrize("batch", ["sft.batch_sequences=32", "sft.batch_bins=8", "sft.batch_bins=9"])
def test_the_updates_are_those_of_the_run(config: Path, data: Path, overrides: list[str], batch: str) -> None:
    """Against the walk of a run and what it says of its ranks at its start."""
    index = tokenized(data)
    settings = settings_of(config, *overrides, batch, "run.seed=5")
    stored = stored_lengths(settings)
    assert isinstance(stored, StoredLengths)
    plan = make_plan(settings, entry="sft", gpus=8, device_name="h200", lengths=stored)
    steps = sft_steps(settings, index.lengths)
    share = attention_share(settings.architecture)
    layout = PackLayout(token_budget=1024, dp_size=8, share=share)
    count = len(stored.updates.steps)
    assert count == 6
    slowest = slowest_rank(index, steps, layout)  # type: ignore[arg-type]
    assert plan.even.slowest == pytest.approx(slowest, rel=1e-9)
    assert slowest > 1.001
    taken = [steps.next_step() for _ in range(count)]
    if batch == "sft.batch_bins=8":  # a bin to each rank: no choice is left to the dealing
        costs = [
            [
                sum(int(n) + share * int(n) ** 2 for n in index.lengths[step.rows][members])
                for members in step.bins or []
            ]
            for step in taken
        ]
        by_hand = [max(cost) / (sum(cost) / 8) for cost in costs]
        assert plan.even.slowest == pytest.approx(sum(by_hand) / count, rel=1e-9)
    for (lengths, bins), step in zip(stored.updates.steps, taken, strict=True):
        np.testing.assert_array_equal(lengths, index.lengths[step.rows])
        assert bins == step.bins
    assert plan.work.sequences == round(sum(len(step.rows) for step in taken) / count)
    wide = [int(n) for n in index.lengths]
    assert plan.work.mean_square == pytest.approx(sum(n * n for n in wide) / ROWS, rel=1e-12)
    assert plan.work.longest == max(wide)


def test_every_layout_of_a_search_has_them(config: Path, data: Path, overrides: list[str]) -> None:
    tokenized(data)
    settings = settings_of(config, *overrides)
    stored = stored_lengths(settings)
    assert isinstance(stored, StoredLengths)
    found = best_layouts(settings, entry="sft", gpus=8, device_name="h200", lengths=stored)
    assert found
    assert {candidate.plan.stored for candidate in found} == {stored}


def test_a_search_for_a_layout_that_is_impossible_has_them_too(
    config: Path, data: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    index = tokenized(data)
    arguments = [*overrides, "parallel.tp=3", "--gpus", "8", "--gpu", "h200", "--search", "--top", "1", "--json"]
    assert main([str(config), *arguments]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] is None
    assert found["layouts"][0]["step"]["lengths_from"] == str(index.directory)


def test_what_is_too_long_is_left_out_or_refused_as_the_run_would(
    config: Path, data: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    index = tokenized(data)
    limit = int(np.sort(index.lengths)[-20]) // 2 * 2
    too_long = int((index.lengths > limit).sum())
    assert 0 < too_long < ROWS
    stored = stored_lengths(settings_of(config, *overrides, f"packing.token_budget={limit}", "packing.oversize=drop"))
    assert isinstance(stored, StoredLengths)
    assert (stored.left_out, len(stored.lengths)) == (too_long, ROWS - too_long)
    status = main([str(config), *overrides, f"packing.token_budget={limit}", "--gpus", "8", "--gpu", "h200"])
    assert status == 2
    told = capsys.readouterr().err
    assert f"{too_long} sequences do not fit into a microbatch of packing.token_budget = {limit} tokens" in told
    assert f", the longest has {index.lengths.max()}: set packing.token_budget to at least" in told
    assert len(told.splitlines()) == 2  # a head, and one line for all of them


@pytest.mark.parametrize(("batch", "multiple"), [("sft.batch_bins=1", 32), ("sft.batch_sequences=1", 1)])
def test_conversations_that_are_all_dropped_are_told_with_the_shortest(
    config: Path, data: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], batch: str, multiple: int
) -> None:
    shortest = -(-int(tokenized(data).lengths.min()) // multiple) * multiple
    drop = ("packing.token_budget=2", "packing.oversize=drop", batch, "--gpus", "1", "--gpu", "h200")
    assert main([str(config), *overrides, *drop]) == 2
    told = capsys.readouterr().err
    assert f"all {ROWS} conversations are over packing.token_budget = 2 tokens" in told
    padded = f" (padded to a multiple of {multiple})" if multiple > 1 else ""
    assert f"the shortest has {shortest}{padded}: raise packing.token_budget" in told


def test_too_few_rows_for_a_step_are_told(
    config: Path, data: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenized(data)
    assert main([str(config), *overrides, "sft.batch_sequences=999", "--gpus", "8", "--gpu", "h200"]) == 2
    assert f"data.sft holds {ROWS} usable rows, fewer than the 999 of a batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda data, index: (data / "sft.jsonl").unlink(), "the files of data.sft cannot be seen from here"),
        (lambda data, index: shutil.rmtree(data / "tokenizer"), "tokenizer.dir cannot be seen from here"),
        (lambda data, index: (index / files.MANIFEST).unlink(), "data.sft is not tokenized yet"),
        (lambda data, index: (index / files.ROWS).write_bytes(b"PAR1"), "the index of data.sft cannot be read"),
        (lambda data, index: (index / files.MANIFEST).write_text("{}"), "the index of data.sft cannot be read"),
        (lambda data, index: os.utime(data / "sft.jsonl", (1, 1)), "data.sft is not tokenized yet"),
    ],
)
def test_without_an_index_of_exactly_these_data_the_reason_is_told(
    config: Path, data: Path, overrides: list[str], break_it: Callable[[Path, Path], Any], told: str
) -> None:
    directory = tokenized(data).directory
    settings = settings_of(config, *overrides)
    assert indexed_lengths(settings).told == str(directory)
    break_it(data, directory)
    found = stored_lengths(settings)
    assert isinstance(found, str)
    assert told in found


def test_torch_stays_out(config: Path, data: Path, overrides: list[str]) -> None:
    tokenized(data)
    arguments = [str(config), *overrides, "--gpus", "8", "--gpu", "h200", "--search", "--top", "1"]
    program = (
        "import sys\n"
        "from megatron_klear.plan import main\n"
        f"main({arguments!r})\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "by the index" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
