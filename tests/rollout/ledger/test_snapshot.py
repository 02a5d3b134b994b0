"""What is read while the run writes is of one moment."""

from __future__ import annotations

import json

import pytest

from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.rollouts import main


def test_reads_in_a_snapshot_see_one_moment(ledger, file, advance):
    advance(ledger, "a", "graded")
    with LedgerReader(file) as reader:
        with reader.snapshot():
            assert reader.states() == {"graded": 1}
            advance(ledger, "b", "trained")
            assert reader.states() == {"graded": 1}
            assert reader.steps() == []
            assert reader.events() == []
        assert reader.states() == {"graded": 1, "trained": 1}
        with pytest.raises(ZeroDivisionError), reader.snapshot():
            raise ZeroDivisionError
        with reader.snapshot():
            assert reader.steps() == [1]


def test_an_export_is_not_changed_by_what_is_written_meanwhile(ledger, file, advance, monkeypatch):
    for name in ("a", "b"):
        advance(ledger, name, "trained")

    def decode(token_ids):
        ledger.prune(1)  # after the rows and the first group were read
        return str(len(token_ids))

    monkeypatch.setattr("megatron_klear.rollout.ledger.text.run_decoder", lambda run_dir: decode)
    out = file.with_name("out.jsonl")
    assert main([str(file.parent), "export", str(out)]) == 0
    assert [json.loads(line)["response"] for line in out.read_text().splitlines()] == ["4", "5", "4", "5"]


@pytest.mark.parametrize(
    ("arguments", "first_read", "told"),
    [
        (["list"], "group_rows", "groups: 1 graded; 1 shown"),
        (["show", "a", "--ids"], "group_rows", "response 1: wrong -1.00"),
        (["check"], "states", "steps: none trained, none promised"),
    ],
)
def test_what_is_shown_is_of_one_moment(ledger, file, advance, monkeypatch, capsys, arguments, first_read, told):
    group = advance(ledger, "a", "graded")
    read = getattr(LedgerReader, first_read)

    def read_and_write(reader, *args, **kwargs):
        found = read(reader, *args, **kwargs)
        if ledger.states() == {"graded": 1}:
            ledger.replace_responses(group, {}, why="other settings")
            advance(ledger, "b", "trained")
        return found

    monkeypatch.setattr(LedgerReader, first_read, read_and_write)
    assert main([str(file.parent), *arguments]) == 0
    assert told in capsys.readouterr().out
    assert ledger.states() == {"reserved": 1, "trained": 1}, "it was written"
