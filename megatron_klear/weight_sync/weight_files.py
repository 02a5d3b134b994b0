"""Sets of weights in files that an engine can load: one directory per version, complete or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync.buckets import Bucket


class WeightFiles:
    """Safetensors files, one per bucket, with the index and config.json that make them a model directory.

    Args:
        directory: gets one directory per version.
        hf_config: the model's config.json, written beside the weights.
        keep: versions that stay.
    """

    def __init__(self, directory: Path, hf_config: Mapping[str, Any], *, keep: int) -> None:
        self._directory, self._hf_config, self._keep = directory.absolute(), dict(hf_config), keep
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        self._version = -1
        self._complete_ones: list[Path] = []

    @property
    def newest(self) -> Path | None:
        """Directory of the version that was completed last; None before the first."""
        return self._complete_ones[-1] if self._complete_ones else None

    def begin(self, version: int) -> None:
        """Make an empty directory for the version, and room for it: weights of earlier lives of the run are removed.

        Raises:
            WeightSyncError: it cannot be written, and nothing is left of it; so do all methods.
        """
        self._version, self._weight_map, self._total_bytes = version, {}, 0
        self._guarded("make a directory for", self._make_directory)

    def write(self, bucket: Bucket) -> None:
        """Write a bucket's file."""
        name = f"model-{len(set(self._weight_map.values())) + 1:05d}.safetensors"
        self._weight_map |= dict.fromkeys(bucket.names, name)
        self._total_bytes += bucket.num_bytes
        tensors = {n: t.cpu() for n, t in zip(bucket.names, bucket.tensors, strict=True)}
        self._guarded("write", lambda: save_file(tensors, self._fresh / name, metadata={"format": "pt"}))

    def complete(self) -> Path:
        """Give the directory its name, and return it."""
        self._guarded("complete", self._complete)
        path = self._path
        self._complete_ones = [*(p for p in self._complete_ones if p != path), path][-self._keep :]
        return path

    def remove_old(self) -> None:
        """Remove what is not kept, leftovers of earlier lives of the run included, whatever their version."""
        for old in self._not_kept():
            shutil.rmtree(old, ignore_errors=True)

    @property
    def _path(self) -> Path:
        return self._directory / f"version_{self._version:08d}"

    @property
    def _fresh(self) -> Path:
        return self._path.with_suffix(".new")

    def _not_kept(self) -> list[Path]:
        return [path for path in self._directory.glob("version_*") if path not in self._complete_ones]

    def _make_directory(self) -> None:
        for old in self._not_kept():
            # No life loads weights of another. A server of others may name what it loaded last as its model, though,
            # and every life reads that config.json when it connects: it stays until another set is complete.
            for weights in old.glob("*.safetensors"):
                with contextlib.suppress(OSError):
                    weights.unlink()
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir(parents=True)

    def _complete(self) -> None:
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._weight_map}
        (self._fresh / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        (self._fresh / "config.json").write_text(json.dumps(self._hf_config, indent=1) + "\n")
        shutil.rmtree(self._path, ignore_errors=True)
        os.replace(self._fresh, self._path)

    def _guarded(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # safetensors has exceptions of its own for a full disk
            shutil.rmtree(self._fresh, ignore_errors=True)  # which stays full otherwise
            text = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
            raise WeightSyncError(
                f"cannot {what} the weights of version {self._version} in {self._directory}: {text} "
                "(weight_sync.transport, weight_sync.keep_on_disk)"
            ) from error
