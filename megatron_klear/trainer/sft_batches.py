"""Which microbatches of an SFT step are this rank's, and their content, read from the index when asked for.

Denominators are those of the whole step and come from the index's token counts, so that a rank reads the tokens of its
own microbatches only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_klear import packing
from megatron_klear.config import Settings
from megatron_klear.data import SftData, StepPlan, Steps
from megatron_klear.packing import attention_share, pack, sequence_multiple
from megatron_klear.records import PackedBatch, ParallelContext
from megatron_klear.trainer.sequences import sft_sequence, sft_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLayout:
    """What a rank's microbatches depend on besides the sequences.

    Attributes:
        token_budget: tokens of a microbatch over its context-parallel group.
        dp_rank, dp_size, cp_rank, cp_size: place in the layout.
        tp_size: tensor parallel size under sequence parallelism, else 1.
        token_multiple: what the tokens of a rank must be a multiple of, see `packing.pack`.
        share: attention's share of the cost, see `packing.attention_share`.
    """

    token_budget: int
    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    tp_size: int = 1
    token_multiple: int = 1
    share: float = 0.0

    @classmethod
    def of(cls, settings: Settings, context: ParallelContext) -> Self:
        """The layout of a run on this rank."""
        return cls(
            token_budget=settings.packing.token_budget,
            dp_rank=context.dp.rank,
            dp_size=context.dp.size,
            cp_rank=context.cp.rank,
            cp_size=context.cp.size,
            tp_size=context.tp.size if settings.parallel.sequence_parallel else 1,
            token_multiple=settings.fp8.multiple,
            share=attention_share(settings.architecture),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A step before its tokens are read.

    Attributes:
        plan: the sequences.
        weights: float64 [N], weight of each target token of each sequence.
        microbatches: those of this rank, as positions in `plan.rows`.
    """

    plan: StepPlan
    weights: np.ndarray
    microbatches: list[list[int]]


class SftReader:
    """Walks over the steps still to do, and reads microbatches. It can be sent to another process.

    Args:
        data: the rows.
        steps: the walk over them, at its place; it is moved on by this object.
        layout: this rank's place.
        num_steps: steps to do.
        normalizer: `sequence` or `token` (sft.normalizer).
    """

    def __init__(
        self, data: SftData, steps: Steps, layout: PackLayout, *, num_steps: int, normalizer: str = "sequence"
    ) -> None:
        self.data = data
        self.layout = layout
        self._steps, self._left, self._normalizer = steps, num_steps, normalizer

    def next_step(self) -> PlannedStep | None:
        """The next step; None when all are done."""
        if self._left == 0:
            return None
        self._left -= 1
        plan = self._steps.next_step()
        weights = sft_weights(self.data.trained[plan.rows], self._normalizer)
        return PlannedStep(plan=plan, weights=weights, microbatches=self._microbatches(plan))

    def read(self, step: PlannedStep, number: int) -> PackedBatch:
        """A microbatch of this rank, in host memory."""
        sequences = []
        for position in step.microbatches[number]:
            row = int(step.plan.rows[position])
            sequences.append(
                sft_sequence(
                    self.data.row_id(row),
                    self.data.tokens(row),
                    self.data.trained_mask(row),
                    float(step.weights[position]),
                )
            )
        layout = self.layout
        return pack(
            sequences,
            cp_rank=layout.cp_rank,
            cp_size=layout.cp_size,
            tp_size=layout.tp_size,
            token_multiple=layout.token_multiple,
        )

    def _microbatches(self, plan: StepPlan) -> list[list[int]]:
        return deal_step(plan, self.data.lengths[plan.rows], self.layout)[self.layout.dp_rank]


def deal_step(plan: StepPlan, lengths: np.ndarray, layout: PackLayout) -> list[list[list[int]]]:
    """Microbatches of every data-parallel rank, as positions in `plan.rows`: [dp][number of microbatches].

    Args:
        plan: the step.
        lengths: tokens of its sequences, int64 [N].
        layout: of any of the ranks.
    """
    return packing.deal_step(
        lengths,
        plan.bins,
        token_budget=layout.token_budget,
        dp_size=layout.dp_size,
        multiple=sequence_multiple(layout.cp_size),
        share=layout.share,
    )
