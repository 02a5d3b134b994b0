"""The parent's side of a sandbox: start it, send it an answer and its tests, kill it."""

from __future__ import annotations

import contextlib
import functools
import logging
import marshal
import os
import pwd
import select
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from megatron_klear.errors import RewardError
from megatron_klear.reward.sandbox.blame import Blame, standing_processes
from megatron_klear.reward.sandbox.inside.channel import LENGTH
from megatron_klear.reward.sandbox.inside.children import ENDED, NUMBER, OVER_CPU, OVER_OUTPUT, OVER_WALL
from megatron_klear.reward.sandbox.inside.server import BROKEN, NO_MODULE, REPLY
from megatron_klear.reward.sandbox.limits import Limits
from megatron_klear.reward.sandbox.seccomp import OWN_PID, UnsupportedMachine, filter_program
from megatron_klear.reward.sandbox.view import (
    SCRATCH,
    SandboxMode,
    bubblewrap_command,
    environment,
    explain_refusal,
    find_interpreter,
)

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
_SLACK_SECONDS = 30.0
"""How long a test may take to end when it is to, before its sandbox is given up."""
_LOOK_SECONDS = 0.05
"""Between two looks at a test's processes, at the least: a thread that runs is seen to get on in it."""
_LOOKS_WHILE_HELD_UP = 0.5
_TESTS_DEPTH = {"bubblewrap": 4, "rlimits": 2}
"""From a sandbox's first process down to those of a test: bubblewrap, server, its child, session; or the latter two."""
_MOST_REPLY_BYTES = 1 << 28

_INSIDE = "megatron_klear.reward.sandbox.inside"
_MODULES = (
    *("channel", "kernel", "children", "programs", "plain", "shared", "remote", "pytest_part", "cases", "checks"),
    "server",
)

# Makes modules of the texts that come through the socket; nothing of the project's is on a path in the sandbox.
_BOOT = """
import marshal, os, sys, types
sys.path = [p for p in sys.path if p]
channel, control = 3, 4  # whatever numbers the parent had left: what is to be closed later has one below a known one
given = [int(number) for number in sys.argv[1].split(",")]
while min(given) <= control:
    given = [os.dup(number) if number <= control else number for number in given]
for number, fixed in zip(given, (channel, control)):
    os.dup2(number, fixed, inheritable=False)
    os.close(number)
os.closerange(control + 1, 4096)
def read(size):
    data = b""
    while len(data) < size:
        part = os.read(channel, size - len(data))
        if not part: sys.exit("the other side is gone")
        data += part
    return data
package = ""
for part in sys.argv[2].split("."):
    package = package + "." + part if package else part
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = []
for name, text in marshal.loads(read(int.from_bytes(read(8), "little"))):
    module = types.ModuleType(package + "." + name)
    sys.modules[module.__name__] = module
    setattr(sys.modules[package], name, module)
    exec(compile(text, "<sandbox " + name + ">", "exec"), module.__dict__)
sys.path += sys.argv[3:]
sys.argv[1:] = []
sys.modules[package + ".server"].serve(channel, control)
"""


@functools.cache
def module_texts() -> list[tuple[str, str]]:
    """Name and text of each module that runs inside, in the order of their imports."""
    folder = Path(__file__).with_name("inside")
    return [(name, (folder / f"{name}.py").read_text("utf-8")) for name in _MODULES]


class SandboxError(Exception):
    """The sandbox failed, which says nothing of the answer in it."""


class NoTime(Exception):
    """The machine had no processor for a test in all the time that it was given, which says nothing of the answer."""


class TestResult(NamedTuple):
    """What a test did.

    Attributes:
        output: what it wrote, as far as the limit on output allows.
        problem: why it did not come to a good end, naming the limit or the error; empty when it did.
    """

    output: bytes
    problem: str


