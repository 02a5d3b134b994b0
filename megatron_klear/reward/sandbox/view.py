"""What the sandbox shows of the machine: the interpreter, its library, the shared objects they load, three devices."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_klear.errors import RewardError

SandboxMode = Literal["bubblewrap", "rlimits"]

SCRATCH = "/scratch"
# What bubblewrap (0.4 to 0.11) says where the kernel, or a container around it, allows it no namespaces, no mapping of
# users, no network device or no mounts in them.
_NO_NAMESPACES = re.compile(
    r"namespace|[ug]id.?map|setgroups|loopback|RTM_NEW|Failed to make / (slave|private)|pivot_root"
    r"|mount (tmpfs|proc|devpts)"
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_PROBE_SECONDS = 60

# Run by the interpreter to be shown; loads every extension module of its library to learn what they are linked with.
_PROBE = """
import importlib, json, os, sys, sysconfig
paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
for name in sorted(os.listdir(os.path.join(sysconfig.get_path("platstdlib"), "lib-dynload"))):
    try:
        importlib.import_module(name.split(".")[0])
    except Exception:
        pass
for line in open("/proc/self/maps"):
    path = line.split(maxsplit=5)[5].strip() if line.count(" ") > 4 and "/" in line else ""
    if path.startswith("/") and not path.startswith(("/dev", "/memfd")) and os.path.isfile(path):
        if not any(path.startswith(p + "/") for p in paths) and ".so" in os.path.basename(path):
            paths.add(path)
print(json.dumps({
    "version": sys.version_info[:2], "executable": os.path.realpath(sys.executable), "paths": sorted(paths),
    "prefix": sys.base_prefix,
}))
"""


class Interpreter(NamedTuple):
    """A Python and the files it needs.

    Attributes:
        executable: its real path.
        mounts: (where it is, where it is to be seen) of every file and folder.
        prefix: its PYTHONHOME.
    """

    executable: str
    mounts: tuple[tuple[str, str], ...]
    prefix: str


@functools.cache
def find_interpreter(python: str) -> Interpreter:
    """Ask a Python what it is made of.

    Raises:
        RewardError: it cannot be run, or is older than 3.10.
    """
    try:
        found = subprocess.run(
            [python, "-I", "-S", "-c", _PROBE], capture_output=True, timeout=_PROBE_SECONDS, check=True, env={}
        )
        told = json.loads(found.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise RewardError(f"code_reward.python: {python} cannot be used to run answers: {error}") from error
    if tuple(told["version"]) < (3, 10):
        raise RewardError(f"code_reward.python: {python} is Python {told['version']}, must be 3.10 or later")
    mounts = [(told["executable"], told["executable"])]
    # A library is looked for by the name it was linked with, often a symbolic link to the file that is mapped.
    mounts += [(path, path) for path in told["paths"]]
    mounts += [(path, name) for path in told["paths"] for name in _other_names(path)]
    return Interpreter(told["executable"], tuple(dict.fromkeys(mounts)), told["prefix"])


def _other_names(path: str) -> list[str]:
    """Symbolic links in a library's folder that end at it, and the loader's fixed place."""
    if not os.path.isfile(path):
        return []
    folder = os.path.dirname(path)
    names = [
        e.path for e in os.scandir(folder) if e.is_symlink() and os.path.realpath(e.path) == os.path.realpath(path)
    ]
    names += [str(p) for p in Path("/lib64").glob("ld-linux*") if os.path.realpath(p) == os.path.realpath(path)]
    names += [str(p) for p in Path("/lib").glob("ld-linux*") if os.path.realpath(p) == os.path.realpath(path)]
    return names


def bubblewrap_command(interpreter: Interpreter, extra_paths: tuple[str, ...]) -> list[str]:
    """The command that runs a program in the sandbox; the program's own command line comes behind it.

    CAP_SYS_ADMIN holds in the sandbox's own user namespace only, for the server, which makes each session's namespaces
    and scratch folder with it; tests have no capability.

    Raises:
        RewardError: there is no bubblewrap.
    """
    program = shutil.which("bwrap", path=os.environ.get("PATH", "") + ":/usr/bin")
    if program is None:
        raise RewardError(
            "code_reward.sandbox: bubblewrap (the program bwrap) is not installed; install the distribution's package "
            "bubblewrap, or set code_reward.sandbox=rlimits for code that may read this machine's files"
        )
    command = [
        program,
        *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--as-pid-1", "--new-session", "--clearenv", "--hostname", "sandbox"),
        *("--cap-add", "CAP_SYS_ADMIN"),
    ]
    for source, place in (*interpreter.mounts, *((path, path) for path in extra_paths)):
        command += ["--ro-bind", source, place]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--dir", SCRATCH, "--chdir", "/", "--remount-ro", "/"]


def environment(interpreter: Interpreter) -> dict[str, str]:
    """All that code sees of an environment; with a fixed hash seed, sets have the same order in every run."""
    home = {} if interpreter.prefix in ("/usr", "/usr/local") else {"PYTHONHOME": interpreter.prefix}
    # Fewer malloc arenas: each reserves address space, which the memory limit counts, for every thread.
    variables = {"PYTHONHASHSEED": "0", "PATH": "/usr/bin", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2"}
    return {**variables, "HOME": SCRATCH, "TMPDIR": SCRATCH, **home}


def explain_refusal(printed: str, extra_paths: tuple[str, ...] = ()) -> str:
    """What to do about a bubblewrap that makes no sandbox.

    Args:
        printed: what it said.
        extra_paths: folders that it was told to show.
    """
    who = "root" if os.geteuid() == 0 else "a normal user"
    hidden = [path for path in extra_paths if f"source path {path}:" in printed]
    if hidden:
        user = "the user nobody, as whom root runs sandboxes," if os.geteuid() == 0 else "this user"
        return f"code_reward.extra_paths: {user} must be able to reach {', '.join(hidden)}: {printed}"
    if not _NO_NAMESPACES.search(printed):
        return f"code_reward.sandbox: bubblewrap makes no sandbox, started by {who}: {printed}"
    return (
        f"code_reward.sandbox: bubblewrap cannot make a sandbox here, started by {who}: {printed or 'no reason'}. "
        "The kernel must allow user namespaces to unprivileged users (sysctl user.max_namespaces, "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), and a container's own "
        "seccomp and AppArmor profiles must, too (docker run --security-opt seccomp=unconfined --security-opt "
        "apparmor=unconfined). Or set code_reward.sandbox=rlimits: code then has limits and the filter of system "
        "calls, but can read this machine's files"
    )
