"""The job scripts without a Slurm: what they say to a person, and shellcheck where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klear.session.others import ServersOfOthers

ROOT = Path(__file__).parents[2]
SCRIPTS = ("sft.slurm", "gppo.slurm")
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def run(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=OUTSIDE, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: sbatch [SBATCH OPTIONS] tools/{script} CONFIG.yaml")
    for words in ("#SBATCH --signal=B:USR1@", "#SBATCH --requeue", "##SBATCH --gpus-per-node", "run.dir/logs"):
        assert words in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [(), ("optimizer.lr=1",), ("--nodes=2", "a.yaml")])
def test_missing_config_is_refused(script, arguments):
    done = run(script, *arguments)
    assert done.returncode == 2
    assert "CONFIG.yaml: the settings file must come first" in done.stderr
    assert "usage: sbatch" in done.stderr


def test_outside_a_job_it_says_how_to_submit():
    done = run("sft.slurm", "a.yaml")
    assert done.returncode == 2
    assert "not a Slurm job" in done.stderr


def test_submitted_from_elsewhere_it_says_from_where(tmp_path):
    done = run("gppo.slurm", "a.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "submit from the root of the repository" in done.stderr


NAMES = """
source tools/slurm_job.sh
gpus=$1 engine_nodes=(n1 n2)
address() { echo "$1"; }
name_engines
echo "${engine_settings[1]}"
"""


@pytest.mark.parametrize(
    ("gpus", "tp", "each", "engines"),
    [(8, 2, None, 4), (8, 2, 4, 4), (8, 2, 8, "got 8 engines of KLEAR_ENGINE_TP=2, which need 16 GPUs"),
     (8, 3, 3, "got 3 engines of KLEAR_ENGINE_TP=3, which need 9 GPUs"),
     (1, 2, None, "got 1 engines of KLEAR_ENGINE_TP=2, which need 2 GPUs"), (0, 2, 8, 8)],
)  # fmt: skip
def test_engines_that_need_more_gpus_than_a_node_has_are_refused(gpus, tp, each, engines):
    environment = {**OUTSIDE, "KLEAR_ENGINE_TP": str(tp)} | ({"KLEAR_ENGINES_PER_NODE": str(each)} if each else {})
    done = subprocess.run(
        ["bash", "-c", NAMES, "names", str(gpus)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )
    if isinstance(engines, int):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("http://") == 2 * engines
    else:
        assert done.returncode == 2
        text = f"KLEAR_ENGINES_PER_NODE: {engines} of a node, and it has {gpus}; make one of them smaller\n"
        assert (done.stdout, done.stderr) == ("", text)


RACE = """
source tools/slurm_job.sh
job=1 attempt=0 warned='' ended='' logs=$1 trainer='' engines='' entry=train_rl ranks=1 port=1
train_nodes=(n1) engine_settings=()
trap 'warned=1; ask_trainer_to_stop' USR1
# Slurm's warning comes after the check for one and before the trainer is known.
address() { kill -USR1 $$; echo here; }
# The trainer, as torchrun with one rank that ends with the status of a saved run when it is asked to.
run_step() {
    python3 -c '
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(os.environ["KLEAR_PID_FILE"], "w").write(str(os.getppid()))
time.sleep(60)' &
    wait $!
    echo $? >"$KLEAR_STATUS_FILE"
}
start_trainer config.yaml
wait_for "$trainer"
cat "$status_file"
"""


def test_a_warning_while_the_trainer_is_being_started_reaches_it(tmp_path):
    done = subprocess.run(
        ["bash", "-c", RACE, "race", str(tmp_path)], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, timeout=50
    )
    assert done.stdout.splitlines()[-1] == "75", done.stdout + done.stderr


WAITS = """
source "$1/slurm_job.sh"
say() { echo "$@"; }
end_of_engines_log() { :; }
ask_trainer_to_stop() { :; }
logs=$1 job=1 attempt=0 warned='' ended='' gave_up='' KLEAR_ENGINE_REQUESTS=$1
(sleep 0.2; exit "$2") & engines=$!
sleep 9 & trainer=$!
wait_for_trainer
kill -0 "$trainer" 2>/dev/null && echo left || echo waited
"""


TOLD = "Slurm told the engines to end, as it does before a preemption\nwaited\n"


@pytest.mark.parametrize(
    ("status", "are_told", "how"),
    [("0", False, TOLD), ("1", False, "it is ended\nleft\n"), ("1", True, TOLD)],
    ids=["told", "gave up", "one gave up before the others were told"],
)
def test_only_a_trainer_whose_engines_gave_up_has_a_limit(tmp_path, status, are_told, how):
    """How long a preempted one may finish its step and save is Slurm's to say."""
    if are_told:
        (tmp_path / "told_to_end").touch()
    script = (ROOT / "tools" / "slurm_job.sh").read_text()
    assert "readonly GIVE_UP_SECONDS=120" in script
    (tmp_path / "slurm_job.sh").write_text(script.replace("GIVE_UP_SECONDS=120", "GIVE_UP_SECONDS=1"))
    done = subprocess.run(
        ["bash", "-c", WAITS, "waits", str(tmp_path), status], env=OUTSIDE, capture_output=True, text=True, timeout=50
    )
    assert done.stdout.endswith(how), done.stdout + done.stderr


