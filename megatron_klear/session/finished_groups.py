"""Prompt groups that are finished while others of their step are generated, kept in case the run is stopped or killed.

Where the ranks generate together, rank 0 writes the ledger when a step's groups are all there. Until then each rank
keeps its own in a file, whose lines the next life of the run enters into the ledger.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_klear.records import Prompt, Rollout
from megatron_klear.rollout.ledger import Ledger
from megatron_klear.rollout.ledger.encoding import (
    pack_logprobs,
    pack_tokens,
    pack_versions,
    unpack_logprobs,
    unpack_tokens,
    unpack_versions,
)

log = logging.getLogger(__name__)

DIRECTORY = "finished_groups"


class FinishedGroups:
    """One rank's finished groups of the step that is being generated.

    Args:
        root: the run directory.
        rank: of the launch.
    """

    def __init__(self, root: Path, rank: int) -> None:
        self._file = root / DIRECTORY / f"rank_{rank:05d}.jsonl"
        self._responses: dict[str, dict[int, Rollout]] = {}
        self._is_failing = False

    def add(self, epoch: int, prompt: Prompt, index: int, rollout: Rollout, *, num_responses: int) -> None:
        """Note a response; with the last one of its group the group is on disk.

        What cannot be written is not kept, with one warning: it would only be drawn again.
        """
        responses = self._responses.setdefault(prompt.prompt_id, {})
        responses[index] = rollout
        if len(responses) < num_responses:
            return
        del self._responses[prompt.prompt_id]
        text = json.dumps(
            {
                "epoch": epoch,
                "prompt_id": prompt.prompt_id,
                "responses": [_encoded(responses[i]) for i in range(num_responses)],
            }
        )
        try:
            self._file.parent.mkdir(exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                # A line of its own begins after one that a full disk has cut off.
                file.write(f"\n{zlib.crc32(text.encode()):08x} {text}\n")
        except OSError as error:
            if not self._is_failing:
                log.warning("a kill in this step would have its responses drawn again: they cannot be kept (%s)", error)
            self._is_failing = True

    def forget(self) -> None:
        """They are all in the ledger."""
        self._responses.clear()
        self._is_failing = False
        with contextlib.suppress(OSError):  # what is left there finds its group beyond waiting for it
            self._file.unlink(missing_ok=True)


def enter_left_behind(ledger: Ledger, root: Path) -> list[int]:
    """Enter what an earlier life kept into the ledger, where its group still waits for responses; on rank 0.

    Args:
        ledger: of the run, before it is brought together with checkpoint and settings.
        root: the run directory.

    Returns:
        Ids of the groups that were entered.
    """
    entered = []
    for file in _files(root):
        for epoch, prompt_id, responses in _groups_in(file):
            with ledger.transaction() as db:
                found = db.execute(
                    "SELECT group_id FROM groups g WHERE epoch = ? AND prompt_id = ? AND state = 'reserved' AND "
                    "num_responses = ? AND NOT EXISTS (SELECT 1 FROM responses r WHERE r.group_id = g.group_id)",
                    [epoch, prompt_id, len(responses)],
                ).fetchone()
                if found is None:
                    continue
                for index, rollout in enumerate(responses):
                    ledger.save_response(found[0], index, rollout)
                entered.append(int(found[0]))
    return entered


def forget_left_behind(root: Path) -> None:
    """Remove what was entered, once the ledger is known to be the run's; on rank 0, before any rank keeps more."""
    for file in _files(root):
        file.unlink()


def _files(root: Path) -> list[Path]:
    return sorted((root / DIRECTORY).glob("rank_*.jsonl"))


def _groups_in(file: Path) -> Iterator[tuple[int, str, list[Rollout]]]:
    """(epoch, prompt_id, responses) of whole lines; one that is cut off is as if it had not been written."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        checksum, _, text = line.partition(" ")
        if checksum != f"{zlib.crc32(text.encode()):08x}" or not text:
            continue
        row = json.loads(text)
        yield row["epoch"], row["prompt_id"], [_decoded(entry) for entry in row["responses"]]


def _encoded(rollout: Rollout) -> list[str]:
    return [
        base64.b64encode(pack_tokens(rollout.response_ids)).decode(),
        base64.b64encode(pack_logprobs(rollout.rollout_logprobs)).decode(),
        rollout.finish_reason,
        pack_versions(rollout.policy_versions),
    ]


def _decoded(entry: list[str]) -> Rollout:
    tokens, logprobs, reason, versions = entry
    return Rollout(
        response_ids=unpack_tokens(base64.b64decode(tokens)),
        rollout_logprobs=unpack_logprobs(base64.b64decode(logprobs)),
        finish_reason="stop" if reason == "stop" else "length",
        policy_versions=unpack_versions(versions),
    )
