"""The system calls that untrusted code may make, as a seccomp filter.

A list of what is allowed, not of what is forbidden: calls that a later kernel brings are refused, too. Refused calls
fail with EPERM, so that code gets a `PermissionError`; numbers beyond the table fail with ENOSYS, so that a newer C
library falls back. The filter is part of the sandbox, and all there is of one in `rlimits` mode besides the limits.

Not allowed, among others: sockets (a connected pair excepted), ptrace and other processes' memory, new namespaces,
mounts, System V and POSIX queues and shared memory, memfd (memory that no limit counts), keys, bpf, io_uring, perf.
Signals reach the process itself only, whatever call they would be sent by, and new processes are refused unless a
setting allows them.

Numbers: the kernel's headers, asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import platform
import struct
from typing import NamedTuple

# name:x86_64:aarch64, "-" where an architecture has no such call
_PLAIN = """
    read:0:63 write:1:64 close:3:57 fstat:5:80 lstat:6:- stat:4:- newfstatat:262:79 statx:332:291 lseek:8:62
    mmap:9:222 mprotect:10:226 munmap:11:215 mremap:25:216 madvise:28:233 msync:26:227 brk:12:214 rt_sigaction:13:134
    rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133
    sigaltstack:131:132 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70
    preadv2:327:286 pwritev2:328:287 access:21:- faccessat:269:48 faccessat2:439:439 pipe:22:- pipe2:293:59
    select:23:- pselect6:270:72 poll:7:- ppoll:271:73 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19 sched_yield:24:124
    sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
    sched_get_priority_min:147:126 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
    gettimeofday:96:169 time:201:- times:100:153 getitimer:36:102 setitimer:38:103 alarm:37:- pause:34:- getpid:39:172
    getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getgroups:115:158
    getresuid:118:148 getresgid:120:150 getpgrp:111:- getpgid:121:155 getsid:124:156 getrlimit:97:163
    setrlimit:160:164 getrusage:98:165 getpriority:140:141 sysinfo:99:179 uname:63:160 umask:95:166 getcwd:79:17
    getcpu:309:168 chdir:80:49 fchdir:81:50 open:2:- openat:257:56 creat:85:- mkdir:83:- mkdirat:258:34 rmdir:84:-
    unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:-
    symlinkat:266:36 readlink:89:- readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53 utime:132:- utimes:235:-
    utimensat:280:88 futimesat:261:- truncate:76:45 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83
    flock:73:32 dup:32:23 dup2:33:- dup3:292:24 getdents:78:- getdents64:217:61 fadvise64:221:223
    copy_file_range:326:285 sendfile:40:71 statfs:137:43 fstatfs:138:44 futex:202:98 set_tid_address:218:96
    set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 arch_prctl:158:- restart_syscall:219:128 exit:60:93
    exit_group:231:94 wait4:61:260 waitid:247:95 membarrier:324:283 getrandom:318:278 sendto:44:206 recvfrom:45:207
    shutdown:48:210 getsockname:51:204 getsockopt:55:209
"""

_CHECKED = """
    clone:56:220 clone3:435:435 fork:57:- vfork:58:- execve:59:221 setsid:112:157 setpgid:109:154 kill:62:129
    tkill:200:130 tgkill:234:131 ioctl:16:29 prctl:157:167 prlimit64:302:261 socketpair:53:199
    fcntl:72:25
"""

_NEWEST_CALL = 462
"""Calls above this number are newer than the table."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 1, "aarch64": 2}

_ALLOW = 0x7FFF0000
_EPERM, _EAGAIN, _ENOSYS = 0x00050001, 0x0005000B, 0x00050026

_CLONE_THREAD = 0x00010000
_CLONE_NEW_NAMESPACES = 0x7E020080
_AF_UNIX = 1
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ (is it a terminal?), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""

