"""Calls into the kernel that Python's standard library does not offer, through libc."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG = 4, 22, 38, 1
_SECCOMP_MODE_FILTER = 2
_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def hide_memory() -> None:
    """Keep other processes of the same user from reading or tracing this one and what is forked from it."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def unshare(flags: int) -> None:
    """Leave the shared namespaces that the flags name."""
    _call("unshare", flags)


def mount_scratch(path: str, size_bytes: int, files: int) -> None:
    """Put an empty file system in memory at `path`, bounded in bytes and in number of files."""
    options = f"size={size_bytes},nr_inodes={files},mode=700".encode("ascii")
    _call("mount", b"scratch", path.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)


def unmount(path: str) -> None:
    """Take a mount away, with all that is in it, also while it is in use."""
    _call("umount2", path.encode(), _MNT_DETACH)


def drop_capabilities() -> None:
    """Give up every capability, for good: bubblewrap has set no_new_privs."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install_filter(program: bytes, pid_placeholder: int) -> None:
    """Restrict the system calls of this process for good.

    Args:
        program: array of `struct sock_filter`.
        pid_placeholder: value in it that stands for this process's id.
    """
    program = program.replace(struct.pack("=I", pid_placeholder), struct.pack("=I", os.getpid()))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filter_program = _FilterProgram(len(program) // 8, program)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_program), 0, 0)


def set_limits(limits: dict[str, int]) -> None:
    """Set resource limits, soft and hard alike but for the CPU time, which warns a second before it kills.

    Args:
        limits: what `sandbox.limits.Limits.to_message` makes.
    """
    seconds = limits["cpu_seconds"]
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["tasks"], limits["tasks"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_STACK, limits["stack_bytes"], limits["stack_bytes"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        allowed = resource.getrlimit(kind)[1]
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(kind, (soft, hard))
