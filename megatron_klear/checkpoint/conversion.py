"""What both directions of a conversion share: the result, number formats, and that it happens wholly or not at all."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_klear.errors import CheckpointError

HF_FILES = "hf_files"
"""Folder of a checkpoint with the config, tokenizer and generation files that its weights came with."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What weights can be converted to; by default they keep the format that they have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    Attributes:
        out: the checkpoint or Hugging Face directory that was written.
        source: what was read.
        num_tensors: Hugging Face tensors.
        num_bytes: size of the weights that were written.
        notes: what the user should know about the result.
    """

    out: Path
    source: Path
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()


def total_size(directory: Path, names: Iterable[str]) -> int:
    """Bytes of those of the named files that exist."""
    return sum((directory / name).stat().st_size for name in names if (directory / name).is_file())


@contextlib.contextmanager
def all_or_nothing(hidden: Path, num_bytes: int) -> Iterator[None]:
    """Make a hidden directory to write to, and remove it, with the parents made for it, if the writing fails.

    Raises:
        CheckpointError: there is not enough space, or the system refused to write.
    """
    made = [parent for parent in hidden.parents if not parent.exists()]
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        free = shutil.disk_usage(hidden).free
        if math.ceil(num_bytes * 1.01) > free:
            raise OSError(f"{num_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{hidden.parent}: writing failed, nothing was kept: {error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()  # not those that hold something: the conversion succeeded
