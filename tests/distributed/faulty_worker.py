"""A rank whose training code has a fault in every layout: `faulty_worker.py FAULT,FAULT,... JOB.json`.

The faults are mistakes that distributed trainers really make. Each one is taken out again after its layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from megatron_klear.conformance import compare, worker
from megatron_klear.conformance.matrix import Comparison
from megatron_klear.model import attention, norm, qwen3
from megatron_klear.records import TrainSequence
from megatron_klear.trainer import Trainer, microbatches, optimizer


def _changed_sequences(change: Callable[[TrainSequence], TrainSequence]) -> Any:
    original = Trainer.update

    def update(self: Trainer, sequences: list[TrainSequence], *arguments: Any, **keywords: Any) -> Any:
        return original(self, [change(s) for s in sequences], *arguments, **keywords)

    return mock.patch.object(Trainer, "update", update)


def weights_too_large() -> Any:
    """A denominator that is off by a thousandth."""
    factor = np.float32(1.001)
    return _changed_sequences(
        lambda s: dataclasses.replace(s, policy_weight=s.policy_weight * factor, lm_weight=s.lm_weight * factor)
    )


def old_logprobs_shifted() -> Any:
    """Old logprobs in another frame than the tokens."""
    return _changed_sequences(lambda s: dataclasses.replace(s, old_logprobs=np.roll(s.old_logprobs, 1)))


def divided_by_microbatches() -> Any:
    """The mean over microbatches in the backward pass, with the right loss in the report."""
    original = microbatches._loss_of
    return mock.patch.object(microbatches, "_loss_of", lambda r: (original(r)[0] / 2, *original(r)[1:]))


def averaged_over_ranks() -> Any:
    """Megatron's default scaling of gradients by the number of data-parallel ranks."""
    original = qwen3.transformer_config

    def config(*arguments: Any, **named: Any) -> Any:
        made = original(*arguments, **named)
        made.calculate_per_token_loss = False
        return made

    return mock.patch.object(qwen3, "transformer_config", config)


def temperature_forgotten() -> Any:
    """Logprobs of the update at temperature 1, whatever the rollouts had."""
    original = Trainer.update
    return mock.patch.object(Trainer, "update", lambda self, *a, temperature, **k: original(self, *a, **k))


def norms_not_summed() -> Any:
    """Norm weights under sequence parallelism keep the gradient of their own tokens."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        original = norm.RMSNorm.__init__

        def unmarked(self: Any, *arguments: Any, **keywords: Any) -> None:
            original(self, *arguments, **keywords)
            self.weight.sequence_parallel = False

        with mock.patch.object(norm.RMSNorm, "__init__", unmarked):
            yield

    return patched()


def keys_of_others_without_gradient() -> Any:
    """Context parallelism whose gathered keys and values carry no gradient back to other ranks."""

    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None

    return mock.patch.object(attention._GatherTokens, "backward", staticmethod(backward))


def tied_embedding_not_summed() -> Any:
    """Tied embeddings on two pipeline stages, each with its own gradient."""
    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]  # the package names a function so
    return mock.patch.object(finalize, "_allreduce_word_embedding_grads", return_value=None)


def weights_left_on_other_ranks() -> Any:
    """Updated weights read before they were gathered."""
    return mock.patch.object(qwen3.Qwen3Model, "settle", return_value=None)


def decay_on_norms() -> Any:
    """Weight decay on every parameter."""
    original = optimizer.get_megatron_optimizer

    def build(*arguments: Any, **keywords: Any) -> Any:
        built = original(*arguments, **keywords)
        for group in built.param_groups:
            group["wd_mult"] = 1.0
        return built

    return mock.patch.object(optimizer, "get_megatron_optimizer", build)


def clipping_forgotten() -> Any:
    """Gradients that are not clipped before the update."""
    original = optimizer.OptimizerConfig
    return mock.patch.object(optimizer, "OptimizerConfig", lambda **keywords: original(**keywords | {"clip_grad": 0.0}))


def run(faults: list[str], job: Path) -> None:
    """Compare layout i of the job with fault i in place."""
    remaining = iter(faults)

    def with_fault(*arguments: Any, **keywords: Any) -> Comparison:
        with globals()[next(remaining)]():
            return compare.compare_layout(*arguments, **keywords)

    worker.main(job, with_fault)


if __name__ == "__main__":
    run(sys.argv[1].split(","), Path(sys.argv[2]))
