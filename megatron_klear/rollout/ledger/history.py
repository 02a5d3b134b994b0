"""What happened to a ledger's groups as people read it, and whether it fits what they are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.markup import escape

from megatron_klear.rollout.ledger.entries import STATES
from megatron_klear.rollout.ledger.reading import EventRow
from megatron_klear.rollout.ledger.tables import counted, make_table, shown, span, up_to


def print_events(console: Console, rows: Sequence[EventRow], limit: int) -> None:
    """One line per event up to `limit` of them (negative: all).

    Args:
        console: where to.
        rows: newest first; one more than `limit` where there are more.
        limit: most lines.
    """
    table = make_table("time", "event", "prompt", "epoch", "step", "detail")
    for row in up_to(rows, limit):
        of = escape(row.prompt_id) if row.prompt_id is not None else counted(row.groups, "group") if row.groups else ""
        table.add_row(
            datetime.fromtimestamp(row.at).strftime("%Y-%m-%d %H:%M:%S"),
            row.event,
            of,
            "" if row.epoch is None else str(row.epoch),
            "" if row.step is None else str(row.step),
            escape(row.detail),
        )
    console.print(table)
    console.print(f"events: {shown(rows, limit)}", highlight=False)


def print_check(
    console: Console, states: dict[str, int], trained: Sequence[int], promised: Sequence[int],
    wrong: Sequence[tuple[int, str, str, int]],
) -> None:  # fmt: skip
    """Whether a ledger can be trusted.

    Args:
        console: where to.
        states: number of groups per state.
        trained: steps that were trained, going up.
        promised: steps that have groups and were not trained yet, going up.
        wrong: (epoch, prompt_id, state, times trained) of groups whose history contradicts their state.
    """
    console.print("groups: " + ", ".join(f"{states.get(state, 0):,} {state}" for state in STATES), highlight=False)
    console.print(f"steps: {_steps(trained, 'trained')}, {_steps(promised, 'promised')}", highlight=False)
    if not wrong:
        console.print(
            "every trained group was trained once in the history that counts, and no other was", highlight=False
        )
        return
    table = make_table("prompt", "epoch", "state", "times trained", "should be")
    for epoch, prompt_id, state, times in wrong:
        table.add_row(escape(prompt_id), str(epoch), state, str(times), "1" if state == "trained" else "0")
    console.print(table)
    console.print(
        f"{counted(len(wrong), 'group')} with a history that contradicts the state; events --prompt-id ID tells it",
        highlight=False,
    )


def _steps(steps: Sequence[int], what: str) -> str:
    return f"{len(steps):,} {what} ({span(steps[0], steps[-1])})" if steps else f"none {what}"
