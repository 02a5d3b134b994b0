"""Servers that do not start say why, and what is set wrong is named."""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.conformance.compare import architecture
from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.model import hf_config
from megatron_klear.records import Prompt
from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang import Expected, FleetPlace, ServerFleet, SglangEngine
from megatron_klear.rollout.sglang import fleet as module
from megatron_klear.weight_sync import EngineGroup
from tests.rollout.sglang.conftest import StandIn


def fake_environment(folder: Path, script: str) -> str:
    """A virtual environment whose Python is a shell script."""
    (folder / "venv" / "bin").mkdir(parents=True)
    python = folder / "venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return str(folder / "venv")


def fleet(folder: Path, place: FleetPlace | None = None, weights: Path | None = None, **settings: Any) -> ServerFleet:
    shape: dict[str, Any] = {"dtype": "float32", "on_cpu": True, "batch_responses": 4, "longest_sequence": 64}
    known = SglangSettings(**settings)
    return ServerFleet(known, {"model_type": "qwen3"}, folder / "run", weights=weights, place=place, **shape)


def test_only_servers_that_quantise_are_shown_weights(tmp_path: Path) -> None:
    """And none of an earlier life, whose model had more files."""
    weights, folder = tmp_path / "hf", tmp_path / "run" / "logs" / "engine_model"
    for path in (weights / "model-1.safetensors", weights / "model.safetensors.index.json", weights / "tokenizer.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    fleet(tmp_path, weights=weights)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    (folder / "model-2.safetensors").touch()
    for _ in range(2):
        fleet(tmp_path, weights=weights, quantization="fp8")
        shown = ["config.json", "model-1.safetensors", "model.safetensors.index.json"]
        assert sorted(path.name for path in folder.iterdir()) == shown
        assert (folder / shown[1]).read_text() == shown[1]


def test_a_server_that_ends_while_starting_shows_the_end_of_its_log(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "echo 'ImportError: no kernels'; exit 3")
    with pytest.raises(RolloutError, match=r"(?s)server 0 ended with status 3 .*_0.log:\nImportError: no kernels"):
        fleet(tmp_path, venv=venv).start_all()


def test_a_server_that_is_not_ready_in_time_is_given_up_and_ended(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "echo compiling; exec sleep 600")
    servers = fleet(tmp_path, venv=venv, start_seconds=1.0)
    with pytest.raises(RolloutError, match=r"(?s)not ready after 1 s \(sglang.start_seconds\).*compiling"):
        servers.start_all()
    assert not servers.is_alive(0)


def test_servers_that_start_together_have_one_deadline(tmp_path: Path) -> None:
    """Three that never answer are given up after `sglang.start_seconds`, and not one after another."""
    venv = fake_environment(tmp_path, "echo compiling; exec sleep 600")
    servers = fleet(tmp_path, venv=venv, servers=3, start_seconds=4.0)
    waits: list[float] = []
    with pytest.raises(RolloutError, match=r"server 2 is not ready after 4 s"):
        servers.start_most(2, lambda: waits.append(time.monotonic()))
    assert waits[-1] - waits[0] < 8.0, "twelve seconds, were they given up one after another"


def test_all_that_are_not_ready_in_time_are_named(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "echo compiling; exec sleep 600")
    with pytest.raises(RolloutError) as caught:
        fleet(tmp_path, venv=venv, servers=3, start_seconds=1.0).start_all()
    assert str(caught.value).count("is not ready after 1 s (sglang.start_seconds); the end of ") == 3


SECOND_FAILS = """case "$*" in *"--port 1002"*) echo 'ImportError: no kernels'; exit 3;; esac
exec sleep 600"""
"""The server at port 1002 ends at once, the others are never ready."""


def at_ports(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Has servers be started at these ports, where nobody listens."""
    left = iter(ports)
    monkeypatch.setattr(module, "free_port", lambda host: next(left))


def test_a_server_that_fails_is_told_of_while_those_before_it_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_ports(monkeypatch, 1001, 1002, 1003)
    servers = fleet(tmp_path, venv=fake_environment(tmp_path, SECOND_FAILS), servers=3, start_seconds=120.0)
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"(?s)^SGLang server 1 ended with status 3 .*_1.log:\nImportError"):
        servers.start_all()
    assert time.monotonic() - began < 60.0, "server 0 has two minutes"
    assert not any(servers.is_alive(index) for index in range(3))


def test_more_failures_than_may_be_are_counted_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_ports(monkeypatch, 1001, 1002, 1003)
    servers = fleet(tmp_path, venv=fake_environment(tmp_path, SECOND_FAILS), servers=3, start_seconds=4.0)
    counts: list[tuple[int, int]] = []

    def waiting() -> None:
        ready, problems = servers.started()
        counts.append((ready, len(problems)))

    with pytest.raises(RolloutError) as caught:
        servers.start_most(1, waiting)
    assert counts[-1] == (0, 1), "one may fail, so it goes on"
    assert [f"server {index} {what}" in str(caught.value) for index, what in
            enumerate(("is not ready", "ended with status 3", "is not ready"))] == [True] * 3  # fmt: skip


def test_what_is_started_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    at_ports(monkeypatch, 1001, 1003)
    servers = fleet(tmp_path, venv=fake_environment(tmp_path, "exec sleep 600"), servers=2, start_seconds=1800.0)

    def waiting() -> None:
        raise RolloutError("seen enough")

    with pytest.raises(RolloutError, match="seen enough"):
        servers.start_all(waiting)
    assert caplog.messages == [
        f"starting 2 SGLang servers on this machine: ports 1001, 1003 (found free), logs {tmp_path}/run/logs/"
        "engine_0.log to engine_1.log, at most 30:00 to be ready (sglang.start_seconds)"
    ]


def test_the_end_of_a_server_that_had_ended_by_itself_is_told_once(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "echo 'CUDA error: illegal access'; exit 134")
    with fleet(tmp_path, venv=venv) as servers:
        servers.start(0)  # not waited for: `stop` finds out
        log = tmp_path / "run" / "logs" / "engine_0.log"
        while "CUDA" not in log.read_text():
            time.sleep(0.01)
        assert servers.stop(0) == f"ended with status 134; the end of {log}:\nCUDA error: illegal access"
        assert servers.stop(0) is None


def test_a_server_that_runs_until_it_is_ended_has_no_end_to_tell_of(tmp_path: Path) -> None:
    with fleet(tmp_path, venv=fake_environment(tmp_path, "exec sleep 600")) as servers:
        servers.start(0)
        assert servers.stop(0) is None
        assert servers.stop(0) is None


def test_a_server_that_is_ended_while_it_starts_says_so(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "exec sleep 600")
    with fleet(tmp_path, venv=venv) as servers:
        servers.start(0)
        with pytest.raises(RolloutError, match="server 0 was ended while it was starting"):
            servers.wait_ready(0, lambda: servers.stop(0))


def test_a_free_port_that_was_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "echo '[Errno 98] address already in use'; exit 1")
    with pytest.raises(RolloutError, match="address already in use"):
        fleet(tmp_path, venv=venv).start_all()
    assert (tmp_path / "run" / "logs" / "engine_0.log").read_text().count("--- ") == 3


ANSWERING = """exec %s -c '
import http.server, json, sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": option("--served-model-name")}]}).encode())
http.server.HTTPServer.allow_reuse_address = False
http.server.HTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
' "$@"
"""


def test_another_server_on_the_port_is_not_taken_for_ours(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port was free when it was chosen; then a healthy server of others took it, before ours did."""
    taken, free = urlsplit(stand_in.url).port, module.free_port
    ports = iter([taken])
    monkeypatch.setattr(module, "free_port", lambda host: next(ports, None) or free(host))
    stand_in.answers["/v1/models"] = {"data": [{"id": "klear-of-another-run", "max_model_len": 512}]}
    with fleet(tmp_path, venv=fake_environment(tmp_path, ANSWERING % sys.executable), start_seconds=60.0) as servers:
        [url] = servers.start_all()
        assert url != stand_in.url
        assert urlopen(f"{url}/v1/models", timeout=10).read() != b""
    log = (tmp_path / "run" / "logs" / "engine_0.log").read_text()
    assert log.count("--- ") == 2
    assert "Address already in use" in log


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "exec sleep 600")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"sglang.port: port {port} on 127.0.0.1 is in use, and server 0 needs it"
        ):
            fleet(tmp_path, venv=venv, port=port).start_all()


