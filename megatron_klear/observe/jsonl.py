"""Files of one JSON object per line that survive a kill at any instant."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLinesFile:
    """Appends JSON objects, one system call per line, so that a kill can tear at most the last line.

    A write that fails (a full disk, say) loses that line and is told once; training goes on. The next line
    that can be written starts on a line of its own, whatever the failed one left behind.

    Args:
        path: the file; its folder is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the object)
        self._torn = _ends_inside_a_line(path)
        self._lost_lines = 0

    def append(self, row: dict[str, Any]) -> bool:
        """Writes one object (finite numbers only); returns whether it reached the operating system."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        if self._torn:
            line = b"\n" + line
        try:
            written = self._file.write(line)
            complete = written == len(line)
            problem = f"only {written} of {len(line)} bytes fitted"
        except OSError as error:
            complete, problem = False, str(error)
        if not complete:
            self._torn = True
            self._lost_lines += 1
            if self._lost_lines == 1:
                logger.warning("cannot write %s: %s; lines are lost until this works again", self.path, problem)
            return False
        if self._lost_lines:
            logger.warning("%s can be written again; %d lines were lost", self.path, self._lost_lines)
        self._torn, self._lost_lines = False, 0
        return True

    def sync(self) -> None:
        """Waits until what was written is on the disk; a disk that refuses is told like a failed write."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("cannot flush %s to disk: %s", self.path, error)

    def close(self) -> None:
        """Syncs and closes; safe to call twice."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file in order; damaged lines are left out, and counted in a warning unless it is the last.

    Raises:
        OSError: if the file cannot be read.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [_parse(line) for line in lines]
    damaged = sum(row is None for row in rows[:-1])
    if damaged:
        logger.warning("%s: left out %d damaged lines of %d", path, damaged, len(lines))
    return [row for row in rows if row is not None]


def keep_through_step(path: Path, last_step: int) -> int:
    """Drops every line whose "step" is later than `last_step`, and damaged lines; returns how many went.

    The file is replaced in one rename, so that a kill leaves either the old or the new file. A missing file is
    fine: there is nothing to drop.
    """
    if not path.exists():
        return 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    kept = [line for line in lines if _step_of(line) <= last_step]
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(lines) - len(kept)


def set_aside(path: Path) -> Path | None:
    """Renames an earlier run's file to the first free `name.N.suffix`, so that starting anew destroys nothing."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError, or UnicodeDecodeError where a character was torn
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: bytes) -> float:
    row = _parse(line)
    step = row.get("step") if row is not None else None
    return step if isinstance(step, (int, float)) else float("inf")


def _ends_inside_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
