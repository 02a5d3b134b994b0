"""Replaces a file in one step, so that a kill leaves either the old or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a whole file, UTF-8 if it is text.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    fresh = path.with_name(f".{path.name}.part")
    fresh.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
    os.replace(fresh, path)
