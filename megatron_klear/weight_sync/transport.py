"""How buckets of weights travel to the engines: the interface of the three transports, and by files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import EngineGroup, PendingCalls


class Transport(Protocol):
    """Brings one set of weights to all engines; used on the first rank only."""

    def begin(self, version: int) -> None:
        """Start a set.

        Raises:
            WeightSyncError: an engine refuses; so do all methods.
        """
        ...

    def send(self, bucket: Bucket) -> None:
        """Send a bucket; may return while the engines still load it."""
        ...

    def finish(self) -> None:
        """Wait until the engines have all buckets."""
        ...

    def close(self) -> None:
        """Release what was held over several sets; a second call does nothing."""
        ...


class UpdateSession:
    """SGLang's frame around tensor and distributed updates; servers that know none (status 404) need none."""

    def __init__(self, engines: EngineGroup) -> None:
        self._engines = engines
        self._pending: PendingCalls | None = None
        self._open = False

    def begin(self) -> None:
        """Open the frame."""
        if self._open:  # an earlier set broke off
            self._open = False
            self._engines.try_call("/end_weight_update", {})
        self._open = self._engines.try_call("/begin_weight_update", {"selector": "all"}) is not None

    def follow(self, calls: PendingCalls) -> None:
        """Let a bucket's calls run on, after those of the bucket before have ended: two are under way at most."""
        previous, self._pending = self._pending, calls
        if previous is not None:
            previous.answers()

    def wait(self) -> None:
        """Wait for the bucket that is under way."""
        previous, self._pending = self._pending, None
        if previous is not None:
            previous.answers()

    def end(self) -> None:
        """Wait for the last bucket and close the frame."""
        self.wait()
        if self._open:
            self._open = False
            self._engines.call("/end_weight_update", {})


class DiskTransport:
    """Safetensors files in a directory that the engines can read, one file per bucket; implements `Transport`.

    Args:
        engines: who loads them.
        directory: gets one directory per version; the newest two are kept, so that an engine that restarts finds one.
        hf_config: the model's config.json, written beside the weights.
    """

    def __init__(self, engines: EngineGroup, directory: Path, hf_config: Mapping[str, Any]) -> None:
        self._engines, self._directory, self._hf_config = engines, directory.absolute(), dict(hf_config)
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        self._version = -1

    def begin(self, version: int) -> None:
        """Make an empty directory for the version."""
        self._version, self._weight_map, self._total_bytes = version, {}, 0
        self._guarded("make a directory for", self._make_directory)

    def send(self, bucket: Bucket) -> None:
        """Write a bucket's file."""
        name = f"model-{len(set(self._weight_map.values())) + 1:05d}.safetensors"
        self._weight_map |= dict.fromkeys(bucket.names, name)
        self._total_bytes += bucket.num_bytes
        tensors = {n: t.cpu() for n, t in zip(bucket.names, bucket.tensors, strict=True)}
        self._guarded("write", lambda: save_file(tensors, self._fresh / name, metadata={"format": "pt"}))

    def finish(self) -> None:
        """Complete the directory and have the engines load it."""
        self._guarded("complete", self._complete)
        body = {"model_path": str(self._path), "load_format": "safetensors", "flush_cache": False}
        self._engines.call("/update_weights_from_disk", body)
        self._guarded("tidy up", self._remove_old)

    def close(self) -> None:
        """Nothing is held; the files stay, for engines that restart."""

    @property
    def _path(self) -> Path:
        return self._directory / f"version_{self._version:08d}"

    @property
    def _fresh(self) -> Path:
        return self._path.with_suffix(".new")

    def _make_directory(self) -> None:
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir(parents=True)

    def _complete(self) -> None:
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._weight_map}
        (self._fresh / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        (self._fresh / "config.json").write_text(json.dumps(self._hf_config, indent=1) + "\n")
        shutil.rmtree(self._path, ignore_errors=True)
        os.replace(self._fresh, self._path)

    def _remove_old(self) -> None:
        for old in sorted(self._directory.glob("version_*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def _guarded(self, what: str, action: Any) -> None:
        try:
            action()
        except OSError as error:
            raise WeightSyncError(
                f"cannot {what} the weights of version {self._version} in {self._directory}: {error.strerror or error} "
                "(weight_sync.transport disk)"
            ) from error


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
