"""The folder that a server is started from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def started_from(server: Mapping[str, Any], model: Mapping[str, Any]) -> Path:
    """The folder whose config.json decides what a server computes; it may not be readable from here.

    /model_info names the newest weights that were loaded from files, which a trainer may have put there: whatever those
    say, the server goes on as it was started.

    Args:
        server, model: its answers at /server_info and /model_info.
    """
    return Path(str(server.get("model_path") or model.get("model_path", "")))


def link_weights(weights: Path, folder: Path) -> None:
    """Have a folder show the safetensors of a model, and no others that it showed before.

    Args:
        weights: directory with *.safetensors and, where there are several, their index.
        folder: where servers are started from.
    """
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for file in sorted(weights.glob("*.safetensors*")):
        (folder / file.name).symlink_to(file.absolute())
