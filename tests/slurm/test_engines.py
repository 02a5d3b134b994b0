"""Engine nodes: who starts where, and what the trainer is told; trainer and engine are stand-ins that record it."""

from __future__ import annotations

import random
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.conftest import cluster

TRAINER = """#!/bin/bash
# As python in the trainer's environment: the settings check, then torchrun, which asks both engines for a page.
case " $* " in
    *" --check "*) touch "$CALLS.check"; sleep "${CHECK_SECONDS:-0}"
        echo "run.dir: $RUN"; echo "model.hf_dir: /models/a b"
        echo 'engine options: --context-length 99 --json-model-override-args {"a":{"b":4.0}}' ;;
    *" torch.distributed.run "*)
        echo "$SLURMD_NODENAME" "$@" >>"$CALLS.trainer"
        for url in $(grep -o 'http://[0-9.:]*' <<<"$*"); do
            until $PYTHON -c "import urllib.request; urllib.request.urlopen('$url')" 2>/dev/null; do sleep 0.2; done
        done
        status=0
        [[ -z ${STOPS:-} || -n ${SLURM_RESTART_COUNT:-} ]] || { $PYTHON "$STOPS"; status=$?; }
        echo "$status" >"$KLEAR_STATUS_FILE" ;;
esac
"""

STOPS = """
# As a rank that works until SIGTERM and saves, which takes longer than engines take to end.
import os, signal, time

def stop(*_):
    time.sleep(4)
    os._exit(75)

signal.signal(signal.SIGTERM, stop)
open(os.environ["CALLS"] + ".working", "w").close()
while True:
    time.sleep(1)
"""

ENGINE = """#!/bin/bash
# As python in SGLang's environment: the first one fails, all others serve pages.
echo "$SLURMD_NODENAME" "$@" >>"$CALLS.engine"
echo $$ >>"$CALLS.processes"
[[ ${SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN:-} == 1 ]] || exit 4
mkdir "$CALLS.failed" 2>/dev/null && { echo "out of luck"; exit 3; }
for port in "$@"; do :; done
exec $PYTHON -m http.server --bind 127.0.0.1 "$port"
"""


def stand_in(folder: Path, text: str) -> str:
    program = folder / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(text)
    program.chmod(0o755)
    return str(folder)


def two_free_ports() -> int:
    """The first of two neighbouring ports that nobody listens on, below those that a system gives to anybody."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def submit(slurm, tmp_path: Path, port: int, **variables: str):
    """A job of one trainer node and one node of two engines, or what the variables say."""
    named = {
        "KLEAR_VENV": stand_in(tmp_path / "trainer", TRAINER),
        "KLEAR_SGLANG_VENV": stand_in(tmp_path / "sglang", ENGINE),
        "KLEAR_ENGINE_NODES": "1",
        "KLEAR_ENGINES_PER_NODE": "2",
        "KLEAR_ENGINE_PORT": str(port),
        "CALLS": str(tmp_path / "calls"),
        "RUN": str(tmp_path / "run"),
        "PYTHON": sys.executable,
        **variables,
    }
    nodes = 1 + int(named["KLEAR_ENGINE_NODES"])
    return slurm.submit("gppo.slurm", ["config.yaml", "rl.steps=3"], tmp_path, [f"--nodes={nodes}"], **named)


def started(tmp_path: Path) -> list[int]:
    """The processes of all engines until now."""
    return [int(line) for line in (tmp_path / "calls.processes").read_text().split()]


def runs(process: int) -> bool:
    """Not so once it has ended, whether or not anybody has asked how."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


def assert_nobody_serves(port: int, processes: list[int]) -> None:
    """On this port and the next; none of the processes is left."""
    for number in (port, port + 1):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", number)) != 0, "an engine outlived its job"
    assert not [process for process in processes if runs(process)]


def test_engines_run_beside_the_trainer_and_end_with_it(slurm, tmp_path):
    port = two_free_ports()
    job = submit(slurm, tmp_path, port, KLEAR_ENGINE_OPTIONS="--mem-fraction-static 0.8")
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), job.story()

    urls = f"sglang.urls=[http://127.0.0.1:{port},http://127.0.0.1:{port + 1}]"
    (trainer,) = (tmp_path / "calls.trainer").read_text().splitlines()
    assert trainer.startswith("n1 -m torch.distributed.run --nnodes 1 --nproc-per-node 1 --node-rank 0 ")
    waits = "sglang.connect_seconds=1800"  # engines start when it does, and take longer
    asks = f"sglang.restart_requests={tmp_path}/run/logs/.restart-engines-{job.number}-0"
    assert trainer.endswith(
        f" -m megatron_klear.train_rl config.yaml rl.steps=3 rollout.engine=sglang {urls} {waits} {asks}"
    )

    engines = (tmp_path / "calls.engine").read_text().splitlines()
    served = "n2 -m sglang.launch_server --model-path /models/a b --context-length 99 "
    served += '--json-model-override-args {"a":{"b":4.0}} '
    served += "--mem-fraction-static 0.8 --tp-size 1 --host 0.0.0.0"
    assert len(engines) == 3, "one of the two was started again"
    assert set(engines) == {f"{served} --port {port}", f"{served} --port {port + 1}"}
    logs = tmp_path / "run" / "logs"
    assert not list(logs.glob(".*")), "nothing is left of what trainer and engines told each other"
    log = (logs / f"engines-{job.number}-0.log").read_text()
    assert "out of luck" in log
    assert "on n2 ended with status 3; 10 restarts left" in log

    assert_nobody_serves(port, started(tmp_path))


