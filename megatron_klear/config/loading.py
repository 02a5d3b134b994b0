"""Settings from a YAML file and `a.b=c` overrides; all problems together, none of it importing torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from megatron_klear.config.checks import find_data_problems, find_problems
from megatron_klear.config.described import TRAINING, Schema, SettingsT, describe_value
from megatron_klear.config.schema import Entry, Settings
from megatron_klear.errors import ConfigError

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

    def together(settings: Settings, broken: frozenset[str]) -> list[str]:
        return find_problems(settings, entry=entry, world_size=world_size, broken=broken)

    settings = load_schema(TRAINING, path, overrides, together)
    sizes = dataclasses.asdict(settings.architecture)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **sizes))


def load_data_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read settings for tokenizing `data.sft` alone: the model need not be there, and no layout is judged.

    Raises:
        ConfigError: with every problem found, each starting with the dotted path of the setting.
    """
    return load_schema(TRAINING, path, overrides, lambda settings, broken: find_data_problems(settings, broken=broken))


def load_schema(
    schema: Schema[SettingsT],
    path: str | Path,
    overrides: Sequence[str],
    find_problems: Callable[[SettingsT, frozenset[str]], Iterable[str]],
    *,
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> SettingsT:
    """Read, override and check the settings of any entry.

    Args:
        schema: what there is to set.
        path: YAML file.
        overrides: `section.field=value` texts; values are YAML.
        find_problems: given settings that are valid one by one, and the dotted paths whose bad values were replaced by
            defaults: problems that show only when settings are seen together.
        presets: by the value of `run.preset`, what is set where neither file nor overrides say anything.

    Raises:
        ConfigError: with every problem found, each starting with the dotted path of the setting.
    """
    problems: list[str] = []
    tree = _known_keys(schema, _read(Path(path), overrides), problems)
    for section, values in (presets or {}).get(str(tree["run"].get("preset")), {}).items():
        tree[section] = {**values, **tree[section]}
    settings, broken = _validated(schema, tree, problems)
    problems.extend(find_problems(settings, broken))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return settings


def dump_settings(settings: Any) -> str:
    """Return YAML of every setting, from which equal settings are loaded."""
    values = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(values)))


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


def _known_keys(schema: Schema[Any], content: Mapping[str, Any], problems: list[str]) -> _Tree:
    """Return the known fields of every section, absent sections as empty; note all other keys as problems."""
    tree: _Tree = {name: {} for name in schema.sections}
    for name, value in content.items():
        if name not in schema.sections:
            problems.append(f"{name}: unknown section{_suggestion(schema, name, value)}")
        elif isinstance(value, dict):
            for key, item in value.items():
                path = f"{name}.{key}"
                if path in schema.fields and item != _MISSING:
                    tree[name][str(key)] = item
                elif path in schema.fields:
                    if not schema.fields[path].required:  # of those that are, it is said anyway
                        problems.append(f"{path}: is ???, so it must be given")
                else:
                    problems.append(f"{name}.{key}: unknown setting{_suggestion(schema, path, item)}")
        elif value is not None:
            problems.append(f"{name}: got {describe_value(value)}, expected a section with settings below it")
    return tree


def _suggestion(schema: Schema[Any], path: str, value: Any) -> str:
    """Return `; did you mean ...?` with the most similar section or setting, or nothing."""
    section, _, key = path.rpartition(".")
    candidates: list[str] = []
    if section:
        siblings = [p.partition(".")[2] for p in schema.fields if p.startswith(f"{section}.")]
        candidates += [f"{section}.{name}" for name in difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)]
    elif isinstance(value, dict):
        candidates += difflib.get_close_matches(key, schema.sections, n=1, cutoff=0.5)
    if not candidates:
        candidates += [p for p in schema.fields if p.endswith(f".{key}")]
    if not candidates:
        candidates += difflib.get_close_matches(path, schema.fields, n=1, cutoff=0.7)
    if not candidates and not section:
        candidates += difflib.get_close_matches(key, schema.sections, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(candidates[:3])}?" if candidates else "; --help lists all settings"


def _validated(schema: Schema[SettingsT], tree: _Tree, problems: list[str]) -> tuple[SettingsT, frozenset[str]]:
    """Check every value by itself.

    Returns:
        Settings with a default in place of every bad value, so that the other checks can go on, and the
        dotted paths of the bad values.
    """
    try:
        return schema.adapter.validate_json(json.dumps(tree, default=str)), frozenset()
    except ValidationError as error:
        broken = set()
        for detail in error.errors(include_url=False):
            path = ".".join(str(part) for part in detail["loc"][:2])
            broken.add(path)
            problems.append(f"{_dotted(detail['loc'])}: {_explain(schema, path, dict(detail))}")
    repaired = {name: dict(fields) for name, fields in tree.items()}
    for path in broken:
        section, _, key = path.partition(".")
        repaired[section].pop(key, None)
        if schema.fields[path].required:
            repaired[section][key] = (*schema.fields[path].options, ".")[0]
    return schema.adapter.validate_json(json.dumps(repaired, default=str)), frozenset(broken)


def _dotted(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _explain(schema: Schema[Any], path: str, detail: dict[str, Any]) -> str:
    """Say what a setting holds and what it may hold."""
    if detail["type"] == "missing":
        return f"required ({schema.fields[path].help.splitlines()[0]})"
    got = describe_value(detail["input"])
    if detail["type"] == "literal_error":
        options = schema.fields[path].options
        close = difflib.get_close_matches(str(detail["input"]), options, n=1)
        return f"got {got}, allowed: {', '.join(options)}" + (f"; did you mean {close[0]}?" if close else "")
    hint = f"; write [{detail['input']}]" if detail["type"] == "tuple_type" and isinstance(detail["input"], str) else ""
    return f"got {got}, expected {schema.fields[path].expected}{hint}"
