"""Current weights for an engine that was started anew, while the trainer trains and publishes nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.checksums import verify
from megatron_klear.weight_sync.engines import EngineGroup, Refusal
from megatron_klear.weight_sync.tensor_transport import TensorTransport
from megatron_klear.weight_sync.transport import load_from_disk

log = logging.getLogger(__name__)

NOT_SEEN = "Failed to get weights iterator"
"""How SGLang (0.5.23, `weight_updater.py`) refuses files that it does not find, before it has loaded any of them."""


def restore(
    engines: EngineGroup,
    directory: Path,
    *,
    version: int,
    expected: list[dict[str, str]] | None,
    prove: Callable[[], None] | None = None,
    sent_to_tp: int | None = None,
) -> None:
    """Have fresh engines load the weights of the last publish, prove them, and set their version.

    Args:
        engines: who loads them; they generate nothing yet.
        directory: as `WeightFiles` writes it.
        version: of these weights.
        expected: checksum by tensor for each of an engine's ranks, kept from the publish; None when it was proved
            otherwise.
        prove: needed and called where there are no checksums: when the engines generate with these weights, and are
            not yet said to have this version. Raises when they are others.
        sent_to_tp: tensor parallel size of engines that may not see our files, and may hold unfinished work: they are
            paused meanwhile, and where they do not see the files they get the weights in requests. None has them read
            the files.

    Raises:
        WeightSyncError: an engine failed, or its weights are not those that were published (by name).
    """
    if sent_to_tp is None:
        load_from_disk(engines, directory)
    else:
        # One that dropped out of a publish may be paused in place: what it held is never aborted, and neither is the
        # cache flushed, before that is put back into the queue.
        engines.call("/pause_generation", {"mode": "retract"})
        engines.call("/pause_generation", {"mode": "abort"})
        try:
            load_from_disk(engines, directory.absolute())
        except Refusal as refusal:
            # Whoever sees the files and refuses them would refuse, or not survive, the same weights in requests.
            if NOT_SEEN not in str(refusal):
                raise
            log.info("%s; the weights of version %d are sent in requests", refusal, version)
            _send(engines, directory, version, sent_to_tp)
        engines.call("/flush_cache", {})
    if expected is not None and not verify(engines, expected):
        names = ", ".join(caller.name for caller in engines.callers)
        raise WeightSyncError(f"{names}: tells no checksums of its weights, as the engines of the last publish did")
    if expected is None:
        if sent_to_tp is not None:
            engines.call("/continue_generation", {})
        assert prove is not None, "weights that nothing proves get no version"
        prove()
    engines.call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
    if expected is not None and sent_to_tp is not None:
        engines.call("/continue_generation", {})


def _send(engines: EngineGroup, directory: Path, version: int, tp: int) -> None:
    """Send the files one by one, each of which is a bucket."""
    transport = TensorTransport(engines, tp=tp, by_value=True)
    transport.begin(version)
    try:
        files: dict[str, str] = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        for name in dict.fromkeys(files.values()):
            held = load_file(directory / name)
            transport.send(Bucket(names=tuple(held), tensors=tuple(held.values())))
    except (OSError, ValueError) as error:
        raise WeightSyncError(f"cannot read the weights of version {version} in {directory}: {error}") from error
    transport.finish()
