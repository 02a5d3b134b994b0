"""Checkpoints: saving and resuming a run, and converting to and from Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_klear.checkpoint.store import CheckpointStore, load_weights

__all__ = ["CheckpointStore", "load_weights"]


def __getattr__(name: str) -> object:
    """Import the store when it is first asked for: tools/convert answers a wrong argument without torch."""
    if name in __all__:
        from megatron_klear.checkpoint import store

        return getattr(store, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
