"""A description of every setting, read off a schema: for `--help`, messages and suggestions."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo

from megatron_klear.config.fields import Unit
from megatron_klear.config.schema import Entry, Settings

_NOT_USED: dict[Entry, frozenset[str]] = {"sft": frozenset({"rl", "algorithm", "scheduling"}), "rl": frozenset({"sft"})}
"""Sections that do not concern an entry (grading an evaluation after SFT still needs `reward` and `rollout`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDescription:
    """What a person needs to know about one setting.

    Attributes:
        path: dotted path.
        kind: type in words, such as `integer or null`.
        bound: allowed range, such as `at least 1`; empty when there is none.
        unit: what a number counts; empty when it has none.
        default: default as YAML; `required` when there is none.
        required: whether it must be given.
        options: allowed texts, when only some are.
        help: the field's docstring.
    """

    path: str
    kind: str
    bound: str
    unit: str
    default: str
    required: bool
    options: tuple[str, ...]
    help: str

    @property
    def expected(self) -> str:
        """Type and bound in words."""
        return f"{self.kind}, {self.bound}" if self.bound else self.kind


def describe_value(value: Any) -> str:
    """Return a value as it may stand in a message: as YAML, with its type where that could be mistaken."""
    if isinstance(value, bool) or value is None:
        return _as_yaml(value)
    if isinstance(value, str):
        return f"{value!r} (text)"
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'section'}"
    return f"{value}"


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    return str(value)


def _kind(annotation: Any) -> tuple[str, tuple[str, ...]]:
    """Return a type in words and, for a choice, its options."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        inner, options = _kind(next(arg for arg in args if arg is not type(None)))
        return (f"{inner} or null", options) if type(None) in args else (inner, options)
    if origin is Literal:
        options = tuple(str(arg) for arg in args)
        return f"one of {', '.join(options)}", options
    if origin is tuple:
        inner, options = _kind(args[0])
        return f"list of {inner}" if options else f"list of {inner}s", ()
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[annotation], ()


def _bound(metadata: list[Any]) -> str:
    """Return the allowed range in words."""
    texts = []
    for item in metadata:
        match item:
            case annotated_types.Ge(ge=limit):
                texts.append(f"at least {limit}")
            case annotated_types.Gt(gt=limit):
                texts.append(f"above {limit}")
            case annotated_types.Le(le=limit):
                texts.append(f"at most {limit}")
            case annotated_types.Lt(lt=limit):
                texts.append(f"below {limit}")
            case annotated_types.MinLen():
                texts.append("not empty")
            case _:
                pass
    return " and ".join(texts)


def _describe(path: str, info: FieldInfo) -> FieldDescription:
    kind, options = _kind(info.annotation)
    required = info.is_required()
    return FieldDescription(
        path=path,
        kind=kind,
        bound=_bound(info.metadata),
        unit=next((item.name for item in info.metadata if isinstance(item, Unit)), ""),
        default="required" if required else _as_yaml(info.get_default(call_default_factory=False)),
        required=required,
        options=options,
        help=inspect.cleandoc(info.description or ""),
    )


SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema(Generic[SettingsT]):
    """The settings of an entry, described.

    Attributes:
        sections: section name -> its dataclass, in the order of the schema.
        fields: dotted path -> description, in the same order.
        adapter: makes settings from plain values and plain values from settings.
    """

    sections: Mapping[str, type[Any]]
    fields: Mapping[str, FieldDescription]
    adapter: TypeAdapter[SettingsT]


def describe_schema(root: type[SettingsT]) -> Schema[SettingsT]:
    """Describe a dataclass whose fields are sections, each of them a dataclass of settings."""
    hints = typing.get_type_hints(root)
    sections: dict[str, type[Any]] = {f.name: hints[f.name] for f in dataclasses.fields(root)}  # type: ignore[arg-type]
    fields = {}
    for name, section in sections.items():
        assert is_pydantic_dataclass(section)
        for key, info in section.__pydantic_fields__.items():
            fields[f"{name}.{key}"] = _describe(f"{name}.{key}", info)
    return Schema(sections=sections, fields=fields, adapter=TypeAdapter(root))


TRAINING = describe_schema(Settings)
SECTIONS, FIELDS = TRAINING.sections, TRAINING.fields
"""Section name -> its dataclass, and dotted path -> description, both in the order of `Settings`."""


def settings_help(entry: Entry) -> str:
    """Return every setting of training; see `schema_help`."""
    return schema_help(TRAINING, not_used=_NOT_USED[entry])


def schema_help(schema: Schema[Any], *, not_used: Collection[str] = ()) -> str:
    """Return every setting with its type, range, default, unit and meaning, section by section.

    Args:
        schema: the settings.
        not_used: sections to be marked as not used.
    """
    lines = []
    for name, section in schema.sections.items():
        unused = "  (not used by this entry)" if name in not_used else ""
        lines += [f"{name}: {(inspect.getdoc(section) or '').splitlines()[0]}{unused}"]
        for path, item in schema.fields.items():
            if path.startswith(f"{name}."):
                facts = [item.expected, item.unit and f"in {item.unit}"]
                facts.append("required" if item.required else f"default {item.default}")
                lines.append(f"  {path}  [{'; '.join(fact for fact in facts if fact)}]")
                lines.extend(f"      {line}" for line in item.help.splitlines())
        lines.append("")
    return "\n".join(lines)
