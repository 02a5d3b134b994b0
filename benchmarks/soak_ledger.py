"""What a soak asks a ledger: how often each prompt was trained, and whether some of the walk over the data was not."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from megatron_klear.data import DataCursor

NOT_ONCE = """
SELECT g.epoch, g.prompt_id, COALESCE(SUM((e.event = 'trained') - (e.event = 'rolled back')), 0) AS times
FROM groups g LEFT JOIN events e USING (group_id) GROUP BY g.group_id HAVING times != (g.state = 'trained')
"""
TIMES = """
SELECT times, COUNT(*) FROM (
  SELECT COALESCE(SUM((e.event = 'trained') - (e.event = 'rolled back')), 0) AS times
  FROM groups g LEFT JOIN events e USING (group_id) WHERE g.state = 'trained' GROUP BY g.epoch, g.prompt_id
) GROUP BY times
"""
_NEWEST = "(SELECT MAX(number) FROM walk JOIN groups USING (epoch, prompt_id))"
_SKIPPED = f"""
SELECT w.epoch, w.prompt_id FROM walk w LEFT JOIN groups g USING (epoch, prompt_id)
WHERE g.group_id IS NULL AND w.number < {_NEWEST} ORDER BY w.number
"""
_LEFT_BEHIND = f"""
SELECT w.epoch, w.prompt_id FROM walk w JOIN groups g USING (epoch, prompt_id)
WHERE g.state != 'trained' AND w.number < {_NEWEST} - ? ORDER BY w.number
"""
_NOT_OF_THE_WALK = """
SELECT g.epoch, g.prompt_id FROM groups g LEFT JOIN walk w USING (epoch, prompt_id)
WHERE w.number IS NULL ORDER BY g.group_id
"""


def walk_of_ledger(
    file: Path, prompt_ids: Sequence[str], *, seed: int, per_step: int, most_in_flight: int
) -> dict[str, object]:
    """What a ledger has of the walk.

    Args:
        file: ledger.sqlite.
        prompt_ids: of the data, in their order.
        seed: run.seed.
        per_step: rl.prompts_per_step, in all lives of the run.
        most_in_flight: prompts that may be reserved and not trained.

    Returns:
        in_flight, how many are reserved and not trained, and lists of (epoch, prompt_id): skipped, never reserved while
        later ones were; left_behind, not trained while others were that come later by three times what may be in
        flight; not_of_the_walk. All three must be empty, and in_flight at most what it may be.
    """
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as ledger:
        last = ledger.execute("SELECT COALESCE(MAX(epoch), 0) FROM groups").fetchone()[0]
        cursor = DataCursor(len(prompt_ids), per_step, seed=seed)
        places: list[tuple[int, str]] = []
        while len(places) < (last + 1) * len(prompt_ids):
            rows, epochs = cursor.next_batch_and_epochs()
            places += [(int(epoch), prompt_ids[row]) for row, epoch in zip(rows, epochs, strict=True)]
        ledger.execute("CREATE TEMP TABLE walk (epoch, prompt_id, number INTEGER, PRIMARY KEY (epoch, prompt_id))")
        ledger.executemany(
            "INSERT INTO walk VALUES (?, ?, ?)", [(*place, number) for number, place in enumerate(places)]
        )
        in_flight = ledger.execute("SELECT COUNT(*) FROM groups WHERE state != 'trained'").fetchone()[0]
        return {
            "in_flight": in_flight,
            "may_be_in_flight": most_in_flight,
            "skipped": ledger.execute(_SKIPPED).fetchall(),
            "left_behind": ledger.execute(_LEFT_BEHIND, [3 * most_in_flight]).fetchall(),
            "not_of_the_walk": ledger.execute(_NOT_OF_THE_WALK).fetchall(),
        }


def is_whole(told: dict[str, object]) -> bool:
    """Whether what `walk_of_ledger` tells is as it must be."""
    faults = [told[name] for name in ("skipped", "left_behind", "not_of_the_walk")]
    return not any(faults) and told["in_flight"] <= told["may_be_in_flight"]  # type: ignore[operator]
