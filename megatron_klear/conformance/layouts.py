"""The layouts that are compared, and the comparison of one of them inside a group of processes.

Errors are judged against what plain float32 costs: the same computation by transformers in float32, one process, no
packing, differs from float64 by some amount; a layout may differ by `SLACK` times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megatron_klear import parallel
from megatron_klear.config import (
    Architecture,
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.conformance.reference import (
    OBJECTIVE,
    ReferenceResult,
    compute_reference,
    reference_model,
    reference_sequences,
    with_old_logprobs,
)
from megatron_klear.model import build_qwen3, hf_named_tensors, load_hf_weights
from megatron_klear.records import TrainSequence
from megatron_klear.trainer import Trainer, make_trainable

SLACK = 8.0
"""Layouts add and round in other orders than one process does; they may not be worse by more than this factor."""

LENGTHS = (37, 2, 18, 64, 5, 23, 11, 50)
OPTIMIZER = OptimizerSettings(lr=1e-2, weight_decay=0.1, adam_eps=1e-3, clip_grad=0.5, warmup_steps=0)
"""A large epsilon keeps the first Adam step a smooth function of the gradient, so that errors stay comparable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One row of the table; data parallel is what the number of processes leaves.

    Attributes:
        tp, pp, cp: parallel sizes.
        sequence_parallel: split norms over tensor-parallel ranks too.
        kind: `sft` or `rl`.
        tied: tied embeddings.
        token_budget: tokens per microbatch; small budgets make many microbatches.
        recompute: activations recomputed in the backward pass.
        distributed_optimizer: shard optimizer states (then gradients are compared through the updated weights).
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    kind: str = "rl"
    tied: bool = False
    token_budget: int = 128
    recompute: str = "none"
    distributed_optimizer: bool = False

    def label(self, world_size: int) -> str:
        """As in the table: `tp2 pp1 cp1 dp2 sp rl ...`."""
        dp = world_size // (self.tp * self.pp * self.cp)
        flags = [f"tp{self.tp} pp{self.pp} cp{self.cp} dp{dp}", self.kind, f"budget {self.token_budget}"]
        flags += ["sp"] if self.sequence_parallel else []
        flags += ["tied"] if self.tied else []
        flags += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        flags += ["distributed optimizer"] if self.distributed_optimizer else []
        return " ".join(flags)


LAYOUTS: Mapping[int, tuple[Layout, ...]] = {
    1: (
        Layout(kind="sft"),
        Layout(),
        Layout(tied=True, token_budget=512),
        Layout(recompute="full"),
        Layout(recompute="selective", kind="sft"),
        Layout(distributed_optimizer=True),
    ),
    2: (
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True, kind="sft", tied=True),
        Layout(pp=2, tied=True),
        Layout(cp=2),
        Layout(kind="sft", token_budget=64),
        Layout(distributed_optimizer=True, token_budget=64),
    ),
    4: (
        Layout(tp=2, pp=2),
        Layout(tp=2, sequence_parallel=True, cp=2),
        Layout(tp=2, sequence_parallel=True, pp=2, kind="sft", tied=True, recompute="full"),
        Layout(pp=2, cp=2, tied=True, token_budget=64),
        Layout(tp=4, kind="sft"),
        Layout(pp=4),
        Layout(cp=4, kind="sft"),
        Layout(cp=2, token_budget=64, distributed_optimizer=True),
        Layout(tp=2, sequence_parallel=True, distributed_optimizer=True, tied=True),
        Layout(pp=2, distributed_optimizer=True, kind="sft", tied=True),
        Layout(token_budget=64),
    ),
}
"""Layouts by number of processes."""


