"""The command line of every entry: `[--check] CONFIG.yaml [MORE.yaml ...] [section.field=value ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron_klear.config.described import Schema, schema_help, settings_help
from megatron_klear.config.loading import load_settings
from megatron_klear.config.outlook import outlook
from megatron_klear.config.schema import Entry, Settings
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError, KlearError

_PURPOSE: dict[Entry, str] = {
    "sft": "Fine-tune on long chains of thought (Eq. 8).",
    "rl": "Improve a model by reinforcement learning on problems whose answers can be verified (GPPO).",
}

LoadedT = TypeVar("LoadedT")


def parse_command_line(
    argv: Sequence[str],
    entry: Entry,
    world_size: int | None = None,
    more_outlook: Callable[[Settings, int], str] | None = None,
) -> Settings:
    """Turn an entry's arguments into settings; or print help, problems, or with `--check` the outlook, and leave.

    Args:
        argv: arguments without the program's name.
        entry: which entry is asking.
        world_size: number of ranks; by default the environment variable WORLD_SIZE that torchrun sets, or 1.
        more_outlook: further lines of the outlook, of settings and number of ranks; what it raises for people are
            problems.

    Raises:
        SystemExit: 0 after help and after `--check` of good settings, 2 after problems. Help is printed by the first
            rank, problems by the first rank of every machine: a file may be missing on one of them only.
    """
    rank = os.environ.get("RANK", "0")
    arguments = "CONFIG.yaml [MORE.yaml ...] [section.field=value ...]"
    usage = f"usage: python -m megatron_klear.train_{entry} [--check] {arguments}"
    if any(argument in ("-h", "--help") for argument in argv):
        if rank == "0":
            print(f"{usage}\n       torchrun --nproc-per-node N -m megatron_klear.train_{entry} ...\n")
            print("--check judges the settings, says what would be done, and leaves: 0 good, 2 not.")
            print("It sees as many ranks as the environment variable WORLD_SIZE says (1 without it).\n")
            print("Further files are laid over the first in the order given, and so are settings.\n")
            print(f"{_PURPOSE[entry]}\nValues are YAML: data.prompts=[a.jsonl,b.jsonl] model.hf_dir=null\n")
            print(settings_help(entry))
        raise SystemExit(EXIT_DONE)

    def load(path: str, overrides: Sequence[str]) -> tuple[Settings, int]:
        size = world_size or _world_size()
        return load_settings(path, overrides, entry=entry, world_size=size), size

    settings, size = _loaded(argv, usage, load)
    if "--check" in argv:
        if rank == "0":
            try:
                more = more_outlook(settings, size) if more_outlook is not None else ""
            except KlearError as error:
                print(error, file=sys.stderr)
                raise SystemExit(error.exit_status) from None
            print(outlook(settings, entry=entry, world_size=size) + more, end="")
        raise SystemExit(EXIT_DONE)
    return settings


def parse_tool_arguments(
    argv: Sequence[str],
    *,
    module: str,
    purpose: str,
    schema: Schema[Any],
    load: Callable[[str, Sequence[str]], LoadedT],
) -> LoadedT:
    """Turn the arguments of an entry that runs in one process into its settings; or print help or problems, and leave.

    Args:
        argv: arguments without the program's name.
        module: name of the entry below `megatron_klear`.
        purpose: what it does, for `--help`.
        schema: its settings.
        load: makes settings of the file's path and the overrides.

    Raises:
        SystemExit: 0 after help and after `--check` of good settings, 2 after problems.
    """
    usage = f"usage: python -m megatron_klear.{module} [--check] CONFIG.yaml [section.field=value ...]"
    if any(argument in ("-h", "--help") for argument in argv):
        print(f"{usage}\n\n{purpose}\n\n--check judges the settings and leaves: 0 good, 2 not.")
        print(f"Values are YAML: run.dir=out a.list=[x,y] a.b=null\n\n{schema_help(schema)}")
        raise SystemExit(EXIT_DONE)
    settings = _loaded(argv, usage, load)
    if "--check" in argv:
        print("the settings are good")
        raise SystemExit(EXIT_DONE)
    return settings


def _loaded(argv: Sequence[str], usage: str, load: Callable[[str, Sequence[str]], LoadedT]) -> LoadedT:
    """Load the settings that the arguments name, or print all problems and leave."""
    argv = [argument for argument in argv if argument != "--check"]
    try:
        flags = [argument for argument in argv if argument.startswith("-")]
        if flags:
            raise ConfigError([f"{flag}: unknown option; settings are given as section.field=value" for flag in flags])
        if not argv or "=" in argv[0]:
            raise ConfigError([f"CONFIG.yaml: the settings file must come first ({usage})"])
        return load(argv[0], argv[1:])
    except ConfigError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", rank) == "0":
            print(error if rank == "0" else f"[rank {rank}] {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError([f"WORLD_SIZE: the environment variable is {text!r}, expected a positive integer"])
    return int(text)
