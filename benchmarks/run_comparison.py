"""What two runs of the same settings have in common, bit by bit: metrics, tokens, logprobs, versions, last weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_klear.rollout.ledger import LedgerReader

MEASURED = ("time", "phase_seconds/", "memory/", "throughput/", "manager/", "engines/", "requests/")
"""What a clock, the machine or a fault decides (which engines were lost, what was asked again); every other number of a
step must be the same."""


def step_rows(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Metrics of each training step, one row for every time that it was finished: a kill may bring a step back."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a kill in the middle of a line
        if row.get("phase") == "rl":
            rows.setdefault(row["step"], []).append({k: v for k, v in row.items() if not k.startswith(MEASURED)})
    return rows


def step_tokens(run: Path) -> dict[int, list[tuple[Any, ...]]]:
    """Of each trained step, in the order of training: epoch, prompt, and a digest of what was sampled for it."""
    found = {}
    with LedgerReader(run / "ledger.sqlite") as reader:
        for step in reader.steps():
            groups = []
            for group in reader.groups_of_step(step):
                digest = hashlib.blake2b(digest_size=16)
                for index in sorted(group.rollouts):
                    rollout = group.rollouts[index]
                    digest.update(rollout.response_ids.tobytes() + rollout.rollout_logprobs.tobytes())
                    digest.update(repr((index, rollout.finish_reason, rollout.policy_versions)).encode())
                groups.append((group.epoch, group.prompt.prompt_id, digest.hexdigest()))
            found[step] = groups
    return found


def last_weights(run: Path) -> dict[str, str]:
    """Digest of each file of the newest published weights."""
    newest = max((run / "weights").glob("version_????????"))
    files = sorted(newest.glob("*.safetensors"))
    return {f"{newest.name}/{f.name}": hashlib.blake2b(f.read_bytes(), digest_size=16).hexdigest() for f in files}


def compare(disturbed: Path, undisturbed: Path) -> Mapping[str, Any]:
    """Steps of both runs, and those of them that differ in any bit.

    Args:
        disturbed: may have finished a step more than once; every time counts.
        undisturbed: has finished each step once.
    """
    theirs, ours = step_rows(disturbed), step_rows(undisturbed)
    sampled = step_tokens(disturbed), step_tokens(undisturbed)
    names = sorted({name for rows in ours.values() for name in rows[-1]})
    differing = {
        str(step): sorted(n for n in names if any(row.get(n) != ours[step][-1].get(n) for row in theirs[step]))
        for step in sorted(theirs.keys() & ours.keys())
        if any(row != ours[step][-1] for row in theirs[step])
    }
    return {
        "steps": len(ours),
        "same_steps": theirs.keys() == ours.keys() and sampled[0].keys() == sampled[1].keys() == ours.keys(),
        "finished_more_than_once": sum(len(rows) > 1 for rows in theirs.values()),
        "metrics_compared": names,
        "steps_whose_metrics_differ": differing,
        "steps_whose_tokens_differ": [s for s in sampled[1] if sampled[0].get(s) != sampled[1][s]],
        "last_weights_equal": last_weights(disturbed) == last_weights(undisturbed),
    }


def is_equal(compared: Mapping[str, Any]) -> bool:
    """Whether nothing differs."""
    differing = compared["steps_whose_metrics_differ"] or compared["steps_whose_tokens_differ"]
    return bool(compared["same_steps"] and compared["last_weights_equal"] and not differing)
