"""Ranks are named with what they were last seen doing."""

from __future__ import annotations

from megatron_klear.observe import Heartbeat, whereabouts


def test_longest_silent_rank_comes_first_and_missing_ones_before_it(tmp_path, monkeypatch):
    clock = iter([100.0, 160.0, 165.0])
    monkeypatch.setattr("megatron_klear.observe.heartbeat.time.time", lambda: next(clock))
    Heartbeat(tmp_path, 2).beat(7, "train")
    Heartbeat(tmp_path, 0).beat(8, "generate")
    assert whereabouts(tmp_path, 3) == [
        "rank 1: never reported",
        "rank 2: in step 7, train, no news for 65 s",
        "rank 0: in step 8, generate, no news for 5 s",
    ]


def test_stopped_while_writing_keeps_the_note_before(tmp_path):
    heart = Heartbeat(tmp_path, 0)
    heart.beat(4, "train")
    (tmp_path / "logs" / "rank_00000.new").write_text('{"step": 5, "pha')
    assert whereabouts(tmp_path, 1)[0].startswith("rank 0: in step 4, train, no news for")


def test_unreadable_note_counts_as_never_reported(tmp_path):
    Heartbeat(tmp_path, 0).beat(1, "train")
    (tmp_path / "logs" / "rank_00000.json").write_text('{"step": 1')
    assert whereabouts(tmp_path, 1) == ["rank 0: never reported"]
