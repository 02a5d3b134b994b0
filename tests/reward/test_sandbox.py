"""Hostile programs are contained: 0 with a reason, the machine unharmed, the next answer graded, nothing left."""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_klear.errors import RewardError
from megatron_klear.records import Grade
from megatron_klear.reward import CodeGraderPool, Limits, sandbox
from megatron_klear.reward.sandbox import SandboxMode, view
from tests.reward.conftest import STRICT_LIMITS, prints, program
from tests.reward.hostile_programs import FILLS_SCRATCH, PROGRAMS, READS_FILES, REFUSED

NEVER = "the-secret-output"
GOOD = ("good", program("print(int(input()) + 1)"), prints("42", "41"))


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that everyone may read, with what a test expects."""
    folder = Path("/var/tmp") if os.geteuid() == 0 else tmp_path_factory.mktemp("secret")
    file = folder / f"secret-of-the-test-{os.getpid()}"
    file.write_text(NEVER)
    file.chmod(0o644)
    yield file
    file.unlink()


@pytest.fixture
def canary() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user that sandboxes run as; an attack must not end it."""
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    process = subprocess.Popen(["sleep", "600"], **user)
    yield process
    process.kill()
    process.wait()


def attack(pool: CodeGraderPool, names: list[str], secret: Path) -> dict[str, Grade]:
    """Grade the programs, each followed by a good answer that must be graded as ever."""
    requests = []
    for name in names:
        code = PROGRAMS[name][1].replace("{secret}", str(secret))
        requests += [
            (name, program(code), prints(NEVER)),
            (f"after {name}", GOOD[1].replace("1)", f"1) # {name}"), GOOD[2]),
        ]
    grades = dict(zip([r[0] for r in requests], pool.grade_many(requests), strict=True))
    assert [n for n in names if grades[f"after {n}"].outcome != "correct"] == []
    return {name: grades[name] for name in names}


def in_sandboxes(pool: CodeGraderPool) -> list[psutil.Process]:
    """All processes of the pool's sandboxes."""
    roots = [psutil.Process(pid) for pid in pool.worker_pids()]
    return [p for root in roots for p in [root, *root.children(recursive=True)]]


def of_a_sandbox(path: Path) -> bool:
    """Whether a program in a sandbox may have made this: other processes of the machine make files, too.

    As root by the owner, since sandboxes then run as nobody; else by all names but those that others are known to use.
    """
    try:
        owner = path.lstat().st_uid
    except FileNotFoundError:
        return False
    if path.name.startswith("klear-code-"):  # the folder of another process's sandbox of the mode rlimits
        return False
    if os.geteuid() == 0:
        return owner == pwd.getpwnam("nobody").pw_uid
    return owner == os.getuid() and not path.name.startswith(("pytest-", "tmp", "torch", ".", "sem.", "psm_"))


def settled(pool: CodeGraderPool, per_sandbox: int) -> bool:
    deadline = time.monotonic() + 10
    while len(in_sandboxes(pool)) != per_sandbox * len(pool.worker_pids()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_hostile_programs_are_contained_and_nothing_is_left(
    code_graders: CodeGraderPool, secret: Path, canary: subprocess.Popen[bytes]
) -> None:
    (first,) = code_graders.grade_many([GOOD])
    assert first.outcome == "correct", first.reason
    watched = ("/", "/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~"))
    before = {p: set(os.listdir(p)) for p in watched if os.path.isdir(p)}
    workers = code_graders.worker_pids()

    grades = attack(code_graders, list(PROGRAMS), secret)

    assert {n: g for n, g in grades.items() if g.outcome != "wrong" or g.reward != 0.0} == {}
    assert {n: g.reason for n, g in grades.items() if PROGRAMS[n][0] not in g.reason or "ESCAPED" in g.reason} == {}
    assert all(
        g.reason.isprintable() and NEVER not in g.reason.replace(f"expected {NEVER!r}", "") for g in grades.values()
    )
    # The sandboxes that ran all of it are the first ones still, and hold the two processes that they began with.
    assert code_graders.worker_pids() == workers
    assert settled(code_graders, 2), in_sandboxes(code_graders)
    own_network = os.readlink("/proc/self/ns/net")
    inside = [p.pid for p in in_sandboxes(code_graders) if p.pid not in workers]
    assert [os.readlink(f"/proc/{pid}/ns/net") != own_network for pid in inside] == [True] * len(workers)
    assert canary.poll() is None
    assert psutil.Process(canary.pid).status() == "sleeping"
    left = {
        p: {name for name in os.listdir(p) if name not in before[p] and of_a_sandbox(Path(p, name))} for p in before
    }
    assert left == {p: set() for p in before}
    # What it would have left is seen: a file of the user that sandboxes run as.
    planted = Path("/tmp") / f"left-by-{os.getpid()}"
    planted.touch()
    if os.geteuid() == 0:
        os.chown(planted, pwd.getpwnam("nobody").pw_uid, -1)
    found = of_a_sandbox(planted)
    planted.unlink()
    assert found
    assert secret.read_text() == NEVER