def engines(tmp_path: Path, port: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Two engines on two ports; nothing sleeps."""
    sleep = tmp_path / "sleep"
    sleep.write_text("#!/bin/sh\n")
    sleep.chmod(0o755)
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "slurm_engines.sh"), "2", "1", str(port), *command],
        env={**OUTSIDE, "PATH": f"{tmp_path}:{OUTSIDE['PATH']}", "KLEAR_ENGINE_RESTARTS": "0"},
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip


def test_engines_whose_port_others_keep_end_before_any_is_started(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as others:
        port = others.getsockname()[1] - 1  # the second engine's
        done = engines(tmp_path, port, "/bin/echo", "started")
    assert done.returncode == 2
    assert done.stdout == (
        f"KLEAR_ENGINE_PORT on this node: port {port + 1} is in use, by another job or an engine that was left behind; "
        "choose another\n"
    )


def test_an_engine_that_is_not_installed_is_named(tmp_path):
    done = engines(tmp_path, 40000, str(tmp_path / "venv" / "bin" / "python"))
    assert done.returncode == 2
    assert done.stdout.startswith(f"KLEAR_SGLANG_VENV on this node: there is no {tmp_path}/venv/bin/python (tools/")


def test_engines_that_give_up_end_the_step(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = engines(tmp_path, port, "/bin/false")
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == [
        f"engine of port {port + i} on this node ended with status 1; 0 restarts left" for i in range(2)
    ]


def test_an_engine_that_never_listens_is_ended_and_starts_again(tmp_path):
    """As one that hangs while it loads: nobody has a connection to tell by."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "slurm_engines.sh"), "1", "1", str(port), "/bin/sh", "-c", "exec sleep 100"],
        env={**OUTSIDE, "KLEAR_ENGINE_RESTARTS": "1", "KLEAR_ENGINE_SECONDS": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    name = f"engine of port {port} on this node"
    told = [line for line in done.stdout.splitlines() if line.startswith(name)]
    late = f"{name} is ended: it does not listen 1 s after its start (KLEAR_ENGINE_SECONDS)"
    assert told == [late, f"{name} ended with status 143; 1 restarts left", late,
                    f"{name} ended with status 143; 0 restarts left"]  # fmt: skip


def test_a_request_for_an_earlier_server_does_not_end_the_next(tmp_path):
    """It came when that one had ended by itself."""
    (tmp_path / "serves.py").write_text(SERVES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    requests = tmp_path / "requests"
    requests.mkdir()
    (requests / f"127.0.0.1_{port}").touch()
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "slurm_engines.sh"), "1", "1", str(port),
         sys.executable, str(tmp_path / "serves.py")],
        env={
            **OUTSIDE, "KLEAR_ENGINE_REQUESTS": str(requests), "SLURMD_NODENAME": "n2",
            "KLEAR_ENGINE_ADDRESSES": "n2=127.0.0.1", "KLEAR_ENGINE_RESTARTS": "0",
        },
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "the trainer asks for it" not in done.stdout
    assert "ended with status 7; 0 restarts left" in done.stdout


SERVES = """
import socket, sys, time
with socket.create_server(("127.0.0.1", int(sys.argv[-1]))):
    time.sleep(4)
sys.exit(7)
"""

HANGS = """
import os, signal, socket, sys, time
lives = int(open(sys.argv[1]).read()) + 1
with socket.create_server(("127.0.0.1", int(sys.argv[-1]))) as port:
    if os.fork() == 0:  # a worker, which has the port, too, and does not heed SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(100)
    open(sys.argv[1], "w").write(str(lives))
    if lives == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)
"""


def test_an_engine_that_hangs_is_ended_with_all_its_processes_when_the_trainer_asks_and_starts_again(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    lives = tmp_path / "lives"
    lives.write_text("0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    requests = tmp_path / "requests"
    with subprocess.Popen(
        ["bash", str(ROOT / "tools" / "slurm_engines.sh"), "1", "1", str(port),
         sys.executable, str(tmp_path / "hangs.py"), str(lives)],
        env={
            **OUTSIDE, "KLEAR_ENGINE_REQUESTS": str(requests), "SLURMD_NODENAME": "n2",
            "KLEAR_ENGINE_ADDRESSES": "n1=10.0.0.1 n2=LocalHost ",
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as step:  # fmt: skip
        try:
            others = ServersOfOthers([f"http://LocalHost:{port}"], requests)
            others.stop(0)
            assert not requests.exists(), "one that does not listen has ended, or is being started"
            until(lambda: lives.read_text() == "1")
            others.stop(0)
            until(lambda: list(requests.iterdir()) == [])
            until(lambda: lives.read_text() == "2")  # on the same port, which no process of its first life keeps
        finally:
            step.terminate()
            output, _ = step.communicate(timeout=30)
    assert step.returncode == 0
    assert [file.name for file in requests.iterdir()] == ["told_to_end"]
    ended = f"engine of port {port} on n2 ended with status 137; 10 restarts left"
    told = [line for line in output.splitlines() if line.startswith("engine ")]
    assert told == [f"engine of port {port} on n2 is ended: the trainer asks for it", ended], output
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "a process outlived its step"


def test_a_request_that_nobody_hears_is_taken_back(tmp_path, caplog):
    class GivenUp(Exception):
        pass

    def give_up() -> None:
        if not requests.exists() or not list(requests.iterdir()):
            raise GivenUp  # it is waited for no longer

    requests = tmp_path / "requests"
    with socket.create_server(("127.0.0.1", 0)) as hung:
        url = f"http://127.0.0.1:{hung.getsockname()[1]}"
        unheard = ServersOfOthers([url], requests, unheard_seconds=0.5)
        unheard.stop(0)
        assert len(list(requests.iterdir())) == 1
        with pytest.raises(GivenUp):
            unheard.wait_ready(0, give_up)
        ServersOfOthers([url]).stop(0)
        (tmp_path / "file").touch()
        ServersOfOthers([url], tmp_path / "file").stop(0)

        def end_the_run() -> None:
            raise GivenUp

        patient = ServersOfOthers([url], requests)
        patient.stop(0)
        with pytest.raises(GivenUp):
            patient.wait_ready(0, end_the_run)
    assert list(requests.iterdir()) == [], "nobody may find it later"
    first, unwritable = caplog.messages
    assert first.startswith(f"{url}: nobody ended it within 0 s of being asked to by {requests}/127.0.0.1_")
    assert unwritable.startswith(f"{url}: cannot be asked to end (sglang.restart_requests): ")


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [*ROOT.glob("tools/*.slurm"), *ROOT.glob("tools/slurm_*.sh"), *ROOT.glob("tests/slurm/*.sh")]
    assert len(scripts) == 5
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
