"""A server that ends between its start and the first question about its model: the run names it and shows its log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    assert "sglang.urls" not in output
    assert not servers_of(tmp_path / "dying")
