"""The sandbox's first process: one session per answer, in namespaces of its own, forked from a warm interpreter.

It never sees an answer itself, so that nothing of one can be found in the memory of the next one's processes.
Messages to it are marshalled, with a length in front; answers are structs and bytes, which cannot be forged into code.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import struct
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_klear.reward.sandbox.inside import checks, kernel, programs
from megatron_klear.reward.sandbox.inside.channel import discard, receive, write
from megatron_klear.reward.sandbox.inside.children import OVER_WALL, Box, Ended

REPLY = struct.Struct("<BiQQ")
"""Limit, status, bytes of output, bytes of errors; both follow."""

BROKEN, NO_MODULE = 255, 254
"""In place of the limit: the session failed, or a module cannot be imported, and the output says how."""

_CODE_BYTES = 1 << 24
"""Most that an answer may compile to."""

_WARM = (
    *("bisect", "collections", "copy", "decimal", "fractions", "functools", "heapq", "io", "itertools", "json", "math"),
    *("operator", "random", "re", "string", "typing"),
)
"""Imported once here, so that the processes of the tests find them loaded."""


def serve(channel_fd: int, control_fd: int) -> None:
    """Serve sessions until the other side of the sockets closes.

    Args:
        channel_fd: brings the answers and their tests, and takes what came of them.
        control_fd: brings the numbers of tests to end, see `children.Box`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kernel.hide_memory()
    settings = receive(channel_fd)
    if not settings["isolated"]:
        kernel.die_with_parent()
    for name in _WARM:
        importlib.import_module(name)
    for name in settings["warm_modules"]:
        try:
            importlib.import_module(name)
        except BaseException as error:
            _reply_broken(channel_fd, f"{name}: {type(error).__name__}: {error}", NO_MODULE)
            return
    gc.collect()
    gc.disable()
    gc.freeze()
    os.write(channel_fd, REPLY.pack(0, 0, 0, 0))
    while os.read(channel_fd, 1):
        pid = os.fork()
        if pid == 0:
            _guarded(_open_session, channel_fd, {**settings, "control_fd": control_fd})
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            # It has said why, or was killed: the other side must not wait for it.
            _reply_broken(channel_fd, "the session ended before its time")
            return


def _open_session(channel_fd: int, settings: dict[str, Any]) -> None:
    """Become, or start, the first process of fresh namespaces."""
    if settings["isolated"]:
        kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        pid = os.fork()
        if pid:
            os._exit(0 if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else 1)
    _session(channel_fd, settings)


def _session(channel_fd: int, settings: dict[str, Any]) -> None:
    """Run one answer's tests, one message each; an empty message ends it."""
    if not settings["isolated"]:
        kernel.die_with_parent()
    sources = receive(channel_fd)
    box = Box({**settings, **sources.pop("limits")}, settings["control_fd"])
    compiled, ended = _compile(box, sources)
    _reply(channel_fd, ended)
    while test := receive(channel_fd):
        if test["kind"] == "stdin":
            ended = _run(box, lambda: programs.run_program(compiled), stdin=test["input"], output_fd=1)
        elif test["kind"] == "call":
            ended = _run(
                box,
                lambda: programs.call_function(compiled, test["function"], test["arguments"]),
                output_fd=programs.RESULT_FD,
            )
        else:
            body = (lambda: checks.serve_answer(compiled, test["owed"], test["stubs"])) if test["answered"] else None
            ended = _run_checks(box, body, channel_fd)
            if ended.limit == OVER_WALL:  # perhaps before it had read the test; the other side sends no more until told
                discard(channel_fd)
        _reply(channel_fd, ended)


def _compile(box: Box, sources: dict[str, str]) -> tuple[bytes, Ended]:
    ended = _run(box, lambda: programs.compile_sources(sources), output_fd=programs.RESULT_FD, room=_CODE_BYTES)
    return ended.output, ended._replace(output=b"")


def _run(box: Box, body: Any, *, output_fd: int, stdin: str | None = None, room: int = 0) -> Ended:
    """One process, its output taken from one of its file descriptors."""
    box.fresh_scratch()
    fds: list[int | None] = [None, None, None, None]
    opened = []
    if stdin is not None:
        given = fds[0] = os.memfd_create("stdin")
        opened.append(given)
        with open(given, "wb", closefd=False) as file:
            file.write(stdin.encode("utf-8", "surrogatepass"))
            file.seek(0)
    output, fds[output_fd] = os.pipe()
    errors, fds[2] = os.pipe()
    pid = box.start(body, fds[: max(output_fd, 2) + 1])
    for fd in (fds[output_fd], fds[2], *opened):
        assert fd is not None
        os.close(fd)
    ended = box.watch(pid, output, errors, room or box.settings["output_bytes"])
    os.close(output)
    os.close(errors)
    return ended


def _run_checks(box: Box, answer: Callable[[], None] | None, channel_fd: int) -> Ended:
    """The answer in one process, the test in another, a pipe each way; the test's process gives the verdict.

    Without an answer, the test's process is alone and tells its own faults.

    That process reads the test from the channel by itself: what this one has seen, its children can find in memory.
    """
    box.fresh_scratch()
    to_answer, from_tests = os.pipe()
    to_tests, from_answer = os.pipe()
    verdict, give_verdict = os.pipe()
    errors, give_errors = os.pipe()
    if answer is not None:
        box.start(answer, [None, None, None, to_answer, from_answer])
    body = checks.try_without_answer if answer is None else checks.check_answer
    tests = box.start(body, [None, None, give_errors, to_tests, from_tests, give_verdict, channel_fd])
    for fd in (to_answer, from_tests, to_tests, from_answer, give_verdict, give_errors):
        os.close(fd)
    ended = box.watch(tests, verdict, errors, box.settings["output_bytes"])
    os.close(verdict)
    os.close(errors)
    return ended


def _guarded(run: Any, channel_fd: int, settings: dict[str, Any]) -> NoReturn:
    """Run and leave; what goes wrong is told to the other side, once."""
    try:
        run(channel_fd, settings)
    except BaseException as error:
        _reply_broken(channel_fd, f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def _reply(channel_fd: int, ended: Ended) -> None:
    head = REPLY.pack(ended.limit, ended.status, len(ended.output), len(ended.errors))
    write(channel_fd, head + ended.output + ended.errors)


def _reply_broken(channel_fd: int, text: str, how: int = BROKEN) -> None:
    data = text.encode("utf-8", "replace")
    write(channel_fd, REPLY.pack(how, 0, len(data), 0) + data)
