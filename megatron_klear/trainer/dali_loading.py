"""Packed microbatches through NVIDIA DALI: processes read and pack, DALI copies to the device through pinned memory.

DALI runs without a GPU, too: the microbatches then stay in host memory. In DALI's terms a microbatch is a sample, and
an iteration has one: steps differ in their number of microbatches, of which a batch size would cut off the last ones.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

from megatron_klear.parallel import end_with_parent
from megatron_klear.records import PackedBatch
from megatron_klear.trainer.loading import SftBatch, assembled
from megatron_klear.trainer.sft_batches import PlannedStep, SftReader

_SENT = ("token_ids", "labels", "position_ids", "lm_weight", "cu_seqlens", "cu_seqlens_padded")
"""Tensors that an SFT microbatch consists of; those of the policy loss are 0 and made at the receiver."""

_TYPES = (types.INT64, types.INT64, types.INT64, types.FLOAT, types.INT32, types.INT32, types.INT32)


class DaliLoader:
    """Gives the steps one by one; a context manager.

    Args:
        reader: the steps still to do; the processes get copies of it.
        device: where microbatches go.
        processes: that read and pack.
        prefetch: microbatches to have ready.
    """

    def __init__(self, reader: SftReader, device: torch.device, *, processes: int = 2, prefetch: int = 4) -> None:
        self._reader, self._device = reader, device
        on_gpu = device.type == "cuda"
        self._pipe = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=prefetch,
            py_num_workers=processes,
            py_start_method="spawn",
            exec_dynamic=True,
        )
        with self._pipe:
            *tensors, longest = fn.external_source(
                source=MicrobatchSource(reader),
                num_outputs=len(_TYPES),
                batch=False,
                parallel=True,
                prefetch_queue_depth=prefetch,
                dtype=list(_TYPES),
                ndim=1,
            )
            # The longest sequence is asked for on the host: reading it from the GPU would wait for the GPU.
            self._pipe.set_outputs(*(tensor.gpu() if on_gpu else tensor for tensor in tensors), longest)
        self._pipe.start_py_workers()
        self._pipe.build()

    def next_step(self) -> SftBatch:
        """The next step; waits for it where it is not ready."""
        step = self._reader.next_step()
        if step is None:
            raise StopIteration
        packs = [self._microbatch(step, number) for number in range(len(step.microbatches))]
        return assembled(self._reader, step, packs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._pipe  # its processes end with it

    def _microbatch(self, step: PlannedStep, number: int) -> PackedBatch:
        *outputs, longest = self._pipe.run()
        tensors = {name: self._own(output) for name, output in zip(_SENT, outputs, strict=True)}
        # A tensor each, as in `pack`: nobody can write to one through another.
        names = ("policy_weight", "advantages", "old_logprobs", "rollout_logprobs")
        zeros = {name: torch.zeros_like(tensors["lm_weight"]) for name in names}
        rows = step.plan.rows[step.microbatches[number]].tolist()
        return PackedBatch(
            **tensors,
            **zeros,
            max_seqlen=int(longest.at(0)[0]),
            sequence_ids=tuple(self._reader.data.row_id(row) for row in rows),
        )

    def _own(self, output: Any) -> torch.Tensor:
        """Our copy of an output; DALI uses its memory again in a later run."""
        found = output[0]
        tensor = torch.empty(tuple(found.shape()), dtype=to_torch_type[found.dtype], device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        feed_ndarray(found, tensor, cuda_stream=stream)
        return tensor


class MicrobatchSource:
    """What a DALI process calls for the n-th microbatch of this rank; numbers come in ascending order.

    Args:
        reader: the steps still to do.
    """

    def __init__(self, reader: SftReader) -> None:
        self._reader = reader
        self._step: PlannedStep | None = None
        self._is_watched = False
        self._first = 0  # number of the step's first microbatch

    def __call__(self, sample: Any) -> tuple[np.ndarray, ...]:
        """Read the microbatch.

        Raises:
            StopIteration: there are no more.
        """
        if not self._is_watched:
            end_with_parent()
            self._is_watched = True
        number = sample.idx_in_epoch
        while self._step is None or number >= self._first + len(self._step.microbatches):
            self._first += 0 if self._step is None else len(self._step.microbatches)
            self._step = self._reader.next_step()
            if self._step is None:
                raise StopIteration
        batch = self._reader.read(self._step, number - self._first)
        arrays = [getattr(batch, name).numpy() for name in _SENT]
        return (*arrays, np.array([batch.max_seqlen], dtype=np.int32))
