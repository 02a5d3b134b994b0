"""An epoch as a list of steps: so many sequences of a seeded order each, or so many bins of a plan of the whole epoch.

Either way the steps are a function of the data, the seed and the settings, not of the layout: a run that is resumed on
other ranks takes exactly the sequences that are left, and Eq. 8's 1 / N is that of the step's N sequences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from megatron_klear.config import BIN_MULTIPLE, Settings
from megatron_klear.data.cursor import CursorState, DataCursor
from megatron_klear.errors import DataError
from megatron_klear.packing import EpochBins, attention_share, bins_of, plan_bins
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
        """Steps from here until every row was visited exactly `epochs` times since the start."""

    def described(self) -> str:
        """What the steps are, in a few words."""

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
        epochs: after which the run ends (sft.epochs): its last step has the rows that are left of the last epoch, none
            of another one. What would be less than half a step joins the step before. None goes on and on.
    """

    def __init__(self, cursor: DataCursor, epochs: int | None = None) -> None:
        self._cursor, self._epochs = cursor, epochs

    def next_step(self) -> StepPlan:
        """Take the next step's sequences and move on."""
        is_last = self._epochs is not None and self.steps_for_epochs(self._epochs) == 1
        rows, epochs = self._cursor.next_batch_and_epochs(self._rows_left(self._epochs) if is_last else None)
        return StepPlan(rows=rows, epochs=epochs)

    def steps_for_epochs(self, epochs: int | None) -> int:
        """Steps from here until every row was visited exactly `epochs` times since the start."""
        full, rest = divmod(self._rows_left(epochs), self._cursor.batch_rows)
        if not rest:
            return full
        # More rows than there are would hold some of them twice.
        is_joined = (
            full and 2 * rest < self._cursor.batch_rows and self._cursor.batch_rows + rest <= self._cursor.num_rows
        )
        return full if is_joined else full + 1

    def described(self) -> str:
        """What the steps are, in a few words."""
        batch = self._cursor.batch_rows
        text = f"steps of {batch} sequences"
        if self._epochs is None:
            return text
        ahead = self.steps_for_epochs(self._epochs)
        last = self._rows_left(self._epochs) - (ahead - 1) * batch
        return text if ahead == 0 or last == batch else f"{text}, the last one of {last}"

    def _rows_left(self, epochs: int | None) -> int:
        return 0 if epochs is None else max(0, epochs * self._cursor.num_rows - self._cursor.rows_taken)

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

    Epochs are whole: each visits every row once before the next begins. Bins that would be less than half a step join
    the epoch's last step (`EpochBins`). Lengths and plans are never changed, so that copies share them.

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)

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
        """Steps from here to the end of so many epochs; all have equally many bins, as lengths alone decide that."""
        return max(0, (epochs - self._epoch) * self._plan().num_steps - self._step)

    def described(self) -> str:
        """What the steps are, in a few words."""
        plan = self._plan()
        last = plan.num_bins - (plan.num_steps - 1) * plan.bins_per_step
        text = f"an epoch in {plan.num_steps} steps of {plan.bins_per_step} bins"
        return text if last == plan.bins_per_step else f"{text}, the last one of {last}"

    def state_dict(self) -> dict[str, Any]:
        """The place, for a checkpoint."""
        place = {"epoch": self._epoch, "step_in_epoch": self._step, "steps_per_epoch": self._plan().num_steps}
        return {**place, **self._fixed}

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
        # Once, what was left of an epoch was a step of its own, however little: the number of steps told nowhere.
        alone = -(-self._plan().num_bins // state["batch_bins"])
        before, now = state.get("steps_per_epoch", alone), self._plan().num_steps
        if before != now:
            raise DataError(
                f"the run cannot be resumed: its epochs are {before} steps by the version that saved it and {now} by "
                "this one, in which the last step takes the few bins that are left; finish it with that version, or "
                "start in another run.dir"
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


def sft_steps(settings: Settings, lengths: IntArray, fingerprint: str = "") -> Steps:
    """The walk over the rows: steps of `sft.batch_bins` bins, or else of `sft.batch_sequences` sequences.

    Args:
        settings: of the run.
        lengths: tokens of each usable row, int64 [N].
        fingerprint: of the data.

    Raises:
        DataError: fewer rows than a step takes.
    """
    seed, shuffle = settings.run.seed, settings.data.shuffle
    if settings.sft.batch_bins is None:
        cursor = DataCursor(
            len(lengths), settings.sft.batch_sequences, seed=seed, shuffle=shuffle, fingerprint=fingerprint
        )
        return SequenceSteps(cursor, settings.sft.epochs)
    return BinSteps(
        lengths,
        batch_bins=settings.sft.batch_bins,
        token_budget=settings.packing.token_budget,
        multiple=BIN_MULTIPLE,
        share=attention_share(settings.architecture),
        seed=seed,
        shuffle=shuffle,
        fingerprint=fingerprint,
    )