@contextmanager
def warned_by_hand(job) -> Iterator[None]:
    job.warn()
    yield


@contextmanager
def preempted_by_sigterm(job) -> Iterator[None]:
    urgent = job.slurm.preempt()
    yield
    assert urgent.ended()["JobState"] == "COMPLETED"


@contextmanager
def preempted_by_the_user_signal(job) -> Iterator[None]:
    """A cluster set so that a preemption sends what --signal asks for."""
    configuration = job.slurm.directory / "slurm.conf"
    before = configuration.read_text()
    configuration.write_text(f"{before}SlurmctldParameters=preempt_send_user_signal\n")
    job.slurm.call("scontrol", "reconfigure")
    try:
        with preempted_by_sigterm(job):
            yield
    finally:
        configuration.write_text(before)
        job.slurm.call("scontrol", "reconfigure")


@pytest.mark.parametrize(
    ("stopped", "engines_end"),
    [
        (warned_by_hand, "with the trainer"),
        (preempted_by_the_user_signal, "with the trainer"),
        (preempted_by_sigterm, "before the trainer"),
    ],
)
def test_a_job_with_engines_that_is_stopped_comes_back_with_engines(slurm, tmp_path, stopped, engines_end):
    port = two_free_ports()
    (tmp_path / "calls.failed").mkdir()  # so that no engine fails
    (tmp_path / "stops.py").write_text(STOPS)
    job = submit(slurm, tmp_path, port, STOPS=str(tmp_path / "stops.py"))
    job.until(lambda _: (tmp_path / "calls.working").exists())
    first = started(tmp_path)
    assert len(first) == 2
    with stopped(job):
        job.until(lambda f: f["Restarts"] == "1" and f["JobState"] == "PENDING")
        assert_nobody_serves(port, first)
        told = job.output.read_text()
        assert "stopped and saved; requeued to go on" in told
        assert ("Slurm told the engines to end" in told) == (engines_end == "before the trainer")
        assert "gave up" not in told
        job.restarted()
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), job.story()
    second = started(tmp_path)[2:]
    assert len(second) == 2
    assert not set(second) & set(first)
    assert_nobody_serves(port, first + second)

    trainers = (tmp_path / "calls.trainer").read_text().splitlines()
    assert len(trainers) == 2
    urls = [re.findall(r"sglang\.urls=\S+", line) for line in trainers]
    assert urls[0] == urls[1] == [f"sglang.urls=[http://127.0.0.1:{port},http://127.0.0.1:{port + 1}]"]
    for attempt in (0, 1):
        log = (tmp_path / "run" / "logs" / f"engines-{job.number}-{attempt}.log").read_text()
        assert "GET / HTTP" in log, "its own attempt's engines answered"


def test_a_preemption_after_one_of_two_engine_nodes_has_given_up_is_no_failure(tmp_path):
    """All nodes have one address, so that one of the two finds the port taken; the other serves until Slurm ends it."""
    port = two_free_ports()
    (tmp_path / "calls.failed").mkdir()
    (tmp_path / "stops.py").write_text(STOPS)
    two_nodes = {"KLEAR_ENGINE_NODES": "2", "KLEAR_ENGINES_PER_NODE": "1", "KLEAR_ENGINE_RESTARTS": "0"}
    with cluster(3) as slurm:
        job = submit(slurm, tmp_path, port, STOPS=str(tmp_path / "stops.py"), **two_nodes)
        job.until(lambda _: (tmp_path / "calls.working").exists())
        log = tmp_path / "run" / "logs" / f"engines-{job.number}-0.log"
        job.until(lambda _: re.search(f"port {port} is in use|; 0 restarts left", log.read_text()) is not None)
        with preempted_by_sigterm(job):
            job.until(lambda f: f["Restarts"] == "1" and f["JobState"] == "PENDING")
            told = job.output.read_text()
            assert "stopped and saved; requeued to go on" in told
            assert "Slurm told the engines to end" in told
            assert "gave up" not in told
            job.restarted()
        fields = job.ended()
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), job.story()
    assert_nobody_serves(port, started(tmp_path))


def test_a_preemption_during_the_check_is_not_a_failure(slurm, tmp_path):
    """Its warning is over before the trainer starts, so the job goes on until Slurm ends and requeues it."""
    job = submit(slurm, tmp_path, two_free_ports(), CHECK_SECONDS="2")
    job.until(lambda _: (tmp_path / "calls.check").exists())
    slurm.call("scancel", "--signal=TERM", job.number)  # every process of every step, not the batch script
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "0"), job.story()
