"""Servers that do not start say why, and what is set wrong is named."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.rollout.sglang import FleetPlace, ServerFleet


def fake_environment(folder: Path, script: str) -> str:
    """A virtual environment whose Python is a shell script."""
    (folder / "venv" / "bin").mkdir(parents=True)
    python = folder / "venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return str(folder / "venv")


def fleet(folder: Path, place: FleetPlace | None = None, **settings: Any) -> ServerFleet:
    shape: dict[str, Any] = {"dtype": "float32", "on_cpu": True, "batch_responses": 4, "longest_sequence": 64}
    return ServerFleet(SglangSettings(**settings), {"model_type": "qwen3"}, folder / "run", place=place, **shape)


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


def test_a_free_port_that_was_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    venv = fake_environment(tmp_path, "echo '[Errno 98] address already in use'; exit 1")
    with pytest.raises(RolloutError, match="address already in use"):
        fleet(tmp_path, venv=venv).start_all()
    assert (tmp_path / "run" / "logs" / "engine_0.log").read_text().count("--- ") == 3


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