def architecture(tied: bool) -> Architecture:
    """A small Qwen3 whose sizes divide in every layout; its vocabulary needs padding."""
    return Architecture(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=8,
        vocab_size=83,
        max_position_embeddings=128,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_embeddings=tied,
        init_std=0.02,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Worst relative errors of one layout; an error is in units of what float32 costs (1.0 = as transformers in float32).

    Attributes:
        label: the layout.
        loss, logprobs, grads, updated: error over float32's own error; `grads` is None with a distributed optimizer.
        passed: all within `SLACK`.
    """

    label: str
    loss: float
    logprobs: float
    grads: float | None
    updated: float
    passed: bool


class References:
    """Float64 and float32 references per (kind, tied), computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], tuple[list[TrainSequence], ReferenceResult, ReferenceResult]] = {}

    def get(self, kind: str, tied: bool) -> tuple[list[TrainSequence], ReferenceResult, ReferenceResult]:
        """Sequences, float64 result, float32 result."""
        if (kind, tied) not in self._known:
            arch = architecture(tied)
            sequences = reference_sequences(arch, LENGTHS, kind=kind)
            first = compute_reference(arch, sequences, OPTIMIZER, torch.float64)
            sequences = with_old_logprobs(sequences, first.logprobs)
            exact = compute_reference(arch, sequences, OPTIMIZER, torch.float64)
            plain = compute_reference(arch, sequences, OPTIMIZER, torch.float32)
            self._known[kind, tied] = (sequences, exact, plain)
        return self._known[kind, tied]


def compare_layout(layout: Layout, references: References, *, device: str = "auto") -> Comparison:
    """Run one layout on the processes of this launch; every rank calls it and gets the same answer."""
    sizes = ParallelSettings(
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        distributed_optimizer=layout.distributed_optimizer,
        timeout_seconds=120,
    )
    context = parallel.start(sizes, device=device)
    arch = architecture(layout.tied)
    model_settings = ModelSettings(
        **asdict(arch), dtype="float32", recompute=layout.recompute, layer_spec="local", vocab_multiple=16
    )
    sequences, exact, plain = references.get(layout.kind, layout.tied)
    weights = reference_model(arch).state_dict()
    model = build_qwen3(arch, model_settings, sizes, context)
    load_hf_weights(model, arch, context, weights.__getitem__)
    settings = Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        model=model_settings,
        parallel=sizes,
        packing=PackingSettings(token_budget=layout.token_budget),
    )
    trainer = Trainer(make_trainable(model, OPTIMIZER, sizes, total_updates=10), arch, settings, context)
    logprobs = trainer.token_logprobs(sequences)
    report = trainer.update(sequences, OBJECTIVE, step=1)
    grads = None
    if not layout.distributed_optimizer:
        # The update clipped the gradient in place; undo it to compare what came out of the backward pass.
        unclip = max(report.grad_norm / OPTIMIZER.clip_grad, 1.0)
        found = dict(hf_named_tensors(model, arch, context, of=lambda p: p.main_grad))
        grads = _worst({n: g * unclip for n, g in found.items()}, exact.grads, plain.grads)
    updated = _worst(dict(hf_named_tensors(model, arch, context)), exact.updated, plain.updated)
    loss = _ratio(report.loss, exact.loss, abs(plain.loss - exact.loss), floor=2**-23 * abs(exact.loss))
    worst_logprob = max(
        _ratio_of_arrays(found, wanted, reference)
        for found, wanted, reference in zip(logprobs, exact.logprobs, plain.logprobs, strict=True)
    )
    values = [loss, worst_logprob, updated, *([] if grads is None else [grads])]
    return Comparison(
        label=layout.label(context.world.size),
        loss=loss,
        logprobs=worst_logprob,
        grads=grads,
        updated=updated,
        passed=all(np.isfinite(v) and v <= SLACK for v in values),
    )


def _worst(
    found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor]
) -> float:
    """Worst tensor: norm of its error over the norm of the float32 reference's error."""
    missing = set(exact) - set(found)
    if missing:
        raise AssertionError(f"tensors that the layout did not give: {sorted(missing)}")
    return max(
        _ratio_of_arrays(found[name].cpu().double().numpy(), exact[name].numpy(), plain[name].double().numpy())
        for name in exact
    )


def _ratio_of_arrays(found: Any, exact: np.ndarray, plain: np.ndarray) -> float:
    found = np.asarray(found, dtype=np.float64)
    floor = 2.0**-23 * float(np.linalg.norm(exact)) / 4  # half a unit in the last place, on average over a tensor
    unit = max(float(np.linalg.norm(plain - exact)), floor, 1e-30)
    return float(np.linalg.norm(found - exact)) / unit


def _ratio(found: float, exact: float, error: float, floor: float) -> float:
    return abs(found - exact) / max(error, floor, 1e-30)