def test_processes_are_bounded_and_ended_where_they_are_allowed(
    bubblewrap: str, canary: subprocess.Popen[bytes]
) -> None:
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    daemons = (
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0: time.sleep(1000)\n        os._exit(0)\nprint(1)"
    )
    killer = "import os\nfor pid in [-1, *range(1, 50)]:\n    if pid != os.getpid():\n        try: os.kill(pid, 9)\n        except OSError: pass\nprint(1)"  # noqa: E501
    limits = Limits(cpu_seconds=1.0, wall_seconds=1.5, memory_bytes=128 * 2**20, tasks=16, allow_processes=True)
    with CodeGraderPool(workers=1, limits=limits) as pool:
        names = {"bomb": bomb, "daemons": daemons, "killer": killer}
        requests = [(name, program(code), prints("1")) for name, code in names.items()]
        grades = pool.grade_many([r for request in requests for r in (request, (f"after {request[0]}", *GOOD[1:]))])
        assert [g.outcome for g in grades] == ["wrong", "correct", "correct", "correct", "correct", "correct"]
        assert "time limit" in grades[0].reason
        assert settled(pool, 2), in_sandboxes(pool)
    assert canary.poll() is None


def test_nothing_of_one_answer_is_seen_by_the_next(code_graders: CodeGraderPool) -> None:
    """Not in the scratch folder, not between the tests of one answer, not in the memory of a process."""
    leaves = "open('left', 'w').write('x')\nprint('marker-' + 'of-this-answer')"
    looks = "import os\nprint(os.listdir('.'), os.listdir('/scratch'))"
    twice = '{"kind": "stdin", "tests": [{"input": "", "output": "[]"}, {"input": "", "output": "[]"}]}'
    own = "import os\nprint(os.listdir('.'))\nopen('left', 'w').write('x')"
    with CodeGraderPool(workers=1, limits=STRICT_LIMITS) as pool:
        grades = pool.grade_many(
            [("1", program(leaves), prints("x")), ("2", program(looks), prints("[] []")), ("3", program(own), twice)]
        )
    assert [g.outcome for g in grades] == ["wrong", "correct", "correct"], grades


