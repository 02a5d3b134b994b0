"""DALI gives the bytes of the plain loader; ranks share a step's sequences; weights are those of the whole step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_klear.config import DataSettings
from megatron_klear.data import BinSteps, DataCursor, SequenceSteps, SftData, SftIndex, Steps, describe_source
from megatron_klear.data.index import files, merge
from megatron_klear.data.index.parts import Part
from megatron_klear.data.index.tokenize import PartCounts, PartJob
from megatron_klear.records import IGNORED_LABEL
from megatron_klear.trainer import PackLayout, SftBatch, SftReader, open_loader
from megatron_klear.trainer.dali_loading import DaliLoader
from megatron_klear.trainer.loading import PlainLoader, tensors_of

BUDGET = 256
CPU = torch.device("cpu")
Lengths = list[tuple[int, int]]


def write_index(directory: Path, lengths: Lengths) -> SftIndex:
    """An index of conversations with these many prompt and answer tokens; token n of row r is 1000 * r + n."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_klear.data.index.tokenize import _write_rows

    (directory / "tokenizer").mkdir()
    (directory / "in.jsonl").touch()
    source = describe_source([str(directory / "in.jsonl")], str(directory / "tokenizer"), "", "")
    job = PartJob(number=0, part=Part(file=0, start=0, end=0, input_bytes=0), source=source)
    job.directory.mkdir(parents=True)
    prefix = files.index_prefix(job.directory, files.CONVERSATIONS)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=True)
    rows = []
    for number, (prompt, answer) in enumerate(lengths):
        builder.add_document(np.arange(prompt + answer) + 1000 * number, [prompt, answer], [0, files.TRAINED_MODE])
        row = {"id": f"r{number}", "source": "", "line": number + 1, "keys": []}
        rows.append({**row, "tokens": prompt + answer, "trained": answer})
    builder.finalize(f"{prefix}.idx")
    _write_rows(job.directory / files.ROWS, rows)
    files.write_rejects(job.directory / files.REJECTS, [])
    counts = PartCounts(lines=len(rows), rows=len(rows), rejected=0)
    merge.merge_parts([job], [counts], lambda: None)
    return SftIndex(source.directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SftData:
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(1, 20)), int(rng.integers(1, 100))) for _ in range(45)]
    return SftData(write_index(tmp_path_factory.mktemp("index"), lengths), token_budget=BUDGET)


def sequence_steps(data: SftData) -> Steps:
    return SequenceSteps(DataCursor(len(data), 7, seed=1))


def bin_steps(data: SftData) -> Steps:
    return BinSteps(data.lengths, batch_bins=4, token_budget=BUDGET, multiple=32, share=0.001, seed=1)


def batches(loader: PlainLoader | DaliLoader) -> Iterator[SftBatch]:
    while True:
        try:
            yield loader.next_step()
        except StopIteration:
            return


@pytest.mark.parametrize(("make", "processes"), [(sequence_steps, 2), (bin_steps, 1), (bin_steps, 2)])
def test_dali_gives_the_bytes_of_the_plain_loader_also_after_a_resume(
    data: SftData, make: Callable[[SftData], Steps], processes: int
) -> None:
    layout = PackLayout(token_budget=BUDGET, dp_rank=1, dp_size=2, cp_rank=1, cp_size=2)
    steps = make(data)
    total = steps.steps_for_epochs(2)
    for _ in range(3):  # a resume: some steps are done
        steps.next_step()
    readers = [SftReader(data, copy.deepcopy(steps), layout, num_steps=total - 3) for _ in range(2)]
    kinds, count = set(), 3
    with (
        PlainLoader(readers[0], CPU, prefetch=2) as plain,
        DaliLoader(readers[1], CPU, processes=processes, prefetch=2) as dali,
    ):
        for one, other in zip(batches(plain), batches(dali), strict=True):
            np.testing.assert_array_equal(one.plan.rows, other.plan.rows)
            assert one.minibatch.sequence_ids == other.minibatch.sequence_ids
            assert one.minibatch.tokens == other.minibatch.tokens
            assert len(one.minibatch.packs) == len(other.minibatch.packs)
            for first, second in zip(one.minibatch.packs, other.minibatch.packs, strict=True):
                assert first.sequence_ids == second.sequence_ids
                assert first.max_seqlen == second.max_seqlen
                assert tensors_of(first).keys() == tensors_of(second).keys()
                for name, tensor in tensors_of(first).items():
                    found = tensors_of(second)[name]
                    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
                    assert found.numpy().tobytes() == tensor.numpy().tobytes(), name
            count += 1
            kinds.add(one.plan.bins is None)
            expected = steps.next_step()
            np.testing.assert_array_equal(one.plan.rows, expected.rows)
    assert count == total, "the last, partial batches as well"
    assert kinds == ({True} if make is sequence_steps else {True, False})


