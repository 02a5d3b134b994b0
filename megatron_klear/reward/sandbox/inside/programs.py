"""What a test's process does: compile the answer, run it as a program, or call one of its functions."""

from __future__ import annotations

import atexit
import dis
import gc
import json
import marshal
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NamedTuple

RESULT_FD = 3
"""Where a call's result, or compiled code, is written to."""

_exit = os._exit


def compile_sources(sources: dict[str, str]) -> None:
    """Write the sources as compiled code; the process ends with status 1 and a traceback where that cannot be done."""

    def run() -> None:
        # A code object may be tampered with nowhere: the text is compiled, not run, in this process.
        code = {name: compile(source, f"<{name}>", "exec", dont_inherit=True) for name, source in sources.items()}
        _write(RESULT_FD, marshal.dumps(code))

    run_to_the_end(run)


class Loaded(NamedTuple):
    """Code that has run.

    Attributes:
        given: names of what ran before the answer.
        own: names that the answer binds, also to what they were bound to before.
    """

    given: dict[str, Any]
    own: dict[str, Any]


def run_program(compiled: bytes) -> None:
    """Run the code as a main program, with its input and output at file descriptors 0 and 1."""
    run_to_the_end(lambda: _execute(compiled, "__main__", lambda namespace: None))


def call_function(compiled: bytes, function: str, arguments: str) -> None:
    """Write the result of one call as JSON.

    Args:
        compiled: the code.
        function: its name; looked for in a class `Solution` first, as LiveCodeBench does.
        arguments: JSON of [args, kwargs].
    """

    def run() -> None:
        called = _function(load(compiled), function)
        args, kwargs = json.loads(arguments)
        result = called(*args, **kwargs)
        _write(RESULT_FD, json.dumps(result, default=_plain).encode("ascii"))

    run_to_the_end(run)


def load(compiled: bytes, before_answer: Callable[[dict[str, Any]], object] = lambda namespace: None) -> Loaded:
    """Run the code, the answer last, as a module.

    Args:
        before_answer: what to do with the namespace when all but the answer has run.
    """
    given: dict[str, Any] = {}

    def remember(namespace: dict[str, Any]) -> None:
        given.update(namespace)
        before_answer(namespace)

    answer, namespace = _execute(compiled, "answer", remember)
    bound = {step.argval for step in dis.get_instructions(answer) if step.opname in ("STORE_NAME", "STORE_GLOBAL")}
    unknown = object()
    own = {name: v for name, v in namespace.items() if name in bound or given.get(name, unknown) is not v}
    return Loaded(given, own)


def _execute(
    compiled: bytes, name: str, before_answer: Callable[[dict[str, Any]], object]
) -> tuple[types.CodeType, dict[str, Any]]:
    """Run the code in a module of this name; the answer's code, and the namespace that it ran in."""
    gc.enable()
    module = types.ModuleType(name)
    sys.modules[name] = module
    *first, answer = marshal.loads(compiled).values()  # made by this same interpreter, and run by this process only
    for code in first:
        exec(code, module.__dict__)
    before_answer(module.__dict__)
    exec(answer, module.__dict__)
    return answer, module.__dict__


def _function(loaded: Loaded, name: str) -> Callable[..., Any]:
    """A method of `Solution`, or a function, of the answer; where it has none, one that the preamble defines.

    Not one that the preamble imports: `from math import *` is no answer to a problem that asks for `gcd`.
    """
    home = loaded.given["__name__"]
    defined = {n: v for n, v in loaded.given.items() if getattr(v, "__module__", "") == home}
    for names in (loaded.own, defined):
        solution, found = names.get("Solution"), names.get(name)
        if isinstance(solution, type) and (callable(getattr(solution, name, None)) or not callable(found)):
            found = getattr(solution(), name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    raise NameError(f"the answer defines no function {name}")


def _plain(value: Any) -> Any:
    """Plain data for what JSON does not know; sets in sorted order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return value.tolist()
    if hasattr(value, "__iter__"):
        return list(value)
    raise TypeError(f"the result is no plain data but {type(value).__name__}")


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def run_to_the_end(run: Callable[[], object]) -> None:
    """Run untrusted code as an interpreter would: a traceback for an error, threads joined, output flushed."""
    status = 0
    try:
        run()
    except SystemExit as error:
        status = _status(error.code)
    except BaseException:
        status = 1
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 1
    _exit(status)


def _status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 255
    sys.stderr.write(str(code))
    return 1
