"""Conversations to fine-tune on, as the run sees them: what its index holds and its packs have room for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from megatron_klear.data.index import SftIndex
from megatron_klear.data.problems import SHOWN_PROBLEMS
from megatron_klear.errors import DataError
from megatron_klear.packing import OversizePolicy, fitting_sequences, require_some
from megatron_klear.records import IntArray

_SHOWN_SOURCES = 5
_FEW_REJECTS, _SHOWN_REJECTS = 0.01, 5


class SftData:
    """Usable conversations of an index in its order; row numbers count these. It can be sent to another process.

    Args:
        index: all conversations.
        token_budget: longest conversation in tokens (packing.token_budget).
        multiple: conversations are padded to a multiple of this; the padding counts.
        oversize: what happens to longer ones (packing.oversize).
        max_positions: positions that the model has; a longer conversation is refused.
        max_reject_share: largest share of rows that may have been rejected (data.max_reject_share).

    Attributes:
        index: all conversations.
        numbers: int64 [N], place in the index of each usable one.
        dropped: int64, places in the index of those left out for their length.
        lengths, trained: int64 [N], tokens and trained tokens of each usable one.
        fingerprint: of ids, tokens and masks; equal data have equal fingerprints.

    Raises:
        DataError: too many rows were rejected, there are none, or all conversations that are too long, by name.
    """

    def __init__(
        self,
        index: SftIndex,
        *,
        token_budget: int,
        multiple: int = 1,
        oversize: OversizePolicy = "refuse",
        max_positions: int | None = None,
        max_reject_share: float = 1.0,
    ) -> None:
        self.index = index
        _require_few_rejects(index, max_reject_share)
        self.numbers, self.dropped = fitting_sequences(
            index.lengths, token_budget=token_budget, multiple=multiple, oversize=oversize, names=_Names(index)
        )
        require_some(self.numbers, index.lengths, token_budget=token_budget, multiple=multiple)
        self.lengths: IntArray = index.lengths[self.numbers]
        self.trained: IntArray = index.trained[self.numbers]
        self.fingerprint = index.fingerprint
        if len(self.dropped):
            self.fingerprint = hashlib.blake2b(
                index.fingerprint.encode() + self.numbers.tobytes(), digest_size=16
            ).hexdigest()
        if max_positions is not None:
            self._require_positions(max_positions)

    def __len__(self) -> int:
        return len(self.numbers)

    def row_id(self, row: int) -> str:
        """The id that a row has in its file."""
        return self.index.row_id(int(self.numbers[row]))

    def tokens(self, row: int) -> IntArray:
        """Token ids of a row, int64 [L]."""
        return self.index.tokens(int(self.numbers[row])).astype(np.int64)

    def trained_mask(self, row: int) -> np.ndarray:
        """Bool [L], True at tokens to train on."""
        return self.index.trained_mask(int(self.numbers[row]))

    def keys(self) -> Iterator[tuple[str, str]]:
        """(id, text key) of each user message of the index, for `require_disjoint`."""
        return self.index.keys()

    def described(self) -> str:
        """What there is, in a few words."""
        texts = [f"{len(self)} conversations", f"{int(self.lengths.sum())} tokens"]
        texts.append(f"{len(self.dropped)} dropped for their length")
        if self.index.rejected:
            texts.append(f"{self.index.rejected} rows rejected, see {self.index.rejects_file}")
        return ", ".join(texts)

    def many_rejects_described(self) -> list[str]:
        """Lines that warn of rejected rows, the first of them by file, line and reason; none when they are few."""
        rows = len(self.index) + self.index.rejected
        if self.index.rejected <= _FEW_REJECTS * rows:
            return []
        return [
            *_rejects_described(self.index, _SHOWN_REJECTS),
            "Training goes on without them; data.max_reject_share refuses a run that loses more than it says.",
        ]

    def sources_described(self) -> list[str]:
        """A line for each of the sources with most tokens, and one for all others."""
        found = self.index.by_source(self.numbers)
        total = int(self.lengths.sum())
        shown = found if len(found) <= _SHOWN_SOURCES + 1 else found[:_SHOWN_SOURCES]
        lines = [
            f"source {name or '(none)'}: {tokens} tokens ({tokens / total:.1%}), {count} conversations"
            for name, tokens, count in shown
        ]
        if rest := found[len(shown) :]:
            tokens, count = sum(row[1] for row in rest), sum(row[2] for row in rest)
            lines.append(f"{len(rest)} other sources: {tokens} tokens ({tokens / total:.1%}), {count} conversations")
        return lines

    def dropped_rows(self) -> Iterator[dict[str, object]]:
        """File, line, id and reason of each conversation that was left out for its length."""
        for number in self.dropped.tolist():
            file, _, line = self.index.where(number).rpartition(":")
            reason = f"{self.index.lengths[number]} tokens do not fit into packing.token_budget"
            yield {"file": file, "line": int(line), "id": self.index.row_id(number), "reason": reason}

    def _require_positions(self, limit: int) -> None:
        long = np.flatnonzero(self.lengths > limit).tolist()
        if long:
            named = ", ".join(f"{self.row_id(row)} ({self.lengths[row]})" for row in long[:8])
            raise DataError(
                f"data.sft: {len(long)} conversations are longer than model.max_position_embeddings = {limit}: "
                f"{named}; to leave them out, set packing.token_budget={limit} packing.oversize=drop"
            )


class _Names:
    """Names of conversations for messages, looked up only when they are needed."""

    def __init__(self, index: SftIndex) -> None:
        self._index = index

    def __getitem__(self, number: int, /) -> str:
        return f"{self._index.row_id(number)} ({self._index.where(number)})"


def _require_few_rejects(index: SftIndex, allowed: float) -> None:
    rows = len(index) + index.rejected
    if not rows:
        raise DataError(f"data.sft: no rows at all in {', '.join(index.file_names)}; list a file with rows")
    if index.rejected / rows <= allowed and len(index):
        return
    advice = f"Mend them, or leave them out: data.max_reject_share is {allowed:g}." if len(index) else "None is left."
    raise DataError("\n".join([*_rejects_described(index, SHOWN_PROBLEMS), advice]))


def _rejects_described(index: SftIndex, shown: int) -> list[str]:
    rows = len(index) + index.rejected
    lines = [f"data.sft: {index.rejected} of {rows} rows cannot be used ({index.rejected / rows:.1%}):"]
    lines += [f"  - {file}:{line}: {reason}" for file, line, reason in index.rejects(shown)]
    if index.rejected > shown:
        lines.append(f"  ... and {index.rejected - shown} more, all in {index.rejects_file}")
    return lines
