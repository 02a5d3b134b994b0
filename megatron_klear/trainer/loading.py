"""Packed microbatches of SFT steps, read ahead of the training loop: by NVIDIA DALI, or by a plain thread."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from megatron_klear.config import DataSettings, dali_installed
from megatron_klear.data import StepPlan
from megatron_klear.records import PackedBatch
from megatron_klear.trainer.sft_batches import PlannedStep, SftReader
from megatron_klear.trainer.trainer import Minibatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SftBatch:
    """A step, ready to be trained: its sequences, and its microbatches on the device."""

    plan: StepPlan
    minibatch: Minibatch


class SftLoader(Protocol):
    """Gives the steps one by one; a context manager."""

    def next_step(self) -> SftBatch:
        """The next step; waits for it where it is not ready.

        Raises:
            StopIteration: all steps are done.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_loader(reader: SftReader, settings: DataSettings, device: torch.device) -> SftLoader:
    """The loader that `data.loader` asks for; all of them give the same bytes.

    Args:
        reader: the steps still to do.
        settings: loader, processes and microbatches to read ahead.
        device: where microbatches go.
    """
    if settings.loader == "dali" or (settings.loader == "auto" and device.type == "cuda" and dali_installed()):
        from megatron_klear.trainer.dali_loading import DaliLoader

        return DaliLoader(reader, device, processes=settings.loader_processes, prefetch=settings.prefetch)
    return PlainLoader(reader, device, prefetch=settings.prefetch)


class PlainLoader:
    """Reads and packs in a thread; for a GPU into pinned memory, from which the copy runs beside computation.

    Args:
        reader: the steps still to do.
        device: where microbatches go.
        prefetch: microbatches to have ready.
    """

    def __init__(self, reader: SftReader, device: torch.device, *, prefetch: int = 4) -> None:
        self._reader, self._device = reader, device
        self._ready: queue.Queue[PlannedStep | PackedBatch | BaseException | None] = queue.Queue(max(1, prefetch))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sft loader", daemon=True)
        self._thread.start()

    def next_step(self) -> SftBatch:
        """The next step; waits for it where it is not ready."""
        step = self._take()
        if not isinstance(step, PlannedStep):
            raise StopIteration
        packs = []
        for _ in step.microbatches:
            batch = self._take()
            assert isinstance(batch, PackedBatch)
            packs.append(_moved(batch, self._device))
        return assembled(self._reader, step, packs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        while self._thread.is_alive():  # it may wait for room
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _take(self) -> PlannedStep | PackedBatch | None:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            for item in self._items():
                self._ready.put(item)
                if self._closed.is_set():
                    return
            self._ready.put(None)
        except BaseException as error:  # the training loop must hear of it
            self._ready.put(error)

    def _items(self) -> Iterator[PlannedStep | PackedBatch]:
        while (step := self._reader.next_step()) is not None:
            yield step
            for number in range(len(step.microbatches)):
                batch = self._reader.read(step, number)
                yield _pinned(batch) if self._device.type == "cuda" else batch


def assembled(reader: SftReader, step: PlannedStep, packs: list[PackedBatch]) -> SftBatch:
    """A step from its microbatches."""
    rows = step.plan.rows.tolist()
    minibatch = Minibatch(
        packs=packs,
        sequence_ids=[reader.data.row_id(row) for row in rows],
        tokens=int(reader.data.lengths[step.plan.rows].sum()),
    )
    return SftBatch(plan=step.plan, minibatch=minibatch)


def _pinned(batch: PackedBatch) -> PackedBatch:
    return _with_tensors(batch, {name: tensor.pin_memory() for name, tensor in tensors_of(batch).items()})


def _moved(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if device.type == "cpu":
        return batch
    return _with_tensors(batch, {n: t.to(device, non_blocking=True) for n, t in tensors_of(batch).items()})


def tensors_of(batch: PackedBatch) -> dict[str, torch.Tensor]:
    """The tensors of a microbatch by field."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def _with_tensors(batch: PackedBatch, tensors: Mapping[str, Any]) -> PackedBatch:
    return dataclasses.replace(batch, **tensors)
