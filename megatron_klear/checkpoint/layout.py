"""A checkpoint directory on disk: how it becomes visible all at once, and how damage is recognised.

    checkpoints/step_00000020/    Megatron's distributed checkpoint (.metadata, *.distcp, common.pt, metadata.json)
        run_state.json            step, data cursor and the rest of the run's state
        config.yaml               the resolved settings
        manifest.json             size and CRC-32 of every other file, written last

A checkpoint is written under a hidden name and renamed when its manifest is on disk, so a visible directory
is a whole one unless the disk lost something later, which the manifest shows. Directories being written, replaced
or deleted have hidden names (`.writing_`, `.replaced_`, `.deleting_`), and `clean` settles what a kill left of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

from megatron_klear.errors import CheckpointError

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
SETTINGS = "config.yaml"
_NAME = re.compile(r"step_(\d{8})")
_READ_BYTES = 1 << 22


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below the checkpoints directory."""
    return root / f"step_{step:08d}"


def writing_directory(root: Path, step: int) -> Path:
    """The hidden name under which a checkpoint is written."""
    return root / f".writing_step_{step:08d}"


def finished_steps(root: Path) -> list[int]:
    """Steps with a visible checkpoint, newest first."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(m.group(1)) for m in matches if m), reverse=True)


def require_shared(directory: Path) -> None:
    """Make sure that this machine sees a directory which another may have made.

    Raises:
        OSError: it does not.
    """
    # Listing the parent makes a network file system look again.
    if directory.name not in os.listdir(directory.parent):
        raise OSError(
            f"{directory} was made by rank 0 and is not here; run.dir must be on storage that all machines share"
        )


def files_of(directory: Path) -> list[str]:
    """Names of all files of a checkpoint but its manifest, relative to it, sorted."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def checksum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    crc = size = 0
    with file.open("rb") as opened:
        while block := opened.read(_READ_BYTES):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return size, crc


def checksums(directory: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of some files of a checkpoint."""
    return {name: checksum(directory / name) for name in names}


def flush_to_disk(path: Path) -> None:
    """Make a file or directory entry survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(directory: Path, sums: dict[str, tuple[int, int]]) -> None:
    """Write the manifest and flush everything it names."""
    for name in sums:
        flush_to_disk(directory / name)
    path = directory / MANIFEST
    path.write_text(json.dumps({"files": {name: list(pair) for name, pair in sorted(sums.items())}}, indent=1) + "\n")
    flush_to_disk(path)
    flush_to_disk(directory)


def read_manifest(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 that every file of a checkpoint must have.

    Raises:
        CheckpointError: there is no readable manifest.
    """
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        found = {str(name): (int(size), int(crc)) for name, (size, crc) in files.items()}
        if not found:
            raise ValueError("it names no files")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory}: no readable {MANIFEST} ({error})") from error


def damage(directory: Path, expected: dict[str, tuple[int, int]]) -> list[str]:
    """What is wrong with the files named in `expected`; empty when they are whole."""
    return [
        f"{name} {problem}" for name, pair in expected.items() if (problem := _damage_of_file(directory / name, pair))
    ]


def _damage_of_file(file: Path, expected: tuple[int, int]) -> str | None:
    size, crc = expected
    try:
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != size:
            return f"has {file.stat().st_size} bytes, must have {size}"
        if checksum(file)[1] != crc:
            return "has another checksum than when it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def publish(root: Path, step: int) -> Path:
    """Make a fully written checkpoint visible under its final name; returns it.

    One that has this name already is replaced, and at no instant is there none that `clean` would not bring back.
    """
    final = step_directory(root, step)
    replaced = final.with_name(f".replaced_{final.name}")
    if final.exists():
        os.replace(final, replaced)
    os.replace(writing_directory(root, step), final)
    flush_to_disk(root)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def clean(root: Path) -> None:
    """Settle what a kill or a failure left: a checkpoint that was to be replaced comes back, the rest goes."""
    for replaced in root.glob(".replaced_step_*"):
        final = replaced.with_name(replaced.name.removeprefix(".replaced_"))
        if not final.exists():
            os.replace(replaced, final)
    for leftover in root.glob(".*_step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_old(root: Path, keep: int) -> list[int]:
    """Delete all but the newest `keep` checkpoints; returns the deleted steps."""
    old = finished_steps(root)[keep:]
    for step in old:
        directory = step_directory(root, step)
        # Renamed first, so that an interrupted deletion is never taken for a checkpoint.
        hidden = directory.with_name(f".deleting_{directory.name}")
        os.replace(directory, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return old