def test_limits_and_system_call_filter_hold_without_bubblewrap(secret: Path, canary: subprocess.Popen[bytes]) -> None:
    names = [n for n in PROGRAMS if n not in READS_FILES | FILLS_SCRATCH and "time limit" not in PROGRAMS[n][0]]
    with CodeGraderPool(workers=1, sandbox="rlimits", limits=STRICT_LIMITS) as pool:
        grades = attack(pool, [*names, "endless loop", "stopped"], secret)
        assert {n: g for n, g in grades.items() if g.outcome != "wrong" or "ESCAPED" in g.reason} == {}
        assert {n: g.reason for n, g in grades.items() if PROGRAMS[n][0] not in g.reason} == {}
        # What this mode does not do is read as its help says it: files are there to be read.
        assert "ESCAPED" in attack(pool, ["passwords"], secret)["passwords"].reason
        assert settled(pool, 1), in_sandboxes(pool)
        folder = list(Path("/tmp").glob("klear-code-*"))
    assert canary.poll() is None
    assert not any(path.exists() for path in folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_normal_user_is_as_safe_as_root(bubblewrap: str) -> None:
    """The process gives up being root once everything is imported; its home may be closed to others."""
    names = ["fork bomb", "thread bomb", "memory bomb", "socket", "kill everything", "home folder", "many files"]
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.reward.test_sandbox import *
from megatron_klear.reward.sandbox.process import module_texts
module_texts()
os.setgroups([]); os.setgid(12345); os.setuid(12345)
with CodeGraderPool(workers=1, limits=STRICT_LIMITS) as pool:
    grades = attack(pool, {names!r}, Path("/nonexistent"))
    assert os.getuid() == 12345
    print(*[f"{{g.outcome}} {{g.reason}}" for g in grades.values()], sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [REFUSED in line or "memory limit" in line for line in lines] == [True] * len(names), done.stdout


def test_a_process_with_many_open_files_leaks_none_of_them(bubblewrap: str, secret: Path) -> None:
    """Its sockets then have high numbers, beyond what select() takes, and must be closed in a test all the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1500)]
    try:
        for mode in ("bubblewrap", "rlimits"):
            with CodeGraderPool(workers=1, sandbox=mode, limits=STRICT_LIMITS) as pool:
                grades = attack(pool, ["inherited files", "write to every file descriptor"], secret)
            assert {n: g.reason for n, g in grades.items() if "line 1 is 'contained'" not in g.reason} == {}
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_killed_sandbox_is_replaced_and_its_answer_graded(bubblewrap: str) -> None:
    with CodeGraderPool(workers=1, limits=STRICT_LIMITS) as pool:
        assert pool.grade_many([GOOD])[0].outcome == "correct"
        (pid,) = pool.worker_pids()
        inside = [p.pid for p in in_sandboxes(pool)]
        os.kill(pid, signal.SIGKILL)
        assert pool.grade_many([GOOD])[0].outcome == "correct"
        assert pool.worker_pids() != [pid]
        assert not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in inside)


def test_sandboxes_end_with_a_killed_parent(bubblewrap: str) -> None:
    code = (
        "import sys, time\nfrom megatron_klear.reward import CodeGraderPool\n"
        f"pool = CodeGraderPool(workers=2)\npool.grade_many([{GOOD!r}])\nprint(*pool.worker_pids(), flush=True)\n"
        "time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    inside = [p for pid in pids for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(inside, timeout=20)
    assert inside
    assert [p for p in alive if p.status() != "zombie"] == []


def test_the_measurements_that_are_told_are_those_that_are_kept() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "reward_throughput.json"
    measured = {f"{design['wall_ms']:.1f}" for design in json.loads(results.read_text())["designs"].values()}
    assert set(re.findall(r"([\d.]+)\s+ms", str(sandbox.__doc__))) == measured


def test_no_bubblewrap_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view.shutil, "which", lambda *_, **__: None)
    with (
        CodeGraderPool(workers=1) as pool,
        pytest.raises(RewardError, match=r"not installed.*code_reward\.sandbox=rlimits"),
    ):
        pool.grade_many([GOOD])


def test_a_kernel_that_allows_no_namespaces_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with CodeGraderPool(workers=1) as pool, pytest.raises(RewardError) as caught:
        pool.grade_many([GOOD])
    for words in ("No permissions to create new namespace", "user namespaces", "code_reward.sandbox=rlimits"):
        assert words in str(caught.value)


def test_another_fault_of_bubblewrap_is_told_as_what_it_is(
    bubblewrap: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    gone = tmp_path / "gone"
    with CodeGraderPool(workers=1, extra_paths=(str(gone),)) as pool, pytest.raises(RewardError) as caught:
        pool.grade_many([GOOD])
    assert "code_reward.extra_paths" in str(caught.value)
    assert "No such file or directory" in str(caught.value)
    assert "namespaces" not in str(caught.value)
    monkeypatch.setattr(view, "_DEVICES", (*view._DEVICES, "/dev/no-such-device"))
    with CodeGraderPool(workers=1) as pool, pytest.raises(RewardError) as caught:
        pool.grade_many([GOOD])
    assert "code_reward.sandbox: bubblewrap makes no sandbox" in str(caught.value)
    assert "/dev/no-such-device" in str(caught.value)
    assert "namespaces" not in str(caught.value)


@pytest.mark.parametrize("mode", ["bubblewrap", "rlimits"])
def test_a_module_that_cannot_be_imported_is_named_by_its_setting(bubblewrap: str, mode: SandboxMode) -> None:
    with (
        CodeGraderPool(workers=1, sandbox=mode, warm_modules=("json", "no_such.module")) as pool,
        pytest.raises(RewardError) as caught,
    ):
        pool.grade_many([GOOD])
    assert "code_reward.warm_modules" in str(caught.value)
    assert "cannot import no_such.module: ModuleNotFoundError" in str(caught.value)
    assert "code_reward.extra_paths" in str(caught.value)


@pytest.mark.parametrize(
    ("python", "why"), [("/nonexistent", "code_reward.python"), ("/bin/true", "code_reward.python")]
)
def test_an_interpreter_that_is_none_is_refused(python: str, why: str) -> None:
    with CodeGraderPool(workers=1, python=python) as pool, pytest.raises(RewardError, match=why):
        pool.grade_many([GOOD])


def test_folders_to_import_from_are_seen_and_no_others(bubblewrap: str, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "extra").mkdir(mode=0o755)
    (tmp_path / "extra" / "given.py").write_text("value = 7\n")
    (tmp_path / "extra" / "given.py").chmod(0o666)
    (tmp_path / "other.txt").write_text("x")
    code = f"import given, os\nprint(given.value, os.listdir({str(tmp_path)!r}))\nopen(given.__file__, 'a')"
    with CodeGraderPool(workers=1, extra_paths=(str(tmp_path / "extra"),), warm_modules=("given",)) as pool:
        (grade,) = pool.grade_many([("a", program(code), prints("7 ['extra']"))])
    assert "Read-only file system" in grade.reason
