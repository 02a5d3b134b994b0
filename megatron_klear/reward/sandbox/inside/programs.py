"""What a test's process does: compile the answer, run it as a program, or call one of its functions."""

from __future__ import annotations

import atexit
import gc
import json
import marshal
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

RESULT_FD = 3
"""Where a call's result, or compiled code, is written to."""

_exit = os._exit


def compile_sources(sources: dict[str, str]) -> None:
    """Write the sources as compiled code; the process ends with status 1 and a traceback where that cannot be done."""

    def run() -> None:
        # A code object may be tampered with nowhere: the text is compiled, not run, in this process.
        code = {name: compile(source, f"<{name}>", "exec", dont_inherit=True) for name, source in sources.items()}
        _write(RESULT_FD, marshal.dumps(code))

    _run_to_the_end(run)


def run_program(compiled: bytes) -> None:
    """Run the code as a main program, with its input and output at file descriptors 0 and 1."""
    _run_to_the_end(lambda: _namespace(compiled, "__main__"))


def call_function(compiled: bytes, function: str, arguments: str) -> None:
    """Write the result of one call as JSON.

    Args:
        compiled: the code.
        function: its name; also looked for in a class `Solution`.
        arguments: JSON of [args, kwargs].
    """

    def run() -> None:
        called = _function(_namespace(compiled, "answer"), function)
        args, kwargs = json.loads(arguments)
        result = called(*args, **kwargs)
        _write(RESULT_FD, json.dumps(result, default=_plain).encode("ascii"))

    _run_to_the_end(run)


def load(compiled: bytes) -> dict[str, Any]:
    """The namespace of the code, run as a module."""
    return _namespace(compiled, "answer")


def run_to_the_end(run: Callable[[], object]) -> None:
    """Run untrusted code as an interpreter would: a traceback for an error, threads joined, output flushed."""
    _run_to_the_end(run)


def _namespace(compiled: bytes, name: str) -> dict[str, Any]:
    gc.enable()
    gc.unfreeze()
    module = types.ModuleType(name)
    sys.modules[name] = module
    for code in marshal.loads(compiled).values():  # made by this same interpreter, and run by nobody but this process
        exec(code, module.__dict__)
    return module.__dict__


def _function(namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    found = namespace.get(name)
    if not callable(found) and "Solution" in namespace:
        found = getattr(namespace["Solution"](), name, None)
    if not callable(found):
        raise NameError(f"the answer defines no function {name}")
    return found  # type: ignore[no-any-return]


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


def _run_to_the_end(run: Callable[[], object]) -> None:
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
