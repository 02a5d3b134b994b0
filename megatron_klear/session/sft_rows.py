"""The rows of an SFT run: tokenized by the first rank, opened by all, walked over step by step, logged by id."""

from __future__ import annotations

import json
import logging
from typing import Self

import numpy as np
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.config import BIN_MULTIPLE, Settings, row_files
from megatron_klear.data import (
    SftData,
    SftIndex,
    StepPlan,
    describe_source,
    prepare_index,
)
from megatron_klear.data.trained import SEQUENCES_FILE
from megatron_klear.errors import TrainingError
from megatron_klear.observe.jsonl import JsonLinesFile, keep_through_step, set_aside
from megatron_klear.observe.replace import replace_file
from megatron_klear.packing import sequence_multiple
from megatron_klear.session.launch import Preempted, StopRequest
from megatron_klear.session.session import Session

log = logging.getLogger(__name__)

DROPPED_FILE = "dropped.jsonl"


def open_sft_data(settings: Settings, stop: StopRequest) -> SftData:
    """Make the index of `data.sft` unless it is there, and open it (a collective).

    The first rank makes it with all of its machine's CPUs, while the others wait outside of any collective.

    Raises:
        DataError: on every rank, when rows or files cannot be used.
        Preempted: on the first rank, when it is asked to stop before that is done; what is finished is kept.
    """

    def alive() -> None:
        first_rank.alive()
        if stop.received:
            raise Preempted("stopped while data.sft was tokenized; start again to go on with what is not finished")

    context = parallel.start(settings.parallel, device=settings.run.device, seed=settings.run.seed)
    first_rank = parallel.FirstRank(context, silence_seconds=settings.parallel.timeout_seconds)
    tokenizer, data = settings.tokenizer, settings.data
    source = describe_source(
        row_files(data.sft), tokenizer.dir, tokenizer.think_start, tokenizer.think_end, index_dir=data.index_dir
    )
    first_rank.run(
        "tokenize data.sft",
        lambda: prepare_index(source, processes=data.tokenize_processes, alive=alive),
    )
    # Whoever finds the rows unusable below may leave at once: nobody still waits for word from the first rank.
    dist.barrier()
    bins = settings.sft.batch_bins is not None
    return SftData(
        SftIndex(source.directory),
        token_budget=settings.packing.token_budget,
        multiple=BIN_MULTIPLE if bins else sequence_multiple(settings.parallel.cp),
        oversize=settings.packing.oversize,
        max_positions=settings.yarn.training_positions(settings.architecture),
        max_reject_share=data.max_reject_share,
    )


def tell_rows(data: SftData) -> None:
    """Log which rows are left out, when they are many, and where the tokens are from, a few lines each."""
    for line in data.many_rejects_described():
        log.warning("%s", line)
    for line in data.sources_described():
        log.info("%s", line)


class SequenceLog:
    """Notes on the first rank which sequences each step trained, in `sequences.jsonl` of the run directory.

    `data/trained.py` has its format. Lines of steps that are trained again after a resume are dropped, so that over a
    whole run every id stands once per epoch.

    Args:
        session: the run.
        data: its rows; those left out for their length are listed in `dropped.jsonl`.
    """

    def __init__(self, session: Session, data: SftData) -> None:
        self._data = data
        self._file: JsonLinesFile | None = None
        if not session.is_first:
            return
        path = session.root / SEQUENCES_FILE
        if session.resumed is None:
            set_aside(path)
        else:
            keep_through_step(path, session.step)
        self._file = JsonLinesFile(path)
        if len(data.dropped):
            rows = "".join(json.dumps(row) + "\n" for row in data.dropped_rows())
            replace_file(session.root / DROPPED_FILE, rows)

    def note(self, step: int, plan: StepPlan, *, trained: StepPlan) -> None:
        """Log a trained step; on the disk when this returns.

        Args:
            step: that was trained.
            plan: of the walk that checkpoints hold.
            trained: of what the loader has read, which is logged.

        Raises:
            TrainingError: the two are not the same sequences, so that a resume would skip or repeat some.
        """
        if not (np.array_equal(plan.rows, trained.rows) and np.array_equal(plan.epochs, trained.epochs)):
            raise TrainingError(
                f"step {step} was trained on other sequences than the walk over data.sft has for it; the loader "
                "(data.loader) has fallen out of step. Start again from the last checkpoint, with data.loader=plain"
            )
        if self._file is None:
            return
        ids: dict[str, list[str]] = {}
        for row, epoch in zip(trained.rows.tolist(), trained.epochs.tolist(), strict=True):
            ids.setdefault(str(epoch), []).append(self._data.row_id(row))
        self._file.append({"step": step, "ids": ids})
        self._file.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