def test_an_address_that_is_not_this_machines_is_named(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "exec sleep 600")
    with pytest.raises(ConfigError, match=r"sglang.host: 192.0.2.1 is no address that a server can listen on here"):
        fleet(tmp_path, venv=venv, host="192.0.2.1").start_all()


def test_a_place_among_machines_shows_in_address_log_and_messages(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, 'echo "$*"; exit 3')
    place = FleetPlace(first_number=4, address="127.0.0.2")
    for host, listens in (("auto", "127.0.0.2"), ("0.0.0.0", "0.0.0.0")):
        with pytest.raises(RolloutError, match=rf"(?s)server 4 on 127.0.0.2 ended.*--host {listens} --port"):
            fleet(tmp_path, place, venv=venv, host=host).start_all()
    assert (tmp_path / "run" / "logs" / "engine_4.log").exists()
    servers = fleet(tmp_path, place, venv=venv, host="0.0.0.0", port=4321)
    servers.start(0)
    assert servers.url(0) == "http://127.0.0.2:4321"


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sglang.venv: no .*nowhere/bin/python; run tools/setup_sglang.sh"):
        fleet(tmp_path, venv=str(tmp_path / "nowhere")).start_all()


def test_a_real_server_answers_at_an_ipv6_address_and_ends_where_its_model_says(
    tmp_path: Path, sglang_settings: SglangSettings
) -> None:
    shape: dict[str, Any] = {"dtype": "float32", "on_cpu": True, "batch_responses": 4, "longest_sequence": 64}
    config, place = hf_config(architecture(tied=False), dtype="float32"), FleetPlace(address="::1")
    with ServerFleet(sglang_settings, config, tmp_path / "run", place=place, **shape) as servers:
        ends = tuple(range(1, 83))  # all tokens but one, so that its weights, which mean nothing, soon draw one
        model = tmp_path / "run" / "logs" / "engine_model"
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
        [url] = servers.start_all()
        assert url.startswith("http://[::1]:")
        expected = Expected(vocab_size=83, longest_sequence=64, yarn=None, stop_ids=(0,))
        with pytest.raises(ConfigError, match=r"it ends responses at \[1, 2, .*ours end at \[0\] only"):
            SglangEngine([url], sglang_settings, expected, in_flight=4)
        expected = replace(expected, stop_ids=(0, *ends))
        engine = SglangEngine([url], sglang_settings, expected, in_flight=4)
        try:
            prompt = Prompt(prompt_id="p", domain="math", token_ids=np.arange(5), reference="")
            known = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=40, stop_token_ids=(0, *ends))
            group = EngineGroup([e.caller for e in engine.engines], 60.0)
            group.call("/update_weight_version", {"new_version": "0", "abort_all_requests": False})
            engine.use_version(0)
            [drawn] = engine.generate([prompt], num_responses=2, sampling=known, seed=1)
            assert [rollout.finish_reason for rollout in drawn.rollouts] == ["stop", "stop"]
            assert any(int(rollout.response_ids[-1]) in ends for rollout in drawn.rollouts)
            # Not asked for, and done all the same: such ends must be known (`Expected.stop_ids`), or are no answers.
            with pytest.raises(EndpointError, match="it ends with a stop, but not with a stop token"):
                engine.generate([prompt], num_responses=2, sampling=replace(known, stop_token_ids=(0,)), seed=1)
        finally:
            engine.close()
