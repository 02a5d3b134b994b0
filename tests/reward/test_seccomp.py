"""The system call filter, run by an interpreter of its own for every number and some arguments."""

from __future__ import annotations

import struct

import pytest

from megatron_klear.reward.sandbox.seccomp import OWN_PID, UnsupportedMachine, filter_program

ALLOW, EPERM, EAGAIN, ENOSYS = 0x7FFF0000, 0x50001, 0x5000B, 0x50026
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
THREAD_FLAGS = 0x003D0F00  # what the C library passes for a thread

# From the kernel's tables, by hand: read write openat mmap futex exit_group; socket connect ptrace mount unshare
# setns bpf io_uring_setup keyctl memfd_create process_vm_readv perf_event_open userfaultfd shmget mq_open sendmsg.
GOOD = {"x86_64": [0, 1, 257, 9, 202, 231], "aarch64": [63, 64, 56, 222, 98, 94]}
BAD = {
    "x86_64": [41, 42, 101, 165, 272, 308, 321, 425, 250, 319, 310, 298, 323, 29, 240, 46, 56 + 0x40000000],
    "aarch64": [198, 203, 117, 40, 97, 268, 280, 425, 219, 279, 270, 241, 282, 194, 180, 211],
}
CALLS = {
    "x86_64": {"clone": 56, "fork": 57, "kill": 62, "tgkill": 234, "ioctl": 16, "prctl": 157, "socketpair": 53,
               "prlimit64": 302, "execve": 59, "clone3": 435, "fcntl": 72},
    "aarch64": {"clone": 220, "kill": 129, "tgkill": 131, "ioctl": 29, "prctl": 167, "socketpair": 199,
                "prlimit64": 261, "execve": 221, "clone3": 435, "fcntl": 25},
}  # fmt: skip


def decide(program: bytes, number: int, arch: int, *arguments: int) -> int:
    """What the filter returns; jumps, loads and comparisons as the kernel defines them."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(list(arguments) + [0] * 6)[:6])
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = value = 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif code == 0x06:
            return operand
        elif code == 0x05:
            at += operand
        else:
            taken = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            at += if_true if taken else if_false


@pytest.mark.parametrize("machine", list(ARCH))
def test_decisions(machine: str) -> None:
    program, arch, calls = filter_program(machine), ARCH[machine], CALLS[machine]
    assert {decide(program, n, arch) for n in GOOD[machine]} == {ALLOW}
    assert {decide(program, n, arch) for n in BAD[machine]} <= {EPERM, ENOSYS}
    assert {decide(program, n, arch ^ 1) for n in GOOD[machine]} == {EPERM}
    assert {decide(program, n, arch) for n in range(463, 2000)} == {ENOSYS}
    assert decide(program, calls["clone"], arch, 17) == EAGAIN
    assert decide(program, calls["clone"], arch, THREAD_FLAGS) == ALLOW
    assert decide(program, calls["clone"], arch, THREAD_FLAGS | 0x10000000) == EPERM
    assert decide(program, calls["clone3"], arch) == ENOSYS
    assert decide(program, calls["execve"], arch) == EPERM
    for call in ("kill", "tgkill"):
        assert decide(program, calls[call], arch, OWN_PID) == ALLOW
        assert {decide(program, calls[call], arch, pid) for pid in (0, 1, 2**32 - 1, OWN_PID + 1)} == {EPERM}
    assert decide(program, calls["ioctl"], arch, 0, 0x5401) == ALLOW
    assert decide(program, calls["ioctl"], arch, 0, 0x5412) == EPERM  # TIOCSTI types into a terminal
    assert decide(program, calls["prctl"], arch, 15) == ALLOW
    assert decide(program, calls["prctl"], arch, 4) == EPERM
    assert [decide(program, calls["socketpair"], arch, family) for family in (1, 2, 16)] == [ALLOW, EPERM, EPERM]
    assert [decide(program, calls["prlimit64"], arch, pid) for pid in (0, 1)] == [ALLOW, EPERM]


# timer_create, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, tkill; by the kernel's tables, by hand.
SIGNALLING = {"x86_64": [222, 129, 297, 424, 200], "aarch64": [107, 138, 240, 424, 130]}


@pytest.mark.parametrize("machine", list(ARCH))
def test_no_file_descriptor_signals_another_process(machine: str) -> None:
    """`fcntl` and `ioctl` can name an owner of a file, whom the kernel then signals."""
    program, arch, calls = filter_program(machine), ARCH[machine], CALLS[machine]
    # F_SETOWN, F_SETSIG, F_GETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY, F_ADD_SEALS
    refused = {decide(program, calls["fcntl"], arch, 3, cmd) for cmd in (8, 10, 11, 15, 1024, 1026, 1033)}
    assert refused == {EPERM}
    assert [decide(program, calls["fcntl"], arch, 3, 4, flags) for flags in (0x800, 0x2000, 0x2800)] == [
        ALLOW, EPERM, EPERM,
    ]  # fmt: skip
    assert {decide(program, calls["fcntl"], arch, 3, cmd, 0x2000) for cmd in (0, 1, 2, 3, 6, 7, 37, 1030)} == {ALLOW}
    # FIOASYNC, FIOSETOWN, SIOCSPGRP, TIOCSPGRP
    assert {decide(program, calls["ioctl"], arch, 3, n) for n in (0x5452, 0x8901, 0x8902, 0x5410)} == {EPERM}
    assert decide(program, calls["prctl"], arch, 1, 9) == EPERM  # PR_SET_PDEATHSIG
    assert {decide(program, n, arch) for n in SIGNALLING[machine]} == {EPERM}


def test_processes_where_they_are_allowed_but_no_namespaces() -> None:
    program, arch = filter_program("x86_64", allow_processes=True), ARCH["x86_64"]
    assert {decide(program, n, arch, 17) for n in (56, 57, 58, 59, 62)} == {ALLOW}
    assert decide(program, 56, arch, 17 | 0x10000000) == EPERM
    assert decide(program, 41, arch) == EPERM


def test_an_unknown_processor_is_refused() -> None:
    with pytest.raises(UnsupportedMachine, match="riscv64"):
        filter_program("riscv64")
