"""The place in an endless, shuffled walk over a data set; small enough to be in every checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypedDict

import numpy as np

from megatron_klear.errors import DataError
from megatron_klear.packing import seeded_order
from megatron_klear.records import IntArray


class CursorState(TypedDict):
    """What a checkpoint holds; plain JSON types."""

    epoch: int
    position: int
    deferred: list[int]
    num_rows: int
    seed: int
    shuffle: bool
    fingerprint: str


class DataCursor:
    """Yields batches of row numbers, epoch after epoch, each epoch in an order of its own.

    The order is a function of seed and epoch alone: it depends neither on the layout nor on batch sizes before, and
    stays the same over versions of numpy. A batch that crosses into the next epoch holds no row twice: a row of the
    new epoch that is already in the batch comes first in the next one. So every epoch visits every row exactly once.

    Args:
        num_rows: rows of the data set.
        batch_rows: rows per batch, at most `num_rows`.
        seed: of the orders (run.seed).
        shuffle: False visits the rows in file order (data.shuffle).
        fingerprint: of the data set's content; a checkpoint of other data is refused.
        setting: dotted path of the setting that lists the files, for messages.
        batch_setting: dotted path of the setting that gives the batch size.

    Attributes:
        num_rows, batch_rows: as given.
        epoch: the epoch that the next row is taken from (a full epoch is left only when the next is needed).
        position: rows taken or deferred from this epoch's order.

    Raises:
        DataError: fewer rows than a batch holds.
    """

    def __init__(
        self,
        num_rows: int,
        batch_rows: int,
        *,
        seed: int,
        shuffle: bool = True,
        fingerprint: str = "",
        setting: str = "data.sft",
        batch_setting: str = "sft.batch_sequences",
    ) -> None:
        if batch_rows < 1:
            raise DataError(f"{batch_setting} is {batch_rows}, must be at least 1")
        if num_rows < batch_rows:
            raise DataError(
                f"{setting} holds {num_rows} usable rows, fewer than the {batch_rows} of a batch; "
                f"add data or set {batch_setting} to at most {num_rows}"
            )
        self.epoch = 0
        self.position = 0
        self._deferred: list[int] = []
        self.num_rows = num_rows
        self.batch_rows = batch_rows
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = fingerprint
        self._setting = setting
        self._order = self._order_of(0)

    @property
    def rows_taken(self) -> int:
        """Rows given out since the start."""
        return self.epoch * self.num_rows + self.position - len(self._deferred)

    @property
    def epochs_done(self) -> float:
        """Passes over the data so far, fractions included."""
        return self.rows_taken / self.num_rows

    def next_batch(self) -> IntArray:
        """Take the next batch and move on.

        Returns:
            int64 [batch_rows], row numbers, all different.
        """
        return self.next_batch_and_epochs()[0]

    def next_batch_and_epochs(self, count: int | None = None) -> tuple[IntArray, IntArray]:
        """Take the next batch and move on; also say of which epoch each row is, int64 [batch_rows].

        Args:
            count: rows to take, at most `num_rows`, if not `batch_rows`.
        """
        count = self.batch_rows if count is None else count
        batch = self._deferred[:count]
        epochs = [self.epoch] * len(batch)
        self._deferred = self._deferred[count:]
        in_batch = set(batch)
        while len(batch) < count:
            if self.position == self.num_rows:
                self.epoch += 1
                self.position = 0
                self._order = self._order_of(self.epoch)
            row = int(self._order[self.position])
            self.position += 1
            if row in in_batch:
                self._deferred.append(row)
            else:
                batch.append(row)
                epochs.append(self.epoch)
            in_batch.add(row)
        return np.array(batch, dtype=np.int64), np.array(epochs, dtype=np.int64)

    def still_to_come(self, places: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of some (epoch, row) that have not been given out yet."""
        given = set(self._order[: self.position].tolist()) - set(self._deferred)
        later = {(epoch, row) for epoch, row in places if epoch > self.epoch}
        return later | {(epoch, row) for epoch, row in places if epoch == self.epoch and row not in given}

    def state_dict(self) -> CursorState:
        """The place, for a checkpoint."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "deferred": list(self._deferred),
            "num_rows": self.num_rows,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self._fingerprint,
        }

    def load_state(self, state: CursorState) -> None:
        """Go on from a place; the batch size may be another than it was.

        Raises:
            DataError: the place is of other data, or of another order.
        """
        mine = self.state_dict()
        changed = []
        if state["num_rows"] != mine["num_rows"]:
            changed.append(f"{self._setting} held {state['num_rows']} usable rows and holds {mine['num_rows']}")
        elif state["fingerprint"] != mine["fingerprint"]:
            changed.append(f"the rows of {self._setting} are not the same")
        if state["seed"] != mine["seed"]:
            changed.append(f"run.seed was {state['seed']} and is {mine['seed']}")
        if state["shuffle"] != mine["shuffle"]:
            changed.append(f"data.shuffle was {str(state['shuffle']).lower()} and is {str(mine['shuffle']).lower()}")
        if changed:
            raise DataError(
                f"the run cannot be resumed on these data: {'; '.join(changed)}. "
                "Put them back, or start in another run.dir."
            )
        self.epoch = state["epoch"]
        self.position = state["position"]
        self._deferred = list(state["deferred"])
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> IntArray:
        if not self._shuffle:
            return np.arange(self.num_rows, dtype=np.int64)
        return seeded_order(self.num_rows, self._seed, epoch)
