"""Conversations to fine-tune on, as tokens with the assistant's part marked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_klear.data.chat import ChatTokenizer, ConversationError
from megatron_klear.data.overlap import text_key
from megatron_klear.data.problems import Problems
from megatron_klear.data.rows import read_sft_rows
from megatron_klear.errors import DataError
from megatron_klear.packing import OversizePolicy, fitting_sequences

_ROWS_AT_A_TIME = 512
"""Rows tokenized in one call: enough for the tokenizer's threads, little memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SftExample:
    """One conversation ready for a `TrainSequence`.

    Attributes:
        sequence_id: the row's id.
        token_ids: int32 [L].
        trained_spans: (start, end) of each run of tokens to train on.
        source: where the row says it comes from.
        problem_keys: what each of its user messages is recognised by, see `require_disjoint`.
        where: "file:line".
    """

    sequence_id: str
    token_ids: NDArray[np.int32]
    trained_spans: tuple[tuple[int, int], ...]
    source: str
    problem_keys: tuple[str, ...]
    where: str

    @property
    def trained_mask(self) -> NDArray[np.bool_]:
        """Bool [L], True at tokens to train on; entry 0 is False."""
        mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        for start, end in self.trained_spans:
            mask[start:end] = True
        return mask

    @property
    def trained_tokens(self) -> int:
        """Number of tokens to train on."""
        return sum(end - start for start, end in self.trained_spans)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SftData:
    """All usable conversations in file order.

    Attributes:
        examples: at least one.
        dropped_ids: rows left out for their length.
        fingerprint: of ids and tokens; equal data have equal fingerprints.
    """

    examples: tuple[SftExample, ...]
    dropped_ids: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples)

    def keys(self) -> list[tuple[str, str]]:
        """(sequence_id, text key) of each user message, for `require_disjoint`."""
        return [(e.sequence_id, key) for e in self.examples for key in e.problem_keys]


def load_sft(
    paths: Sequence[str | Path],
    chat: ChatTokenizer,
    *,
    token_budget: int,
    multiple: int = 1,
    oversize: OversizePolicy = "refuse",
    setting: str = "data.sft",
) -> SftData:
    """Read, check and tokenize SFT files.

    Args:
        paths: JSON lines files (data.sft).
        chat: the tokenizer.
        token_budget: longest conversation in tokens (packing.token_budget).
        multiple: conversations are padded to a multiple of this; the padding counts.
        oversize: what happens to longer ones (packing.oversize).
        setting: dotted path of the setting that lists the files.

    Raises:
        DataError: naming file and line of everything that is wrong, or all conversations that are too long.
    """
    rows = read_sft_rows(paths, setting=setting)
    problems = Problems(f"the conversations of {setting}")
    examples: list[SftExample] = []
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        some = rows[start : start + _ROWS_AT_A_TIME]
        for row, encoded in zip(some, chat.encode_conversations([r.messages for r in some]), strict=True):
            if isinstance(encoded, ConversationError):
                problems.add(row.where, str(encoded))
                continue
            final = row.messages[-1]["content"]
            if final.count(chat.think_start) > final.count(chat.think_end):
                problems.add(row.where, f"the last answer opens {chat.think_start} and never closes it")
                continue
            examples.append(
                SftExample(
                    sequence_id=row.row_id,
                    token_ids=encoded.token_ids,
                    trained_spans=encoded.trained_spans,
                    source=row.source,
                    problem_keys=tuple(text_key(m["content"]) for m in row.messages if m["role"] == "user"),
                    where=row.where,
                )
            )
    problems.raise_if_any()
    kept, dropped = fitting_sequences(
        [len(e.token_ids) for e in examples],
        token_budget=token_budget,
        multiple=multiple,
        oversize=oversize,
        names=[f"{e.sequence_id} ({e.where})" for e in examples],
    )
    if not len(kept):
        raise DataError(
            f"{setting}: all {len(examples)} conversations are over packing.token_budget = {token_budget} tokens "
            "and were dropped; raise it"
        )
    usable = tuple(examples[i] for i in kept)
    return SftData(
        examples=usable,
        dropped_ids=tuple(examples[i].sequence_id for i in dropped),
        fingerprint=_fingerprint(usable),
    )


def _fingerprint(examples: Sequence[SftExample]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(f"{example.sequence_id}\0{example.trained_spans}\0".encode())
        digest.update(example.token_ids.tobytes())
    return digest.hexdigest()
