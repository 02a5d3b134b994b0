"""The help text says everything about every field."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_klear.config import RunSettings, Settings, TokenizerSettings, settings_help
from megatron_klear.config.described import FIELDS, SECTIONS


@pytest.mark.parametrize("entry", ["sft", "rl"])
def test_help_lists_every_field_of_every_section(entry):
    text = settings_help(entry)
    settings = Settings(run=RunSettings(dir="r"), tokenizer=TokenizerSettings(dir="t"))
    paths = [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(settings)
        for field in dataclasses.fields(getattr(settings, section.name))
    ]
    assert len(paths) > 80
    assert re.findall(r"^  (\S+)  \[", text, re.MULTILINE) == paths


@pytest.mark.parametrize("path", list(FIELDS))
def test_every_field_has_a_help_text_and_every_number_a_bound_or_a_reason(path):
    item = FIELDS[path]
    assert len(item.help) > 10
    assert item.help.endswith(".")
    unbounded = {f"{section}.{n}" for section in ("reward", "code_reward") for n in ("correct", "wrong", "malformed")}
    if item.kind.startswith(("integer", "number")) and path not in unbounded:
        assert item.bound
    if item.kind.startswith("integer") and path != "run.seed":
        assert item.unit


def test_one_field_in_full():
    item = FIELDS["sft.epochs"]
    assert (item.kind, item.bound, item.unit, item.default) == ("integer or null", "at least 1", "epochs", "null")
    text = settings_help("sft")
    assert "  rollout.top_p  [number, above 0 and at most 1; default 1.0]\n" in text
    assert "  run.dir  [text, not empty; required]\n" in text
    assert "  packing.token_budget  [integer, at least 1; in tokens; default 32768]\n" in text


def test_sections_that_an_entry_does_not_use_are_marked():
    marked = {
        line.split(":")[0] for line in settings_help("sft").splitlines() if line.endswith("(not used by this entry)")
    }
    assert marked == {"rl", "algorithm", "scheduling"}
    assert set(SECTIONS) >= marked
