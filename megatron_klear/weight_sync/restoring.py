"""Current weights for an engine that was started anew, while the trainer trains and publishes nothing."""

from __future__ import annotations

from pathlib import Path

from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync.checksums import verify
from megatron_klear.weight_sync.engines import EngineGroup
from megatron_klear.weight_sync.transport import load_from_disk


def restore(engines: EngineGroup, directory: Path, *, version: int, expected: list[dict[str, str]] | None) -> None:
    """Have fresh engines load the weights of the last publish, prove them, and set their version.

    Args:
        engines: who loads them; they generate nothing yet.
        directory: as `WeightFiles` writes it.
        version: of these weights.
        expected: checksum by tensor for each of an engine's ranks, kept from the publish; None when it was proved
            otherwise, and the caller proves this one.

    Raises:
        WeightSyncError: an engine failed, or its weights are not those that were published (by name).
    """
    load_from_disk(engines, directory)
    if expected is not None and not verify(engines, expected):
        names = ", ".join(caller.name for caller in engines.callers)
        raise WeightSyncError(f"{names}: tells no checksums of its weights, as the engines of the last publish did")
    engines.call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
