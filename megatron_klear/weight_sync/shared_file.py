"""The file of shared memory that a tensor is read from; we alone remove it, whatever becomes of its readers."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_klear.weight_sync.shared_memory import SHARED_MEMORY


class SharedFile:
    """A tensor's file, and the tensor, which is kept until the file is removed.

    Torch has a file's readers count, and whoever counts down to none removes it. A reader that is killed never does, so
    that its file would stay until this process ends, or longer where another reader lives on.

    Args:
        tensor: on the CPU, and in shared memory by name already.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        _, name, _ = storage._share_filename_cpu_()
        # A count that nobody takes back. The last reader would remove the file, too, and ends where it finds none.
        storage._shared_incref()
        self._path = Path(SHARED_MEMORY, name.decode().removeprefix("/"))
        self._tensor: torch.Tensor | None = tensor

    def remove(self) -> None:
        """Remove the file: readers that have opened it can go on, and others cannot open it; again does nothing."""
        self._path.unlink(missing_ok=True)
        self._tensor = None
