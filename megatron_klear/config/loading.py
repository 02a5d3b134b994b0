"""Settings from a YAML file and `a.b=c` overrides; all problems together, none of it importing torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from megatron_klear.config.checks import find_problems
from megatron_klear.config.described import FIELDS, SECTIONS, describe_value
from megatron_klear.config.schema import Entry, Settings
from megatron_klear.errors import ConfigError

_ADAPTER: TypeAdapter[Settings] = TypeAdapter(Settings)
_Tree = dict[str, dict[str, Any]]
_MISSING = "???"
"""OmegaConf's mark of a value that whoever uses a settings file must give."""


def load_settings(path: str | Path, overrides: Sequence[str] = (), *, entry: Entry, world_size: int) -> Settings:
    """Read, override and check settings.

    Args:
        path: YAML file.
        overrides: laid over it in this order: `section.field=value` texts, values in YAML, and paths of YAML files.
        entry: which entry is to run; what it does not use is only checked by itself.
        world_size: number of ranks.

    Returns:
        Settings that can work, with all sizes of the model filled in.

    Raises:
        ConfigError: with every problem found, each starting with the dotted path of the setting.
    """
    problems: list[str] = []
    tree = _known_keys(_read(Path(path), overrides), problems)
    settings, broken = _validated(tree, problems)
    if settings is not None:
        problems.extend(find_problems(settings, entry=entry, world_size=world_size, broken=broken))
    if problems or settings is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    sizes = dataclasses.asdict(settings.architecture)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **sizes))


def dump_settings(settings: Settings) -> str:
    """Return YAML of every setting, from which `load_settings` makes equal settings."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(_ADAPTER.dump_python(settings, mode="json"))))


def _escaped(value: Any) -> Any:
    """Protect texts that OmegaConf would read as `${...}` references."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read the file, lay the overrides over it and resolve `${...}`.

    Raises:
        ConfigError: unreadable file or malformed override (checks cannot go on without them).
    """
    merged: Any = _read_file(path)
    problems = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        over_it = _read_file(Path(text)) if is_settings_file(text) else None
        if over_it is None and (not equals or not key.strip()):
            problems.append(f"{text}: expected an override of the form section.field=value, or a .yaml file")
            continue
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([text]) if over_it is None else over_it)
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(f"{key}: cannot use the override {text!r}: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError(problems)
    try:
        content = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def is_settings_file(argument: str) -> bool:
    """Whether an argument among overrides names a file of settings to lay over those before it."""
    return "=" not in argument and Path(argument).suffix in (".yaml", ".yml")


def _read_file(path: Path) -> DictConfig:
    try:
        content: Any = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError([f"{path}: cannot read the settings file: {error.strerror or error}"]) from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(content, DictConfig):
        raise ConfigError([f"{path}: holds a list, expected sections such as `run:`"])
    return content


def _known_keys(content: Mapping[str, Any], problems: list[str]) -> _Tree:
    """Return the known fields of every section, absent sections as empty; note all other keys as problems."""
    tree: _Tree = {name: {} for name in SECTIONS}
    for name, value in content.items():
        if name not in SECTIONS:
            problems.append(f"{name}: unknown section{_suggestion(name, value)}")
        elif isinstance(value, dict):
            for key, item in value.items():
                path = f"{name}.{key}"
                if path in FIELDS and item != _MISSING:
                    tree[name][str(key)] = item
                elif path in FIELDS:
                    if not FIELDS[path].required:  # of those that are, it is said anyway
                        problems.append(f"{path}: is ???, so it must be given")
                else:
                    problems.append(f"{name}.{key}: unknown setting{_suggestion(f'{name}.{key}', item)}")
        elif value is not None:
            problems.append(f"{name}: got {describe_value(value)}, expected a section with settings below it")
    return tree


def _suggestion(path: str, value: Any) -> str:
    """Return `; did you mean ...?` with the most similar section or setting, or nothing."""
    section, _, key = path.rpartition(".")
    candidates: list[str] = []
    if section:
        siblings = [p.partition(".")[2] for p in FIELDS if p.startswith(f"{section}.")]
        candidates += [f"{section}.{name}" for name in difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)]
    elif isinstance(value, dict):
        candidates += difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.5)
    if not candidates:
        candidates += [p for p in FIELDS if p.endswith(f".{key}")]
    if not candidates:
        candidates += difflib.get_close_matches(path, FIELDS, n=1, cutoff=0.7)
    if not candidates and not section:
        candidates += difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(candidates[:3])}?" if candidates else "; --help lists all settings"


def _validated(tree: _Tree, problems: list[str]) -> tuple[Settings | None, frozenset[str]]:
    """Check every value by itself.

    Returns:
        Settings with a default in place of every bad value, so that the other checks can go on, and the
        dotted paths of the bad values.
    """
    try:
        return _ADAPTER.validate_json(json.dumps(tree, default=str)), frozenset()
    except ValidationError as error:
        broken = set()
        for detail in error.errors(include_url=False):
            path = ".".join(str(part) for part in detail["loc"][:2])
            broken.add(path)
            problems.append(f"{_dotted(detail['loc'])}: {_explain(path, dict(detail))}")
    repaired = {name: dict(fields) for name, fields in tree.items()}
    for path in broken:
        section, _, key = path.partition(".")
        repaired[section].pop(key, None)
        if FIELDS[path].required:
            repaired[section][key] = "."
    return _ADAPTER.validate_json(json.dumps(repaired, default=str)), frozenset(broken)


def _dotted(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _explain(path: str, detail: dict[str, Any]) -> str:
    """Say what a setting holds and what it may hold."""
    if detail["type"] == "missing":
        return f"required ({FIELDS[path].help.splitlines()[0]})"
    got = describe_value(detail["input"])
    if detail["type"] == "literal_error":
        options = FIELDS[path].options
        close = difflib.get_close_matches(str(detail["input"]), options, n=1)
        return f"got {got}, allowed: {', '.join(options)}" + (f"; did you mean {close[0]}?" if close else "")
    hint = f"; write [{detail['input']}]" if detail["type"] == "tuple_type" and isinstance(detail["input"], str) else ""
    return f"got {got}, expected {FIELDS[path].expected}{hint}"
