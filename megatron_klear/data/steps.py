"""An epoch as a list of steps: so many sequences of a seeded order each, or so many bins of a plan of the whole epoch.

Either way the steps are a function of the data, the seed and the settings, not of the layout: a run that is resumed on
other ranks takes exactly the sequences that are left, and Eq. 8's 1 / N is that of the step's N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_klear.data.cursor import CursorState, DataCursor
from megatron_klear.errors import DataError
from megatron_klear.packing import EpochBins, bins_of, plan_bins
from megatron_klear.records import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The sequences of one step.

    Attributes:
        rows: int64 [N], row numbers.
        epochs: int64 [N], the epoch that each is taken from.
        bins: the full bins they lie in, by position in `rows`; None where the step is packed by itself.
    """

    rows: IntArray
    epochs: IntArray
    bins: list[list[int]] | None = None


class Steps(Protocol):
    """The walk over the data, step by step; it can be copied, sent to another process, and stored."""

    def next_step(self) -> StepPlan:
        """Take the next step's sequences and move on."""

    def steps_for_epochs(self, epochs: int) -> int:
        """Steps that visit every row at least `epochs` times."""

    def state_dict(self) -> Any:
        """The place, for a checkpoint; plain JSON types."""

    def load_state(self, state: Any) -> None:
        """Go on from a place.

        Raises:
            DataError: the place is of other data, or of another order.
        """


class SequenceSteps:
    """Steps of a fixed number of sequences, the last ones of an epoch together with the first of the next.

    Args:
        cursor: the walk over the rows.
    """

    def __init__(self, cursor: DataCursor) -> None:
        self._cursor = cursor

    def next_step(self) -> StepPlan:
        """Take the next step's sequences and move on."""
        rows, epochs = self._cursor.next_batch_and_epochs()
        return StepPlan(rows=rows, epochs=epochs)

    def steps_for_epochs(self, epochs: int) -> int:
        """Steps that visit every row at least `epochs` times."""
        return self._cursor.steps_for_epochs(epochs)

    def state_dict(self) -> CursorState:
        """The place, for a checkpoint."""
        return self._cursor.state_dict()

    def load_state(self, state: Any) -> None:
        """Go on from a place; see `DataCursor.load_state`."""
        if "batch_bins" in state:
            raise DataError(
                f"the run cannot be resumed: sft.batch_bins was {state['batch_bins']} and is null; set it back, or "
                "start in another run.dir"
            )
        self._cursor.load_state(state)


class BinSteps:
    """Steps of full bins; the last step of an epoch has what is left, and is packed by itself.

    Args:
        lengths: tokens of each row, int64 [N].
        batch_bins: bins of a step (sft.batch_bins).
        token_budget: tokens of a bin (packing.token_budget).
        multiple: each sequence is padded to a multiple of this.
        share: attention's share of the cost, see `packing.attention_share`.
        seed: of the plans (run.seed).
        shuffle: False makes no random choice (data.shuffle).
        fingerprint: of the data.
    """

    def __init__(
        self,
        lengths: IntArray,
        *,
        batch_bins: int,
        token_budget: int,
        multiple: int,
        share: float,
        seed: int,
        shuffle: bool = True,
        fingerprint: str = "",
    ) -> None:
        self._lengths, self._share, self._multiple = lengths, share, multiple
        self._fixed = {
            "num_rows": len(lengths),
            "fingerprint": fingerprint,
            "seed": seed,
            "shuffle": shuffle,
            "batch_bins": batch_bins,
            "token_budget": token_budget,
        }
        self._epoch = self._step = 0
        self._planned: tuple[int, EpochBins] | None = None

    def next_step(self) -> StepPlan:
        """Take the next step's sequences and move on."""
        plan = self._plan()
        if self._step == plan.num_steps:
            self._epoch, self._step = self._epoch + 1, 0
            plan = self._plan()
        bins = plan.step(self._step)
        self._step += 1
        rows = np.concatenate(bins)
        is_last = self._step == plan.num_steps
        epochs = np.full(len(rows), self._epoch, dtype=np.int64)
        return StepPlan(rows=rows, epochs=epochs, bins=None if is_last else bins_of(bins))

    def steps_for_epochs(self, epochs: int) -> int:
        """Steps that visit every row `epochs` times; every epoch has as many bins, as lengths alone decide that."""
        return epochs * self._plan().num_steps

    def state_dict(self) -> dict[str, Any]:
        """The place, for a checkpoint."""
        return {"epoch": self._epoch, "step_in_epoch": self._step, **self._fixed}

    def load_state(self, state: Any) -> None:
        """Go on from a place.

        Raises:
            DataError: the place is of other data, or of another plan.
        """
        if "batch_bins" not in state:
            raise DataError(
                f"the run cannot be resumed: sft.batch_bins was null and is {self._fixed['batch_bins']}; set it back, "
                "or start in another run.dir"
            )
        settings = {
            "num_rows": "the number of usable rows of data.sft",
            "fingerprint": "the content of data.sft",
            "seed": "run.seed",
            "shuffle": "data.shuffle",
            "batch_bins": "sft.batch_bins",
            "token_budget": "packing.token_budget",
        }
        changed = [
            f"{name} was {state.get(key)} and is {self._fixed[key]}"
            for key, name in settings.items()
            if state.get(key) != self._fixed[key]
        ]
        if changed:
            raise DataError(
                f"the run cannot be resumed on this plan of bins: {'; '.join(changed)}. "
                "Put them back, or start in another run.dir."
            )
        self._epoch, self._step = state["epoch"], state["step_in_epoch"]

    def _plan(self) -> EpochBins:
        if self._planned is None or self._planned[0] != self._epoch:
            fixed: dict[str, Any] = self._fixed
            plan = plan_bins(
                self._lengths,
                token_budget=fixed["token_budget"],
                bins_per_step=fixed["batch_bins"],
                multiple=self._multiple,
                share=self._share,
                seeds=(fixed["seed"], self._epoch) if fixed["shuffle"] else None,
            )
            self._planned = self._epoch, plan
        return self._planned[1]
