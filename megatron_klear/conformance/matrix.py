"""The layouts that are compared with one process in float64, and what a comparison says of one of them.

Imports neither torch nor Megatron: the process that starts the ranks and prints the table needs this alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SLACK = 8.0
"""Layouts add and round in other orders than one process does; they may not be worse by more than this factor."""

LENGTHS = (37, 2, 18, 64, 5, 23, 11, 50)
"""Tokens of the sequences: ragged, with the shortest there is, none a multiple of anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One row of the table; data parallel is what the number of processes leaves.

    Attributes:
        tp, pp, cp: parallel sizes.
        sequence_parallel: split norms over tensor-parallel ranks too.
        kind: `sft` (language-model weights) or `rl` (policy and language-model weights, Eq. 14).
        objective: policy loss of `rl`.
        temperature: sampling temperature that logprobs are defined under.
        tied: tied embeddings.
        lengths: tokens of each sequence; fewer sequences than data-parallel ranks leave ranks with empty microbatches.
        token_budget: tokens per microbatch; small budgets make many microbatches.
        recompute: activations recomputed in the backward pass.
        distributed_optimizer: shard optimizer states over data-parallel ranks.
        overlap: reduce gradients during the backward pass and, with the distributed optimizer, gather weights during
            the forward pass.
        updates: optimizer updates; what is compared is the last one and what it leaves behind.
        dtype: of weights and activations; the unit of its errors is what transformers loses in that type.
        layer_spec: `local`, or `te` where Transformer Engine is installed.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    kind: Literal["sft", "rl"] = "rl"
    objective: Literal["gppo", "clip", "cispo"] = "gppo"
    temperature: float = 1.0
    tied: bool = False
    lengths: tuple[int, ...] = LENGTHS
    token_budget: int = 128
    recompute: Literal["none", "selective", "full"] = "none"
    distributed_optimizer: bool = False
    overlap: bool = False
    updates: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    layer_spec: Literal["local", "te"] = "local"

    def dp(self, processes: int) -> int:
        """Data-parallel size among so many processes."""
        return processes // (self.tp * self.pp * self.cp)

    def label(self, processes: int) -> str:
        """As in the table: `tp2 pp1 cp1 dp2 sp rl gppo ...`."""
        words = [f"tp{self.tp} pp{self.pp} cp{self.cp} dp{self.dp(processes)}"]
        words += ["sp"] if self.sequence_parallel else []
        words += [self.kind if self.kind == "sft" else f"rl {self.objective}"]
        words += [f"budget {self.token_budget}"]
        words += [f"{len(self.lengths)} sequence{'s' * (len(self.lengths) > 1)}"] if self.lengths != LENGTHS else []
        words += [f"temperature {self.temperature:g}"] if self.temperature != 1.0 else []
        words += ["tied"] if self.tied else []
        words += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        words += ["distributed optimizer"] if self.distributed_optimizer else []
        words += ["overlap"] if self.overlap else []
        words += [f"{self.updates} updates"] if self.updates > 1 else []
        words += ["bf16"] if self.dtype == "bfloat16" else []
        words += ["transformer engine"] if self.layer_spec == "te" else []
        return " ".join(words)


