"""Tables of responses on terminals of several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_klear.records import Grade
from megatron_klear.rollout.ledger import GroupFilter, LedgerReader
from megatron_klear.rollout.ledger.showing import print_group, print_responses

REASON = (
    "the comparison failed:\n TypeError: \x1b[31mno truth value of [x] < 3, " + "which goes on, " * 10 + "to its end"
)


@pytest.fixture
def reader(ledger, file, make_prompt, make_rollout):
    """One response that could not be graded."""
    [group] = ledger.reserve([(0, make_prompt("aime-2024-11"))], num_responses=1)
    ledger.save_response(group, 0, make_rollout((10, 12000), (11, 8034)))
    ledger.save_grades(group, [Grade(outcome="ungraded", reward=0.0, reason=REASON)])
    with LedgerReader(file) as reader:
        yield reader


def printed(reader, width, *, grading):
    stream = io.StringIO()
    print_responses(
        Console(file=stream, width=width), list(reader.response_rows(GroupFilter())), 40, grading=grading
    )  # fmt: skip
    return stream.getvalue()


def test_a_terminal_of_100_columns_shows_why_a_grader_failed(reader):
    text = printed(reader, 100, grading=True)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "requests" not in lines[1]
    column = lines[1].index("reason")
    reason = " ".join(line[column:].strip() for line in lines[3:6])
    assert reason.startswith("the comparison failed: TypeError: [31mno truth value of [x] < 3, which")
    assert reason.endswith("…")
    for cell in ("aime-2024-11", "ungraded", "20034"):
        assert cell in lines[3], "no other column is cut off for it"
    assert "not shown: end, versions, requests" in text
    text = printed(reader, 100, grading=False)
    assert "TypeError" not in text
    assert "10x12000" in text
    assert "not shown: reason; a terminal of 140 columns has room, and --outcome shows it" in text


@pytest.mark.parametrize("grading", [True, False])
def test_where_there_is_room_all_is_in_one_line(reader, grading):
    [line] = [line for line in printed(reader, 180, grading=grading).splitlines() if "aime" in line]
    assert "10x12000 11x8034" in line
    assert "the comparison failed: TypeError" in line


def test_a_group_has_the_reason_in_full(reader):
    stream = io.StringIO()
    group = reader.load(1)
    print_group(Console(file=stream, width=100), group, list(reader.response_rows(GroupFilter())), None)
    assert "to its end" in " ".join(stream.getvalue().split())