@pytest.mark.parametrize("make", [sequence_steps, bin_steps])
@pytest.mark.parametrize(("dp", "cp", "tp"), [(1, 1, 1), (2, 1, 1), (3, 2, 2), (8, 1, 1)])
def test_ranks_together_hold_every_token_of_the_step_once_with_the_weight_of_the_whole_step(
    data: SftData, make: Callable[[SftData], Steps], dp: int, cp: int, tp: int
) -> None:
    readers = {
        (d, c): SftReader(
            data,
            make(data),
            PackLayout(token_budget=BUDGET, dp_rank=d, dp_size=dp, cp_rank=c, cp_size=cp, tp_size=tp, share=0.001),
            num_steps=make(data).steps_for_epochs(1),
        )
        for d in range(dp)
        for c in range(cp)
    }
    wanted = make(data)
    for _ in range(wanted.steps_for_epochs(1)):
        plan = wanted.next_step()
        planned = {place: reader.next_step() for place, reader in readers.items()}
        assert len({len(step.microbatches) for step in planned.values()}) == 1  # type: ignore[union-attr]
        weights: dict[int, float] = {}
        for place, step in planned.items():
            assert step is not None
            for number in range(len(step.microbatches)):
                batch = readers[place].read(step, number)
                held = batch.lm_weight != 0
                assert int(batch.cu_seqlens_padded[-1]) <= BUDGET
                assert int((batch.labels[held] == IGNORED_LABEL).sum()) == 0
                for token, weight in zip(batch.labels[held].tolist(), batch.lm_weight[held].tolist(), strict=True):
                    assert token not in weights
                    weights[token] = weight
        prompts = {row: int(data.lengths[row] - data.trained[row]) for row in plan.rows.tolist()}
        tokens = {1000 * row + n for row in prompts for n in range(prompts[row], int(data.lengths[row]))}
        # Eq. 8: 1 / N for the target tokens of every sequence of the step.
        assert weights == dict.fromkeys(tokens, float(np.float32(1 / len(plan.rows))))


def test_what_fails_while_reading_ahead_reaches_the_training_loop(data: SftData) -> None:
    reader = SftReader(data, sequence_steps(data), PackLayout(token_budget=10), num_steps=3)  # too small a budget
    with PlainLoader(reader, CPU) as loader, pytest.raises(Exception, match="do not fit into a microbatch"):
        loader.next_step()


def test_a_loader_can_be_left_in_the_middle(data: SftData) -> None:
    reader = SftReader(data, sequence_steps(data), PackLayout(token_budget=BUDGET), num_steps=1000)
    with PlainLoader(reader, CPU, prefetch=1) as loader:
        loader.next_step()
    assert not loader._thread.is_alive()


def test_the_setting_chooses(data: SftData, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SftReader(data, sequence_steps(data), PackLayout(token_budget=BUDGET), num_steps=1)
    for choice in ("auto", "plain"):  # without a GPU, processes of their own are not worth their start
        with open_loader(reader, DataSettings(loader=choice), CPU) as loader:
            assert isinstance(loader, PlainLoader)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        DaliLoader, "__init__", lambda self, reader, device, processes, prefetch: asked.append((processes, prefetch))
    )
    open_loader(reader, DataSettings(loader="dali", loader_processes=3, prefetch=5), CPU)
    assert asked == [(3, 5)]


def test_microbatches_are_padded_to_what_fp8_products_need(data: SftData) -> None:
    layout = PackLayout(token_budget=BUDGET, cp_size=2, tp_size=2, token_multiple=16)
    reader = SftReader(data, sequence_steps(data), layout, num_steps=2)
    read = 0
    while (step := reader.next_step()) is not None:
        for number in range(len(step.microbatches)):
            assert len(reader.read(step, number).token_ids) % (2 * 16) == 0  # a rank's tokens, sharded by tp once more
            read += 1
    assert read


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["plain", "dali"])
def test_microbatches_on_the_gpu_have_the_same_bytes(data: SftData, loader: str) -> None:
    layout = PackLayout(token_budget=BUDGET)
    device = torch.device("cuda", 0)
    readers = [SftReader(data, sequence_steps(data), layout, num_steps=8) for _ in range(2)]
    settings = DataSettings(loader=loader)  # type: ignore[arg-type]
    with PlainLoader(readers[0], CPU) as wanted, open_loader(readers[1], settings, device) as found:
        for one, other in zip(batches(wanted), batches(found), strict=True):
            torch.cuda.synchronize()
            for first, second in zip(one.minibatch.packs, other.minibatch.packs, strict=True):
                assert first.max_seqlen == second.max_seqlen
                for name, tensor in tensors_of(first).items():
                    assert tensors_of(second)[name].device == device
                    assert tensors_of(second)[name].cpu().numpy().tobytes() == tensor.numpy().tobytes(), name