LAYOUTS: Mapping[int, tuple[Layout, ...]] = {
    1: (
        Layout(kind="sft"),
        Layout(),
        Layout(objective="clip"),
        Layout(objective="cispo", temperature=0.7),
        Layout(tied=True, token_budget=512),
        Layout(recompute="full"),
        Layout(recompute="selective", kind="sft"),
        Layout(distributed_optimizer=True, updates=3),
        Layout(dtype="bfloat16"),
        Layout(dtype="bfloat16", kind="sft", tied=True, distributed_optimizer=True),
    ),
    2: (
        Layout(tp=2),
        Layout(tp=2, objective="cispo", temperature=0.7, tied=True),
        Layout(tp=2, sequence_parallel=True, kind="sft", tied=True),
        Layout(tp=2, sequence_parallel=True, dtype="bfloat16"),
        Layout(pp=2, tied=True),
        Layout(pp=2, kind="sft", token_budget=64, recompute="full"),
        Layout(cp=2),
        Layout(cp=2, kind="sft", tied=True, recompute="full"),
        Layout(kind="sft", token_budget=64),
        Layout(lengths=(37,)),
        Layout(distributed_optimizer=True, token_budget=64),
        Layout(distributed_optimizer=True, token_budget=64, overlap=True, updates=2),
        Layout(cp=2, distributed_optimizer=True, kind="sft"),
    ),
    4: (
        Layout(tp=2, pp=2),
        Layout(tp=2, sequence_parallel=True, cp=2),
        Layout(tp=2, cp=2, kind="sft", tied=True),
        Layout(tp=2, sequence_parallel=True, pp=2, kind="sft", tied=True, recompute="full"),
        Layout(pp=2, cp=2, tied=True, token_budget=64),
        Layout(pp=2, cp=2, kind="sft", recompute="selective"),
        Layout(tp=4, kind="sft"),
        Layout(tp=4, sequence_parallel=True, objective="clip"),
        Layout(pp=4),
        Layout(pp=4, tied=True, kind="sft", lengths=(37,)),
        Layout(cp=4, kind="sft"),
        Layout(cp=4, tied=True, recompute="selective"),
        Layout(cp=2, token_budget=64, distributed_optimizer=True),
        Layout(cp=2, kind="sft", tied=True, token_budget=64),
        Layout(tp=2, kind="sft", token_budget=64, distributed_optimizer=True),
        Layout(tp=2, sequence_parallel=True, distributed_optimizer=True, tied=True),
        Layout(tp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, updates=2, dtype="bfloat16"),
        Layout(pp=2, distributed_optimizer=True, kind="sft", tied=True),
        Layout(pp=2, token_budget=64, overlap=True, updates=2),
        Layout(token_budget=64),
        Layout(lengths=(50, 11, 23), distributed_optimizer=True),
    ),
}
"""Layouts by number of processes."""


def _engine(**sizes: Any) -> Layout:
    return Layout(dtype="bfloat16", layer_spec="te", **sizes)


GPU_ONLY_LAYOUTS: Mapping[int, tuple[Layout, ...]] = {
    1: (_engine(), _engine(kind="sft")),
    2: (
        _engine(tp=2, sequence_parallel=True),
        _engine(pp=2, tied=True),
        _engine(cp=2),
        _engine(cp=2, kind="sft", recompute="full"),
    ),
    4: (
        _engine(tp=2, sequence_parallel=True, cp=2),
        _engine(pp=2, cp=2, kind="sft", tied=True),
        _engine(tp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, updates=2),
    ),
}
"""Further layouts by number of processes, for GPUs with Transformer Engine, whose packed attention knows no float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Worst errors of one layout, in units of the error that transformers makes in the same data type.

    Attributes:
        label: the layout.
        processes: ranks that computed it.
        device: `cpu` or `cuda`.
        loss: of the training loss.
        logprobs: of every token's logprob, before and after the update; the worst sequence.
        grads: of the gradients as the backward pass left them; the worst tensor.
        grad_norm: of the global norm that clipping uses.
        updated: of the weights after one AdamW update; the worst tensor.
        seconds: wall-clock time.
    """

    label: str
    processes: int
    device: str
    loss: float
    logprobs: float
    grads: float
    grad_norm: float
    updated: float
    seconds: float

    @property
    def errors(self) -> dict[str, float]:
        """The errors by name."""
        return {name: getattr(self, name) for name in ERROR_NAMES}

    @property
    def passed(self) -> bool:
        """Whether every error is at most `SLACK`; NaN is not."""
        return all(error <= SLACK for error in self.errors.values())


ERROR_NAMES = ("loss", "logprobs", "grads", "grad_norm", "updated")
"""Fields of a `Comparison` that are errors."""
