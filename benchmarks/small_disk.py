"""A directory on a file system that is nearly full, for a while."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_MOST_BYTES = 2**30
"""A directory with more than this does not go into memory."""
_UNMOUNT_SECONDS = 30.0


@contextlib.contextmanager
def nearly_full(directory: Path, spare_bytes: int) -> Iterator[bool]:
    """Keep a directory on a tmpfs with so many bytes left; what it holds in the end is put back in its place.

    Nothing may have files in it open, neither before nor after.

    Yields:
        whether that could be done: it takes root, and a system that lets root mount.
    """
    kept = directory.with_name(f"{directory.name}.outside")
    size = sum(file.lstat().st_size for file in directory.rglob("*"))
    if os.geteuid() or size > _MOST_BYTES or not _can_mount(directory.parent):
        yield False
        return
    directory.rename(kept)
    directory.mkdir()
    try:
        _mount(directory, f"size={4 * _MOST_BYTES}")
        shutil.copytree(kept, directory, symlinks=True, dirs_exist_ok=True)
        used = os.statvfs(directory)
        _mount(directory, f"remount,size={(used.f_blocks - used.f_bfree) * used.f_frsize + spare_bytes}")
    except BaseException:
        if directory.is_mount():
            _unmount(directory)
        directory.rmdir()
        kept.rename(directory)
        raise
    try:
        yield True
    finally:
        back = directory.with_name(f"{directory.name}.inside")
        shutil.copytree(directory, back, symlinks=True)
        _unmount(directory)
        directory.rmdir()
        back.rename(directory)
        shutil.rmtree(kept)


def _can_mount(parent: Path) -> bool:
    probe = parent / "mount.probe"
    probe.mkdir()
    try:
        _mount(probe, "size=4096")
        _unmount(probe)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        probe.rmdir()
    return True


def _mount(directory: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    subprocess.run(command, check=True, capture_output=True)


def _unmount(directory: Path) -> None:
    """Processes that are just ending may have files in it open."""
    deadline = time.monotonic() + _UNMOUNT_SECONDS
    while subprocess.run(["umount", str(directory)], capture_output=True).returncode:
        if time.monotonic() > deadline:
            subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True)
            return
        time.sleep(0.2)