_FCNTLS = (0, 1, 2, 3, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL; locks of the process and of the open file; F_DUPFD_CLOEXEC, the size of a pipe.

Not those that choose who is signalled when a file can be read, and with what (F_SETOWN, F_SETOWN_EX, F_SETSIG): the
kernel sends such a signal without asking this filter. Nor leases and notices (F_SETLEASE, F_NOTIFY), which signal too.
"""
_F_SETFL, _O_ASYNC = 4, 0x2000

OWN_PID = 0x7FFFFFF1
"""Stands in the filter where the process id of the filtered process goes; the sandbox puts it in after the fork."""

# Classic BPF: load a word, jump if equal / if any bit set / if at least, jump, return.
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _JUMP, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x05, 0x06
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data


class _Op(NamedTuple):
    """One instruction; jumps count the instructions to pass over."""

    code: int
    value: int
    if_true: int = 0
    if_false: int = 0


class UnsupportedMachine(Exception):
    """The table has no numbers for this processor."""


def filter_program(machine: str | None = None, *, allow_processes: bool = False) -> bytes:
    """The filter as an array of `struct sock_filter`, with `OWN_PID` still to be replaced.

    Args:
        machine: `x86_64` or `aarch64`; default this one.
        allow_processes: also allow fork, exec and signals to other processes of the sandbox.

    Raises:
        UnsupportedMachine: another processor.
    """
    machine = machine or platform.machine()
    if machine not in _COLUMN:
        raise UnsupportedMachine(f"no system call table for {machine!r}, only for {', '.join(_COLUMN)}")
    decisions: dict[int, tuple[_Op, ...]] = dict.fromkeys(_numbers(_PLAIN, machine).values(), (_Op(_RETURN, _ALLOW),))
    decisions |= {n: tuple(_checks(name, allow_processes)) for name, n in _numbers(_CHECKED, machine).items()}
    refused = (_Op(_RETURN, _EPERM),)
    ranges: list[tuple[int, tuple[_Op, ...]]] = []
    for number in range(_NEWEST_CALL + 1):
        decision = decisions.get(number, refused)
        if not ranges or ranges[-1][1] != decision:
            ranges.append((number, decision))
    ranges.append((_NEWEST_CALL + 1, (_Op(_RETURN, _ENOSYS),)))  # also x32 calls, which have bit 30 set
    ops = [
        _Op(_LOAD, _ARCH),
        _Op(_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _Op(_RETURN, _EPERM),
        _Op(_LOAD, _NUMBER),
        *_search(ranges),
    ]
    return b"".join(struct.pack("=HBBI", op.code, op.if_true, op.if_false, op.value) for op in ops)


def _search(ranges: list[tuple[int, tuple[_Op, ...]]]) -> list[_Op]:
    """Decide by binary search: the kernel tries every number when a filter is installed, once per test."""
    if len(ranges) == 1:
        return list(ranges[0][1])
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    return [_Op(_AT_LEAST, ranges[middle][0], 0, 1), _Op(_JUMP, len(below)), *below, *above]


def _numbers(table: str, machine: str) -> dict[str, int]:
    rows = [entry.split(":") for entry in table.split()]
    return {row[0]: int(row[_COLUMN[machine]]) for row in rows if row[_COLUMN[machine]] != "-"}


def _checks(name: str, allow_processes: bool) -> list[_Op]:
    """The instructions that decide a call by its arguments; every path ends in a return."""
    if name == "clone3":  # its flags lie in memory, out of a filter's sight: the C library falls back to clone
        return [_Op(_RETURN, _ENOSYS)]
    if name == "clone":
        no_namespaces = [_argument(0), _Op(_ANY_BIT, _CLONE_NEW_NAMESPACES, 0, 1), _Op(_RETURN, _EPERM)]
        if allow_processes:
            return [*no_namespaces, _Op(_RETURN, _ALLOW)]
        return [*no_namespaces, _Op(_ANY_BIT, _CLONE_THREAD, 1, 0), _Op(_RETURN, _EAGAIN), _Op(_RETURN, _ALLOW)]
    if name in ("fork", "vfork"):
        return [_Op(_RETURN, _ALLOW if allow_processes else _EAGAIN)]
    if name in ("execve", "setsid", "setpgid"):
        return [_Op(_RETURN, _ALLOW if allow_processes else _EPERM)]
    if name in ("kill", "tgkill"):
        return [_Op(_RETURN, _ALLOW)] if allow_processes else _one_of(0, (OWN_PID,))
    if name == "tkill":
        return [_Op(_RETURN, _ALLOW if allow_processes else _EPERM)]
    if name == "ioctl":
        return _one_of(1, _IOCTLS)
    if name == "fcntl":
        no_signals = [_argument(2), _Op(_ANY_BIT, _O_ASYNC, 0, 1), _Op(_RETURN, _EPERM), _Op(_RETURN, _ALLOW)]
        return [_argument(1), _Op(_EQUAL, _F_SETFL, 0, len(no_signals)), *no_signals, *_one_of(1, _FCNTLS)]
    if name == "prctl":
        return _one_of(0, (_PR_SET_NAME, _PR_GET_NAME))
    if name == "prlimit64":
        return _one_of(0, (0,))
    if name == "socketpair":
        return _one_of(0, (_AF_UNIX,))
    raise AssertionError(name)


def _argument(index: int) -> _Op:
    """Load the low half of an argument; both processors are little-endian."""
    return _Op(_LOAD, 16 + 8 * index)


def _one_of(index: int, values: tuple[int, ...]) -> list[_Op]:
    ops = [_argument(index)]
    for value in values:
        ops += [_Op(_EQUAL, value, 0, 1), _Op(_RETURN, _ALLOW)]
    return [*ops, _Op(_RETURN, _EPERM)]
