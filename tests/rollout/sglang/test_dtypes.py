"""The data type of a server's weights, where it was started without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.rollout.sglang.dtypes import served_dtype


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ({"dtype": "bfloat16"}, "", "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "", "bfloat16"),
        ({"torch_dtype": "float32"}, "", "float16"),
        ({}, "{}", "float16"),
        ({"dtype": None, "torch_dtype": "float16"}, "", "float16"),
        ({"dtype": "float32"}, '{"dtype": "bfloat16"}', "bfloat16"),
    ],
)
def test_auto_is_what_sglang_makes_of_the_models_config(
    config: dict[str, Any], overrides: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    server = {"dtype": "auto", "json_model_override_args": overrides}
    assert served_dtype(server, {"model_path": str(tmp_path)}) == expected


def test_what_was_asked_for_is_taken_by_torchs_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    model = {"model_path": str(tmp_path)}
    asked = ("float32", "half", "float", "bfloat16")
    assert [served_dtype({"dtype": d}, model) for d in asked] == ["float32", "float16", "float32", "bfloat16"]


@pytest.mark.parametrize("content", ["", "[]", None])
def test_where_nothing_tells_it_stays_open(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert served_dtype({"dtype": "auto"}, {"model_path": str(tmp_path)}) == "auto"
    assert served_dtype({}, {}) == "auto"
