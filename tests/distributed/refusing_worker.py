"""A rank that gets minibatches with infinite and overflowing weights before the comparison: `refusing_worker.py JOB`.

Ends with an assertion unless every rank refuses it in the same words and keeps its weights; the comparison that
follows then shows whether the update left anything else behind.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.conformance import compare, worker
from megatron_klear.conformance.matrix import Comparison, Layout
from megatron_klear.errors import TrainingError
from megatron_klear.model import hf_named_tensors
from megatron_klear.trainer import Trainer

BAD = 3
"""The longest sequence, so that under a small budget it is alone in its microbatch."""


def _weights(trainer: Trainer) -> list[torch.Tensor]:
    stream = hf_named_tensors(trainer.trainable.model, trainer.arch, trainer.context)
    return [tensor.clone() for _, tensor in stream]


def _refusal(trainer: Trainer, sequences: list[Any], layout: Layout) -> str:
    try:
        trainer.update(sequences, compare.objective_of(layout), step=9, temperature=layout.temperature)
    except TrainingError as error:
        return str(error)
    raise AssertionError("an update was made")


def refuse_then_compare(
    layout: Layout, references: compare.References, *, device: str, timeout_seconds: float
) -> Comparison:
    """Both refusals in one layout, then its comparison."""
    began = time.monotonic()
    sizes = compare.parallel_settings(layout, timeout_seconds)
    context = parallel.start(sizes, device=device)
    reference = references.get(layout)
    trainer = compare.layout_trainer(layout, sizes, context, reference.weights)
    before = _weights(trainer)
    good = reference.sequences
    last = np.arange(len(good[BAD].token_ids)) == len(good[BAD].token_ids) - 1
    infinite = [
        *good[:BAD],
        replace(good[BAD], lm_weight=np.where(last, np.inf, 0).astype(np.float32)),
        *good[BAD + 1 :],
    ]
    huge = [replace(s, lm_weight=s.lm_weight * np.float32(1e32)) for s in good]
    messages = [_refusal(trainer, infinite, layout), _refusal(trainer, huge, layout)]
    everyone: list[Any] = [None] * context.world.size
    dist.all_gather_object(everyone, messages)
    assert all(told == messages for told in everyone), everyone
    assert messages[0].startswith("step 9: the loss is not finite in microbatches with "), messages[0]
    named = messages[0].removeprefix("step 9: the loss is not finite in microbatches with ").split(";")[0].split(", ")
    assert f"s{BAD}" in named, messages[0]
    assert len(named) < len(good), "every sequence is as suspect as the next"
    assert messages[1].startswith("step 9: the gradient is not finite (norm inf) in the minibatch of s0, s1, "), (
        messages[1]
    )
    assert all(torch.equal(a, b) for a, b in zip(_weights(trainer), before, strict=True))
    comparison = compare._compare(layout, trainer, reference, began)
    del trainer, context
    parallel.reset_layout()
    return comparison


if __name__ == "__main__":
    worker.main(Path(sys.argv[1]), refuse_then_compare)
