"""Rollouts to read: what is appended is read back; bad rows are refused whole."""

from __future__ import annotations

import math

import pytest

from megatron_klear.observe.examples import EXAMPLE_FIELDS, EXAMPLES_FILE, append_examples, read_examples

ROW = {
    "step": 3, "prompt_id": "sum/1", "prompt": "1 + 1?", "reference": "2", "response": "<think>\u2028é</think>\n2",
    "outcome": "correct", "reward": 1.0, "reason": "equal", "finish_reason": "stop",
}  # fmt: skip


def test_rows_come_back_in_order_with_their_line_breaks(tmp_path) -> None:
    assert append_examples(tmp_path, [ROW, {**ROW, "step": 4, "reward": 1}]) == 2
    assert append_examples(tmp_path, [{**ROW, "step": 5}]) == 1
    assert read_examples(tmp_path) == [ROW, {**ROW, "step": 4}, {**ROW, "step": 5}]


def test_no_rows_make_no_file(tmp_path) -> None:
    assert append_examples(tmp_path, []) == 0
    assert read_examples(tmp_path) == []
    assert not (tmp_path / EXAMPLES_FILE).exists()


@pytest.mark.parametrize("name", sorted(EXAMPLE_FIELDS))
def test_a_missing_field_is_named_and_nothing_is_written(tmp_path, name) -> None:
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        append_examples(tmp_path, [ROW, row])
    assert not (tmp_path / EXAMPLES_FILE).exists()


def test_wrong_types_and_infinite_rewards_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="response is list, must be str"):
        append_examples(tmp_path, [{**ROW, "response": ["2"]}])
    with pytest.raises(ValueError, match="reward is nan"):
        append_examples(tmp_path, [{**ROW, "reward": math.nan}])


def test_text_that_is_not_unicode_survives_as_escapes(tmp_path) -> None:
    append_examples(tmp_path, [{**ROW, "response": "half a pair \ud83d"}])
    assert read_examples(tmp_path)[0]["response"].startswith("half a pair ")


def test_damaged_lines_are_left_out(tmp_path) -> None:
    append_examples(tmp_path, [ROW])
    with open(tmp_path / EXAMPLES_FILE, "a") as file:
        file.write('{"step": 9, "prompt_id": "x"}\n{"step": 10')
    assert read_examples(tmp_path) == [ROW]
