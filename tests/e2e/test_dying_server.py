"""Servers that are there and cannot be used: one ends when it is asked about its model, one is of another version."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served_runs import CONFIG, servers_of

DYING = """#!{python}
import http.server, json, os, sys

option = lambda name: sys.argv[sys.argv.index(name) + 1]


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/server_info":
            print("CUDA error: an illegal memory access", flush=True)
            os._exit(134)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"data": [{{"id": option("--served-model-name")}}]}}).encode())


http.server.HTTPServer((option("--host"), int(option("--port"))), Page).serve_forever()
"""


OLD = """#!{python}
import http.server, json, os, shutil, signal, sys

option = lambda name: sys.argv[sys.argv.index(name) + 1]


def ended(*_):
    shutil.copy(os.environ["KLEAR_STATUS_FILE"], os.environ["KLEAR_STATUS_FILE"] + ".seen")
    os._exit(0)


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        name = option("--served-model-name")
        self.wfile.write(json.dumps({{"data": [{{"id": name}}], "version": "0.4.0"}}).encode())


signal.signal(signal.SIGTERM, ended)
http.server.HTTPServer((option("--host"), int(option("--port"))), Page).serve_forever()
"""


def test_a_start_that_fails_is_told_before_its_servers_are_closed(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing may take longer than whoever started the run leaves it: a job would be begun again for nothing."""
    monkeypatch.setenv("KLEAR_STATUS_FILE", str(tmp_path / "status"))
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(OLD.format(python=sys.executable))
    python.chmod(0o755)
    launch = start(
        "train_rl", CONFIG, [*rl_overrides("old"), "rollout.engine=sglang", f"sglang.venv={tmp_path / 'venv'}"]
    )
    assert launch.wait() == [2, 2], launch.output()
    assert "0.4.0" in launch.output()
    assert (tmp_path / "status.seen").read_text() == (tmp_path / "status").read_text() == "2\n"


def test_a_server_that_ends_when_it_was_ready_is_no_mistake_of_the_settings(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], tmp_path: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(DYING.format(python=sys.executable))
    python.chmod(0o755)
    overrides = [*rl_overrides("dying"), "rollout.engine=sglang", f"sglang.venv={tmp_path / 'venv'}"]
    launch = start("train_rl", CONFIG, overrides)
    assert launch.wait() == [1, 1], launch.output()
    output = launch.output()
    assert "SGLang server 0 ended with status 134 as soon as it was ready; the end of " in output
    assert "CUDA error: an illegal memory access" in output
    assert re.search(r"starting 1 SGLang server on this machine: port \d+ \(found free\), log .*engine_0.log, ", output)
    assert "start engines 1/1" in output
    assert "sglang.urls" not in output
    assert not servers_of(tmp_path / "dying")


def test_servers_of_others_that_do_not_answer_in_time_are_named_together(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]]
) -> None:
    urls = "sglang.urls=[http://127.0.0.1:1,http://127.0.0.1:2]"
    launch = start("train_rl", CONFIG, [*rl_overrides("no"), "rollout.engine=sglang", urls, "sglang.connect_seconds=2"])
    assert launch.wait() == [2, 2], launch.output()
    output, two = launch.output(), "http://127.0.0.1:1, http://127.0.0.1:2"
    assert f"waiting up to 0:02 (sglang.connect_seconds) for 2 servers at sglang.urls: {two}" in output
    assert f"2 of 2 servers at sglang.urls do not answer after 0:02 (sglang.connect_seconds): {two}" in output
