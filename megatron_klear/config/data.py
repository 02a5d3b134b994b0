"""Settings of the input files, and which files they name."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.fields import SECTION, Positive, Tokens, Unit

INDEX_FOLDER = "klear_index"
"""Where the tokens of `data.sft` lie, beside its first file; patterns do not reach into it."""

_ROW_FILES = (".jsonl", ".parquet")

BIN_MULTIPLE = 32
"""Sequences in the bins of `sft.batch_bins` are padded to a multiple of this: bins fit any `parallel.cp` up to 16."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataSettings:
    """Input files, JSON lines or (SFT rows) Parquet, and how they are read."""

    sft: tuple[str, ...] = ()
    """Rows {"id", "messages": [{"role", "content"}, ...], "source"?} to fine-tune on: files, directories of them, or
    patterns such as shards/*.parquet."""

    prompts: tuple[str, ...] = ()
    """Files of rows {"id", "domain": "math" | "code", "messages": [...], "reference"} to reinforce on."""

    heldout: tuple[str, ...] = ()
    """Files of prompt rows never trained on, for accuracy during and after training."""

    max_prompt_tokens: Tokens = 2048
    """Longest prompt, chat template included."""

    oversize: Literal["refuse", "drop"] = "refuse"
    """What happens to a prompt over `data.max_prompt_tokens`: stop before training, or leave it out and count it."""

    shuffle: bool = True
    """Visit the rows of an epoch in a random order drawn from `run.seed`; false keeps the order of the files."""

    index_dir: Annotated[str | None, Field(min_length=1)] = None
    """Where the tokens of `data.sft` are kept; null is klear_index beside its first file. All nodes must see it."""

    tokenize_processes: Annotated[int | None, Unit("processes"), Positive] = None
    """Processes that tokenize `data.sft`; null takes the CPUs that this process may use."""

    max_reject_share: Annotated[float, Unit("fraction of rows"), Field(ge=0, le=1)] = 1.0
    """Largest share of `data.sft` that may be unusable; more are refused before training, 1 goes on with all others.
    Such rows are counted, warned of when they are over 1 %, and listed in the index's rejects.jsonl."""

    loader: Literal["auto", "plain", "dali"] = "auto"
    """What reads and packs the microbatches of SFT: NVIDIA DALI (processes of its own), or a plain thread, to the same
    bytes; auto takes DALI where it is installed and there is a GPU."""

    loader_processes: Annotated[int, Unit("processes"), Positive] = 2
    """Processes per rank that read and pack for DALI."""

    prefetch: Annotated[int, Unit("microbatches"), Positive] = 4
    """Microbatches that are read and packed ahead."""


def row_files(entries: Sequence[str]) -> list[str]:
    """The files that `data.sft` names, directories and patterns opened up in the order of names.

    What names nothing stays as it is, so that `entry_problems` can say so.
    """
    files: list[str] = []
    for entry in entries:
        if Path(entry).is_dir():
            files += sorted(str(file) for file in Path(entry).iterdir() if file.suffix in _ROW_FILES)
        elif glob.has_magic(entry) and not Path(entry).exists():
            found = sorted(file for file in glob.glob(entry, recursive=True) if INDEX_FOLDER not in Path(file).parts)
            files += found or [entry]
        else:
            files.append(entry)
    return files


def entry_problems(entries: Sequence[str]) -> Iterator[str]:
    """What is wrong with the entries of `data.sft`, file by file."""
    for entry in entries:
        if Path(entry).is_dir() and not row_files([entry]):
            yield f"directory {entry} holds no {' or '.join(_ROW_FILES)} file"
    yield from file_problems(row_files(entries))


def file_problems(files: Sequence[str]) -> Iterator[str]:
    """What is wrong with files that must be there and hold something."""
    for name in files:
        file = Path(name)
        if not file.exists():
            yield f"no file {name}"
        elif not file.is_file():
            yield f"{name} is not a file"
        elif file.stat().st_size == 0:
            yield f"{name} is empty"
        elif not name.isascii() and name.encode("utf-8", "replace") != os.fsencode(name):
            yield f"the name {name!r} is not UTF-8; rename the file"
    for name in sorted({name for name in files if files.count(name) > 1}):
        yield f"{name} is named more than once"


def dali_installed() -> bool:
    """Whether NVIDIA DALI is there; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
