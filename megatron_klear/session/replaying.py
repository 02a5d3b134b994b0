"""Where the replay of another run's later steps begins: with what that run had when it trained on them."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.collective import agree, damage_of
from megatron_klear.config import Entry, Settings
from megatron_klear.records import ParallelContext

log = logging.getLogger(__name__)


def steps_before(settings: Settings, entry: Entry) -> int:
    """Steps that a fresh run leaves out, because its replay begins after them."""
    if entry != "rl" or settings.scheduling.replay_from is None:
        return 0
    return settings.scheduling.replay_first_step - 1


def last_step(settings: Settings, entry: Entry, total_steps: int) -> int:
    """The step that a run ends with."""
    if entry != "rl" or settings.scheduling.replay_from is None:
        return total_steps
    return settings.scheduling.replay_last_step or total_steps


def checkpoint_before(settings: Settings, entry: Entry, context: ParallelContext) -> Path | None:
    """The recorded run's checkpoint that a fresh replay starts from (a collective).

    Args:
        settings: of the replay.
        entry: which entry runs.
        context: the layout, in which the checkpoint need not have been written.

    Returns:
        None where the replay begins with the first step, or, with a warning, where that checkpoint is gone or damaged.
    """
    step, source = steps_before(settings, entry), settings.scheduling.replay_from
    if step == 0 or source is None:
        return None
    root = Path(source) / "checkpoints"
    steps = agree("list the checkpoints of the recorded run", lambda: sorted(layout.finished_steps(root)), context)
    directory = layout.step_directory(root, step)
    problems = damage_of(directory, context) if step in steps else []
    if step in steps and not problems:
        return directory
    if context.world.rank == 0:
        why = f"is damaged ({'; '.join(problems)})" if problems else "is not there"
        others = ", ".join(str(saved) for saved in steps if saved != step) or "none"
        log.warning(
            "%s %s: step %d is replayed on this run's first weights, which are not those that were trained on it; a "
            "scheduling.replay_first_step after one of these has its checkpoint: %s", directory, why, step + 1, others,
        )  # fmt: skip
    return None
