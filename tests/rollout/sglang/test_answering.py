"""Servers of others that are waited for: all are asked at once, and those that do not answer are named."""

from __future__ import annotations

import logging
import re
import socket
import time
from contextlib import ExitStack

import pytest

from megatron_klear.rollout.sglang import StartReport, answering, start_report, wait_until_answering
from tests.rollout.sglang.conftest import StandIn

NOBODY = "http://127.0.0.1:1"


def test_servers_that_keep_silent_do_not_hide_that_others_answer(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_ANSWER_SECONDS", 1.5)
    stand_in.answers["/model_info"] = {}
    with ExitStack() as stack:
        silent = []
        for _ in range(6):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            silent.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
        began = time.monotonic()
        assert wait_until_answering([*silent, stand_in.url], 1.0, lambda: None) == silent
    assert time.monotonic() - began < 6.0, "nine seconds, were they asked one after another"


def test_how_many_answer_is_told_now_and_then(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "megatron_klear")
    monkeypatch.setattr(start_report, "_EVERY_SECONDS", 0.4)
    stand_in.answers["/model_info"] = {}
    more: list[int] = []
    report = StartReport(2, 600.0, "sglang.connect_seconds", verb="answer", on_ready=more.append)
    assert wait_until_answering([NOBODY, stand_in.url], 2.0, lambda: None, report) == [NOBODY]
    assert more == [1]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("megatron_klear")]
    assert 0 < len(told) < 6
    words = rf"1 of 2 servers answer after 0:0\d of 10:00 \(sglang.connect_seconds\); not yet: {NOBODY}"
    assert re.fullmatch(words, told[0])


def test_it_ends_when_all_answer(stand_in: StandIn) -> None:
    stand_in.answers["/model_info"] = {}
    more: list[int] = []
    report = StartReport(1, 600.0, "sglang.connect_seconds", on_ready=more.append)
    assert wait_until_answering([stand_in.url], 600.0, lambda: None, report) == []
    assert more == [1]
