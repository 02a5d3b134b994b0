"""A ledger as people read it: tables of groups and responses, and one group in full."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from megatron_klear.rollout.ledger.entries import STATES, StoredGroup
from megatron_klear.rollout.ledger.reading import GroupRow, ResponseRow
from megatron_klear.rollout.ledger.tables import make_table, or_dash, shown, span, up_to
from megatron_klear.rollout.ledger.text import Decode

_COLOURS = {"correct": "green", "wrong": "red", "malformed": "red", "partial": "yellow", "ungraded": "yellow"}
_ALL_COLUMNS_WIDTH = 140
_REASON_CHARACTERS = 80


def print_groups(console: Console, rows: Sequence[GroupRow], states: dict[str, int], limit: int) -> None:
    """One line per group up to `limit` of them (negative: all), and how many there are in each state.

    Args:
        console: where to.
        rows: newest first; one more than `limit` where there are more.
        states: number of groups per state.
        limit: most lines.
    """
    table = make_table("prompt", "epoch", "state", "step", "done", "correct", "reward", "tokens", "versions", "redrawn")
    for row in up_to(rows, limit):
        table.add_row(
            escape(row.prompt_id),
            str(row.epoch),
            row.state,
            or_dash(row.step),
            f"{row.finished}/{row.num_responses}",
            str(row.correct) if row.reward is not None else "-",
            or_dash(row.reward, "+.2f"),
            or_dash(row.tokens, ".0f"),
            span(row.oldest_version, row.newest_version),
            str(row.draws) if row.draws else "",
        )
    console.print(table)
    counted = ", ".join(f"{states[state]:,} {state}" for state in STATES if state in states)
    console.print(f"groups: {counted or 'none'}; {shown(rows, limit)}", highlight=False)


def print_responses(console: Console, rows: Sequence[ResponseRow], limit: int, *, grading: bool = False) -> None:
    """One line per response.

    Args:
        console: where to; one that is narrow gets either how responses were made or why they were graded so.
        rows: newest first; one more than `limit` where there are more.
        limit: most lines.
        grading: whether the question is why they were graded so.
    """
    left_out: tuple[str, ...] = ()
    if console.width < _ALL_COLUMNS_WIDTH:
        left_out = ("end", "versions", "requests") if grading else ("reason",)
    names = ("prompt", "epoch", "#", "state", "step", "outcome", "reward", "tokens", "end", "versions", "requests",
             "reason")  # fmt: skip
    table = make_table(*(name for name in names if name not in left_out))
    for row in up_to(rows, limit):
        colour = _COLOURS.get(row.outcome or "", "")
        cells = {
            "prompt": escape(row.prompt_id),
            "epoch": str(row.epoch),
            "#": str(row.response_index),
            "state": row.state,
            "step": or_dash(row.step),
            "outcome": f"[{colour}]{row.outcome}[/]" if colour else "-",
            "reward": "-" if row.outcome in (None, "ungraded") else or_dash(row.reward, "+.2f"),
            "tokens": str(row.num_tokens),
            "end": _end(row),
            "versions": _versions(row),
            "requests": str(row.attempts),
            "reason": escape(_shortened(row.reason or "")),
        }
        table.add_row(*(cells[name] for name in names if name not in left_out))
    console.print(table)
    console.print(f"responses: {shown(rows, limit)}", highlight=False)
    if left_out:
        other = "" if grading else ", and --outcome shows it"
        console.print(
            f"not shown: {', '.join(left_out)}; a terminal of {_ALL_COLUMNS_WIDTH} columns has room{other}", style="dim"
        )


def print_group(console: Console, group: StoredGroup, responses: Sequence[ResponseRow], decode: Decode | None) -> None:
    """A group with its prompt and responses in full.

    Args:
        console: where to.
        group: of the responses; those without tokens were pruned.
        responses: which to print.
        decode: makes text of tokens; None prints ids.
    """
    prompt = group.prompt
    step = f", step {group.step}" if group.step is not None else ""
    console.print(f"{prompt.prompt_id}, epoch {group.epoch}: {group.state}{step}", style="bold", markup=False)
    console.print(f"reference: {prompt.reference}", markup=False, highlight=False)
    console.rule("prompt")
    prompt_text = decode(prompt.token_ids) if decode else prompt.text or str(prompt.token_ids.tolist())
    console.print(prompt_text, markup=False, highlight=False)
    if not responses:
        console.print("no responses yet", style="dim")
    for row in responses:
        rollout = group.rollouts.get(row.response_index)
        made = f"{row.num_tokens} tokens, {_end(row)}; versions {_versions(row) or '-'}"
        if rollout is None:
            reason = f" ({' '.join(row.reason.split())})" if row.reason else ""
            console.print(
                f"response {row.response_index}: {_judged(row)}{reason}; {made}; its tokens were removed "
                "(scheduling.keep_steps)", markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
            continue
        console.rule(f"response {row.response_index}: {_judged(row)}", style=_COLOURS.get(row.outcome or "", ""))
        mean = float(rollout.rollout_logprobs.mean()) if len(rollout.rollout_logprobs) else 0.0
        console.print(f"{made}; mean logprob {mean:.3f}", style="dim", markup=False)
        if row.reason:
            console.print(f"reason: {row.reason}", style="dim", markup=False, highlight=False)
        text = decode(rollout.response_ids) if decode else str(rollout.response_ids.tolist())
        console.print(text, markup=False, highlight=False)


def _judged(row: ResponseRow) -> str:
    if row.outcome is None:
        return "not graded yet"
    return row.outcome if row.outcome == "ungraded" else f"{row.outcome} {or_dash(row.reward, '+.2f')}"


def _end(row: ResponseRow) -> str:
    return "unfinished" if row.finish_reason == "abort" else row.finish_reason


def _versions(row: ResponseRow) -> str:
    return " ".join(f"{version}x{count}" for version, count in row.versions)


def _shortened(reason: str) -> str:
    """For one cell of a table; a reason may quote what a model wrote, whatever that is."""
    text = " ".join("".join(c if c.isprintable() else " " for c in reason).split())
    return text if len(text) <= _REASON_CHARACTERS else f"{text[: _REASON_CHARACTERS - 1].rstrip()}…"
