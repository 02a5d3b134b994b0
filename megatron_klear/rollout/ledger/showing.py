"""A ledger as people read it: tables of groups and responses, and one group in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_klear.rollout.ledger.entries import STATES, StoredGroup
from megatron_klear.rollout.ledger.reading import GroupRow, ResponseRow
from megatron_klear.rollout.ledger.text import Decode

Row = TypeVar("Row")

_COLOURS = {"correct": "green", "wrong": "red", "malformed": "red", "partial": "yellow", "ungraded": "yellow"}


def print_groups(console: Console, rows: Sequence[GroupRow], states: dict[str, int], limit: int) -> None:
    """One line per group up to `limit` of them (negative: all), and how many there are in each state.

    Args:
        console: where to.
        rows: newest first; one more than `limit` where there are more.
        states: number of groups per state.
        limit: most lines.
    """
    table = _table("prompt", "epoch", "state", "step", "done", "correct", "reward", "tokens", "versions", "redrawn")
    for row in _up_to(rows, limit):
        table.add_row(
            escape(row.prompt_id),
            str(row.epoch),
            row.state,
            _or_dash(row.step),
            f"{row.finished}/{row.num_responses}",
            str(row.correct) if row.reward is not None else "-",
            _or_dash(row.reward, "+.2f"),
            _or_dash(row.tokens, ".0f"),
            _span(row.oldest_version, row.newest_version),
            str(row.draws) if row.draws else "",
        )
    console.print(table)
    counted = ", ".join(f"{states[state]:,} {state}" for state in STATES if state in states)
    console.print(f"groups: {counted or 'none'}; {_shown(rows, limit)}", highlight=False)


def print_responses(console: Console, rows: Sequence[ResponseRow], limit: int) -> None:
    """One line per response; arguments as of `print_groups`."""
    table = _table(
        "prompt", "epoch", "#", "state", "step", "outcome", "reward", "tokens", "end", "versions", "requests"
    )
    for row in _up_to(rows, limit):
        colour = _COLOURS.get(row.outcome or "", "")
        outcome = f"[{colour}]{row.outcome}[/]" if colour else "-"
        table.add_row(
            escape(row.prompt_id),
            str(row.epoch),
            str(row.response_index),
            row.state,
            _or_dash(row.step),
            outcome,
            "-" if row.outcome in (None, "ungraded") else _or_dash(row.reward, "+.2f"),
            str(row.num_tokens),
            "unfinished" if row.finish_reason == "abort" else row.finish_reason,
            " ".join(f"{version}x{count}" for version, count in row.versions),
            str(row.attempts),
        )
    console.print(table)
    console.print(f"responses: {_shown(rows, limit)}", highlight=False)


def print_group(console: Console, group: StoredGroup, decode: Decode | None, index: int | None) -> None:
    """A group with its prompt and responses in full, or with one response."""
    prompt = group.prompt
    step = f", step {group.step}" if group.step is not None else ""
    console.print(f"{prompt.prompt_id}, epoch {group.epoch}: {group.state}{step}", style="bold", markup=False)
    console.print(f"reference: {prompt.reference}", markup=False, highlight=False)
    console.rule("prompt")
    prompt_text = decode(prompt.token_ids) if decode else prompt.text or str(prompt.token_ids.tolist())
    console.print(prompt_text, markup=False, highlight=False)
    for i, rollout in sorted(group.rollouts.items()):
        if index is not None and i != index:
            continue
        grade = group.grades.get(i)
        judged = "not graded yet" if grade is None else f"{grade.outcome} {grade.reward:+.2f} {grade.reason}".strip()
        versions = " ".join(f"{version}x{count}" for version, count in rollout.policy_versions)
        end = "unfinished" if rollout.finish_reason == "abort" else rollout.finish_reason
        mean = float(rollout.rollout_logprobs.mean()) if len(rollout.rollout_logprobs) else 0.0
        console.rule(f"response {i}: {escape(judged)}", style=_COLOURS.get(grade.outcome, "") if grade else "")
        console.print(
            f"{len(rollout.response_ids)} tokens, {end}; versions {versions or '-'}; mean logprob {mean:.3f}",
            style="dim", markup=False,
        )  # fmt: skip
        text = decode(rollout.response_ids) if decode else str(rollout.response_ids.tolist())
        console.print(text, markup=False, highlight=False)


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    texts = {"prompt", "state", "outcome", "end", "versions"}
    for name in names:
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=name != "versions")
    return table


def _up_to(rows: Sequence[Row], limit: int) -> Sequence[Row]:
    return rows if limit < 0 else rows[:limit]


def _shown(rows: Sequence[object], limit: int) -> str:
    return f"the newest {limit} are shown (--limit)" if 0 <= limit < len(rows) else f"{len(rows)} shown"


def _or_dash(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _span(oldest: int | None, newest: int | None) -> str:
    if oldest is None:
        return "-"
    return str(oldest) if oldest == newest else f"{oldest} to {newest}"
