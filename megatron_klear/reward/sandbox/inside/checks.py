"""Assert problems: the tests run in one process, the answer in another that never sees what is expected."""

from __future__ import annotations

import ast
import builtins
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from megatron_klear.reward.sandbox.inside import cases, programs, pytest_part
from megatron_klear.reward.sandbox.inside.channel import receive
from megatron_klear.reward.sandbox.inside.remote import Peer
from megatron_klear.reward.sandbox.inside.shared import SharedClasses

FROM_PEER_FD, TO_PEER_FD, VERDICT_FD, CHANNEL_FD = 3, 4, 5, 6
PASSED = b"passed"


def serve_answer(compiled: bytes, owed: list[str], stubs: list[str]) -> None:
    """Run the answer, then do what the tests ask of it.

    Args:
        compiled: its code.
        owed, stubs: names that are its to define, see `_take_names`.
    """

    def run() -> None:
        sys.set_int_max_str_digits(0)
        shared = SharedClasses()
        loaded = programs.load(compiled, shared.learn)
        shared.leave_out({*owed, *(loaded.own.keys() & set(stubs))})
        shared.follow(loaded.own)
        public = {name: value for name, value in loaded.own.items() if not name.startswith("__")}
        peer = Peer(FROM_PEER_FD, TO_PEER_FD, shared)
        asked_first = types.SimpleNamespace(defined=lambda: list(public), values=lambda: _shareable(public))
        peer.keep(asked_first)  # by the number 0
        peer.serve()

    programs.run_to_the_end(run)


def check_answer() -> None:
    """Run a test against the answer in the other process; only a test that comes to its end is passed.

    The test comes through the channel: `preamble`, the problem's, which has its own copy here; `setup`, code to run
    before, such as imports and functions; `test`, code with assertions, test functions, or `unittest` cases; `case`, a
    test of them by name, in place of all; `owed`, `stubs` and `library`, see `_take_names`.
    """
    message = receive(CHANNEL_FD)
    os.close(CHANNEL_FD)

    def run() -> None:
        sys.set_int_max_str_digits(0)
        sys.modules["pytest"] = pytest_part.make_module()
        sys.modules["tests"] = module = types.ModuleType("tests")
        names = module.__dict__
        _run(message["preamble"], "preamble", names)
        shared = SharedClasses(guarded=True)
        shared.learn(names)
        _give_library(names, message["library"])
        _take_names(names, message, shared, Peer(FROM_PEER_FD, TO_PEER_FD, shared, guarded=True))
        _run_test(message, names)
        programs._write(VERDICT_FD, PASSED)

    programs.run_to_the_end(run)


def try_without_answer() -> None:
    """Run a test where there is no answer, to find the faults that are its own.

    Writes what it raised before it used any name that it does not have. Nothing is written where an answer could have
    made a difference: by such a name, or by what is in a file, of which an assertion may tell, too.
    """
    message = receive(CHANNEL_FD)
    os.close(CHANNEL_FD)

    def run() -> None:
        sys.set_int_max_str_digits(0)
        sys.modules["pytest"] = pytest_part.make_module()
        names = _Asked({*message["owed"], *message["stubs"]})
        # Through which dataclasses and unittest look up names of the tests.
        sys.modules["tests"] = module = types.ModuleType("tests")
        module.__dict__["__getattr__"] = names.attribute
        try:
            for imported in _imports(message["setup"] + "\n" + message["test"]):
                _run(imported, "imports", {})
            _run(message["preamble"], "preamble", names)
            names.forget()
            _give_library(names, message["library"])
            _run_test(message, names)
        except (NameError, OSError, AssertionError):
            pass
        except BaseException as error:
            if not names.asked:
                text = "".join(str(error).strip().splitlines()[-1:])
                programs._write(VERDICT_FD, f"{type(error).__name__}: {text}".encode("utf-8", "replace")[:500])

    programs.run_to_the_end(run)


class _Asked(dict[str, Any]):
    """Names of tests without an answer, which note that one was wanted that is not there.

    Args:
        of_answer: names that are the answer's, also where others have them.
    """

    def __init__(self, of_answer: set[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._of_answer = of_answer
        self.asked = False

    def __missing__(self, name: str) -> Any:
        if name in self._of_answer or not (hasattr(builtins, name) or name.startswith("__")):
            self.asked = True
            raise NameError(f"name {name!r} is not defined")
        raise KeyError(name)  # Python looks for builtins elsewhere

    def attribute(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def forget(self) -> None:
        """Have none of the answer's names."""
        for name in self._of_answer & self.keys():
            del self[name]


def _run_test(message: dict[str, Any], names: dict[str, Any]) -> None:
    _run(message["setup"], "setup", names)
    before = dict(names)
    _run(message["test"], "test", names)
    if message["case"]:
        cases.run_cases(names, [message["case"]])
    else:
        cases.run_defined(names, before)


def _run(code: str, name: str, names: dict[str, Any]) -> None:
    exec(compile(code, f"<{name}>", "exec", dont_inherit=True), names)


def _imports(code: str) -> Iterator[str]:
    """The imports of tests, wherever they stand but where their failing is provided for."""
    waiting: list[ast.AST] = [ast.parse(code)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__":
            yield ast.unparse(node)
        elif not isinstance(node, (ast.Try, ast.If, ast.With)):
            waiting += ast.iter_child_nodes(node)


def _shareable(public: dict[str, Any]) -> dict[str, Any]:
    """The answer's names: modules by their name, all else as it is."""
    return {
        name: ("module", value.__name__) if isinstance(value, types.ModuleType) else ("value", value)
        for name, value in public.items()
    }


def _take_names(names: dict[str, Any], message: dict[str, Any], shared: SharedClasses, peer: Peer) -> None:
    """Add to the names of the tests those of the answer, and nothing that would judge in its favour.

    What the preamble, the builtins and the standard library have keeps its meaning, whatever an answer calls its own.

    Args:
        names: the preamble's, and of the standard library what tests use without importing it.
        message: its `owed` are names that the answer must define, whoever else has them, its `stubs` those that the
            preamble only declares.
        shared: the preamble's classes.
        peer: the answer's process.

    Raises:
        NameError: an owed name is missing.
    """
    answer = peer.decode(["here", 0])
    of_answer = {*message["owed"], *(set(message["stubs"]) & set(answer.defined()))}
    shared.leave_out(of_answer)
    for name in of_answer:
        names.pop(name, None)
    taken = set(names).union(dir(builtins)) - of_answer
    for name, (kind, value) in answer.values().items():
        if name in taken:
            continue
        if kind == "value":
            names[name] = value
        elif value == name and name in sys.stdlib_module_names:
            names[name] = __import__(name)
    if missing := sorted(set(message["owed"]) - set(names)):
        raise NameError(f"the answer does not define {', '.join(missing)}")


def _give_library(names: dict[str, Any], library: dict[str, str]) -> None:
    for name, place in library.items():
        module, _, member = place.partition(":")
        found = __import__(module)
        names.setdefault(name, getattr(found, member) if member else found)
