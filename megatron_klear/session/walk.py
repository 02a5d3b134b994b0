"""The walk over the data, and how far the ledger says that it has come."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_klear.data import DataCursor, PromptData
from megatron_klear.records import Prompt


def next_prompts(cursor: DataCursor, prompts: PromptData) -> list[tuple[int, Prompt]]:
    """Move the cursor on by one batch; returns (epoch, prompt) of each of its rows."""
    rows, epochs = cursor.next_batch_and_epochs()
    return [(int(epoch), prompts.prompts[row]) for row, epoch in zip(rows, epochs, strict=True)]


def caught_up(
    cursor: DataCursor, prompts: PromptData, open_groups: Sequence[tuple[int, str]]
) -> list[tuple[int, Prompt]]:
    """Move the cursor past all groups that are not trained, also those that a killed life drew after the checkpoint.

    They are trained before what comes next in the walk. A cursor that stays before some of them would give them out a
    second time, if not in this life, then in one that goes on from a checkpoint of it.

    Args:
        cursor: at the place of the checkpoint; moves on by whole batches.
        prompts: what it walks over; the checkpoint and the ledger are of the same.
        open_groups: (epoch, prompt_id) of the groups not trained, in the ledger's order.

    Returns:
        (epoch, prompt) of all that the cursor has passed and that is not trained, in the order of the walk.
    """
    row_of = {prompt.prompt_id: row for row, prompt in enumerate(prompts.prompts)}
    places = [(epoch, row_of[prompt_id]) for epoch, prompt_id in open_groups]
    ahead = cursor.still_to_come(places)
    found = [(epoch, prompts.prompts[row]) for epoch, row in places if (epoch, row) not in ahead]
    while ahead:
        walked = next_prompts(cursor, prompts)
        found += walked
        ahead -= {(epoch, row_of[prompt.prompt_id]) for epoch, prompt in walked}
    return found