class SandboxProcess:
    """One sandbox, for one answer after the other; used by a single thread, but `kill` may come from any.

    Args:
        mode: `bubblewrap`, or `rlimits` for limits and system call filter only.
        python: interpreter that runs the answers.
        extra_paths: folders that answers may read and import from.
        warm_modules: modules to import once, before any answer.

    Raises:
        RewardError: bubblewrap or the interpreter is not there, or the machine is not known.
        OSError: no process can be started.
    """

    def __init__(
        self,
        mode: SandboxMode = "bubblewrap",
        *,
        python: str = "/usr/bin/python3",
        extra_paths: tuple[str, ...] = (),
        warm_modules: tuple[str, ...] = (),
    ) -> None:
        self.mode, self._extra_paths, self._warm_modules = mode, extra_paths, warm_modules
        self._interpreter = find_interpreter(python)
        self._filters: dict[bool, bytes] = {}
        self._number = 0
        self._standing: list[int] = []
        with ExitStack() as on_failure:
            self._errors = on_failure.enter_context(tempfile.TemporaryFile())
            self._folder = ""
            if mode == "rlimits":
                self._folder = tempfile.mkdtemp(prefix="klear-code-")
                on_failure.callback(_remove, self._folder)
            self._channel, theirs = socket.socketpair()
            on_failure.enter_context(self._channel)
            self._control, their_control = socket.socketpair()
            on_failure.enter_context(self._control)
            with theirs, their_control:
                self._process = self._start(theirs.fileno(), their_control.fileno())
            on_failure.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Block until the interpreter inside is warm.

        Raises:
            RewardError: it ended or did not report in time; says what to change.
        """
        deadline = time.monotonic() + START_SECONDS
        settings = {"isolated": self.mode == "bubblewrap", "scratch": self._scratch, "warm_modules": self._warm_modules}
        try:
            self._send(module_texts())
            self._send(settings)
            limit, _, output, _ = self._read_reply(deadline, "start")
        except (OSError, SandboxError) as error:
            self.kill()
            printed = self._printed()
            if self.mode == "bubblewrap" and "bwrap:" in printed:
                raise RewardError(explain_refusal(printed, self._extra_paths)) from error
            raise RewardError(f"the sandbox for code cannot be started: {printed or error}") from error
        if limit == NO_MODULE:
            self.kill()
            told = output.decode("utf-8", "replace")
            raise RewardError(
                f"code_reward.warm_modules: {self._interpreter.executable} cannot import {told}; in the sandbox it has "
                "its own library and code_reward.extra_paths"
            )
        self._standing = standing_processes(self._process.pid, _TESTS_DEPTH[self.mode])

    def open(self, sources: dict[str, str], limits: Limits) -> str:
        """Begin with an answer.

        Args:
            sources: code by name, run one after the other in one namespace.
            limits: of every test.

        Returns:
            Why it cannot be compiled; empty where it can.

        Raises:
            SandboxError: the sandbox failed; it is of no more use.
            NoTime: it cannot be told whether it can be compiled.
        """
        self._limits = limits
        message = {
            **limits.to_message(),
            "filter": self._filter(limits.allow_processes),
            "pid_placeholder": OWN_PID,
            "number": self._number,
        }
        try:
            self._channel.sendall(b"S")
        except OSError as error:
            raise SandboxError(f"it has ended: {self._printed() or error}") from error
        return self._ask({**sources, "limits": message}, "compilation").problem

    def run(self, test: dict[str, Any], *, answered: bool = True) -> TestResult:
        """Run one test of the answer that was opened.

        Args:
            test: `kind` stdin with `input`, call with `function` and `arguments` (JSON), or assert with what
                `checks.check_answer` takes.
            answered: whether a test of the kind assert meets the answer; if not, the output is a fault of its own.

        Raises:
            SandboxError, NoTime: see `open`.
        """
        if test["kind"] != "assert":
            return self._ask(test, "test")
        # In two messages: the first starts the answer's process, which must never have seen the second.
        with contextlib.suppress(OSError):  # told by what follows
            self._send({"kind": "assert", "answered": answered, "owed": test["owed"], "stubs": test["stubs"]})
        return self._ask({name: value for name, value in test.items() if name != "kind"}, "test")

    def close_answer(self) -> None:
        """End the answer's session; its processes and files are gone."""
        self._send({})

    def kill(self) -> None:
        """End everything in the sandbox at once and reap it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.mode == "rlimits":
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        try:
            self._process.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            logger.warning("sandbox %d does not end after SIGKILL", self.pid)

    def discard(self) -> None:
        """Kill, and give back sockets and files; only from the thread that uses the sandbox."""
        self.kill()
        self._channel.close()
        self._control.close()
        self._errors.close()
        if self._folder:
            _remove(self._folder)

    @property
    def _over_wall(self) -> str:
        return f"time limit: more than {self._limits.wall_seconds:g} s by the clock"

    @property
    def _scratch(self) -> str:
        return os.path.join(self._folder, "scratch") if self._folder else SCRATCH

    def _start(self, channel_fd: int, control_fd: int) -> subprocess.Popen[bytes]:
        variables = environment(self._interpreter)
        command: list[str] = []
        if self.mode == "bubblewrap":
            command = bubblewrap_command(self._interpreter, self._extra_paths)
            for name, value in variables.items():
                command += ["--setenv", name, value]
        else:
            variables.update(HOME=self._scratch, TMPDIR=self._scratch)
        flags = ["-S", "-s", "-B", "-X", "utf8"]
        fds = f"{channel_fd},{control_fd}"
        command += [self._interpreter.executable, *flags, "-c", _BOOT, fds, _INSIDE, *self._extra_paths]
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            # The kernel does not count the processes of root, and a sandbox needs no rights.
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            if self._folder:
                os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[channel_fd, control_fd],
            env=variables,
            cwd="/",
            start_new_session=True,
            **user,
        )

    def _filter(self, allow_processes: bool) -> bytes:
        if allow_processes not in self._filters:
            try:
                self._filters[allow_processes] = filter_program(allow_processes=allow_processes)
            except UnsupportedMachine as error:
                raise RewardError(f"code_reward.sandbox: {error}; code cannot be confined on it") from error
        return self._filters[allow_processes]

    def _ask(self, message: dict[str, Any], what: str) -> TestResult:
        number, self._number = self._number, self._number + 1
        try:
            self._send(message)
            in_vain = self._wait()
            if in_vain is not None:
                self._control.sendall(NUMBER.pack(number))
            result = self._reply(time.monotonic() + _SLACK_SECONDS, what)
        except OSError as error:
            raise SandboxError(f"it ended during a {what}: {self._printed() or error}") from error
        if in_vain and result.problem == self._over_wall:
            raise NoTime(in_vain)
        return result

    def _wait(self) -> str | None:
        """Wait for the reply to a test; None when it is there.

        Otherwise the test is to be ended: with an empty text because its time by the clock is over, else with the
        reason why nothing can be said of it.
        """
        limits, began = self._limits, time.monotonic()
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        blame = Blame(self._process.pid, _TESTS_DEPTH[self.mode], self._standing)
        pause = limits.wall_seconds
        is_first = True
        while not poller.poll(pause * 1000):
            # Processes that a test has started take time from one another, and may hide what they have taken.
            lost = None if limits.allow_processes else blame.look()
            elapsed = time.monotonic() - began
            if lost is None and is_first and not limits.allow_processes:
                is_first, pause = False, _LOOK_SECONDS
                continue
            left = limits.wall_seconds + (lost or 0.0) - elapsed
            if left <= 0:
                return ""
            if elapsed >= limits.patience_seconds:
                return (
                    f"no verdict within {limits.patience_seconds:g} s by the clock: at most "
                    f"{limits.to_message()['cpu_seconds']:g} s of CPU time, the machine was busy with other work "
                    "(code_reward.cpu_seconds)"
                )
            pause = max(_LOOK_SECONDS, min(left, limits.patience_seconds - elapsed, _LOOKS_WHILE_HELD_UP))
        return None

    def _send(self, message: Any) -> None:
        data = marshal.dumps(message, 2)  # version 2: the sandbox's Python may be another one
        self._channel.settimeout(START_SECONDS)
        self._channel.sendall(LENGTH.pack(len(data)) + data)

    def _reply(self, deadline: float, what: str) -> TestResult:
        limit, status, output, errors = self._read_reply(deadline, what)
        if limit == BROKEN:
            raise SandboxError(output.decode("utf-8", "replace"))
        return TestResult(output, self._problem(limit, status, errors))

    def _read_reply(self, deadline: float, what: str) -> tuple[int, int, bytes, bytes]:
        head = self._read(REPLY.size, deadline, what)
        limit, status, num_output, num_errors = REPLY.unpack(head)
        if max(num_output, num_errors) > _MOST_REPLY_BYTES:
            raise SandboxError(f"a reply claims {num_output + num_errors} bytes")
        return limit, status, self._read(num_output, deadline, what), self._read(num_errors, deadline, what)

    def _problem(self, limit: int, status: int, errors: bytes) -> str:
        if limit == OVER_CPU:
            return f"time limit: more than {self._limits.to_message()['cpu_seconds']:g} s of CPU time"
        if limit == OVER_WALL:
            return self._over_wall
        if limit == OVER_OUTPUT:
            return f"output limit: more than {self._limits.output_bytes} bytes"
        if limit != ENDED:
            raise SandboxError(f"a reply names limit {limit}")
        if status == 0:
            return ""
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        said = printable(lines[-1]) if lines else ""
        if said.startswith("MemoryError"):
            return f"memory limit: more than {self._limits.memory_bytes} bytes"
        if said.startswith("OSError: [Errno 27]"):
            return f"file size limit: more than {self._limits.file_bytes} bytes"
        if said.startswith("OSError: [Errno 28]"):
            return f"scratch limit: more than {self._limits.scratch_bytes} bytes or {self._limits.scratch_files} files"
        if status < 0:
            name = _signal_name(-status)
            return f"ended by {name}" + (f": {said}" if said else "")
        return said or f"exit status {status}"

    def _read(self, size: int, deadline: float, what: str) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = self._channel.recv(min(size - len(data), 1 << 20))
            except TimeoutError as error:
                raise SandboxError(f"no answer from the sandbox during a {what}") from error
            if not part:
                raise SandboxError(f"it ended during a {what}: {self._printed() or 'it said nothing'}")
            data += part
        return bytes(data)

    def _printed(self) -> str:
        """The end of what the sandbox itself, not an answer, printed."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-1500:]


def _remove(folder: str) -> None:
    """Delete a folder, however deeply code has nested others in it."""
    subprocess.run(["rm", "-rf", folder], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def printable(line: str) -> str:
    """A line that untrusted code wrote, short and without control characters."""
    return "".join(char if char.isprintable() else "?" for char in line[:200])
