"""Assert problems: the tests run in one process, the answer in another that never sees what is expected."""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_klear.reward.sandbox.inside import programs
from megatron_klear.reward.sandbox.inside.channel import receive
from megatron_klear.reward.sandbox.inside.remote import Peer

FROM_PEER_FD, TO_PEER_FD, VERDICT_FD, CHANNEL_FD = 3, 4, 5, 6
PASSED = b"passed"


def serve_answer(compiled: bytes) -> None:
    """Run the answer, then what the tests ask of it."""

    def run() -> None:
        sys.set_int_max_str_digits(0)
        peer = Peer(FROM_PEER_FD, TO_PEER_FD)
        namespace = programs.load(compiled)
        public = {name: value for name, value in namespace.items() if not name.startswith("__")}
        peer._kept.append(types.SimpleNamespace(names=lambda: _shareable(public)))  # number 0, asked for first
        peer.serve()

    programs.run_to_the_end(run)


def check_answer() -> None:
    """Run a test against the answer in the other process; only a test that comes to its end is passed.

    The test comes through the channel as `setup`, code to run before, such as imports and functions of its own, and
    `test`, code with assertions, test functions, or `unittest` cases.
    """
    message = receive(CHANNEL_FD)
    os.close(CHANNEL_FD)
    setup, test = message["setup"], message["test"]

    def run() -> None:
        sys.set_int_max_str_digits(0)
        sys.modules["pytest"] = _pytest()
        peer = Peer(FROM_PEER_FD, TO_PEER_FD, guarded=True)
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        module.__dict__.update(_names_of_the_answer(peer))
        exec(compile(setup, "<setup>", "exec", dont_inherit=True), module.__dict__)
        before = dict(module.__dict__)
        exec(compile(test, "<test>", "exec", dont_inherit=True), module.__dict__)
        new = {name: value for name, value in module.__dict__.items() if before.get(name) is not value}
        for function in _test_functions(new):
            function()
        programs._write(VERDICT_FD, PASSED)

    programs.run_to_the_end(run)


def _shareable(public: dict[str, Any]) -> dict[str, Any]:
    """The answer's names: modules by their name, all else as it is."""
    return {
        name: ("module", value.__name__) if isinstance(value, types.ModuleType) else ("value", value)
        for name, value in public.items()
    }


_MODULES_OF_TESTS = frozenset(
    {
        *("cmath", "collections", "copy", "functools", "itertools", "json", "math", "operator", "os", "random", "re"),
        *("statistics", "sys"),
    }
)
"""What tests use without importing it: an answer's own `math` must not judge itself."""


def _names_of_the_answer(peer: Peer) -> dict[str, Any]:
    """What tests may use of the answer; never anything in place of a builtin, which would change what tests mean."""
    names = {}
    for name, (kind, value) in peer.decode(["here", 0]).names().items():
        if hasattr(builtins, name):
            continue
        if kind == "value":
            if name not in _MODULES_OF_TESTS:
                names[name] = value
        elif value.split(".")[0] in sys.stdlib_module_names:
            names[name] = __import__(value, fromlist=["*"])
    return names


def _test_functions(names: dict[str, Any]) -> Iterator[Callable[[], object]]:
    """The tests that a piece of code defines."""
    for name, value in names.items():
        if isinstance(value, types.FunctionType) and name.startswith("test"):
            yield value
        elif isinstance(value, type) and "unittest" in sys.modules and _is_unittest_case(value):
            yield _unittest_case(value)
        elif isinstance(value, type) and name.startswith("Test"):
            for method in dir(value):
                if method.startswith("test"):
                    yield _method(value, method)


def _is_unittest_case(value: type) -> bool:
    import unittest

    return issubclass(value, unittest.TestCase)


def _unittest_case(case: type) -> Callable[[], None]:
    import unittest

    def run() -> None:
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
        assert result.testsRun > 0, f"{case.__name__} has no tests"
        if not result.wasSuccessful():
            raise AssertionError([*result.errors, *result.failures, ("", "unexpected success")][0][1])

    return run


def _method(case: type, name: str) -> Callable[[], None]:
    def run() -> None:
        instance = case()
        method = getattr(instance, name)
        if hasattr(instance, "setup_method"):
            wanted = instance.setup_method.__func__.__code__.co_argcount - 1
            instance.setup_method(*[method][:wanted])
        method()

    return run


def _pytest() -> types.ModuleType:
    """What tests use most of pytest, which the sandbox's interpreter does not have: raises, approx, parametrize."""
    module = types.ModuleType("pytest")
    module.raises, module.approx = _raises, _Approx  # type: ignore[attr-defined]
    module.mark = types.SimpleNamespace(parametrize=_parametrize)  # type: ignore[attr-defined]
    return module


@contextmanager
def _raises(expected: Any, match: str | None = None) -> Iterator[types.SimpleNamespace]:
    import re

    caught = types.SimpleNamespace(value=None, type=None)
    try:
        yield caught
    except expected as error:
        caught.value, caught.type = error, type(error)
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"{error} does not match {match}") from error
        return
    raise AssertionError(f"{expected} was not raised")


class _Approx:
    """Equal to numbers, or containers of them, within a relative or absolute tolerance."""

    def __init__(self, expected: Any, rel: float = 1e-6, abs: float = 1e-12) -> None:
        self._expected, self._rel, self._abs = expected, rel, abs

    def __eq__(self, actual: object) -> bool:
        return self._close(self._expected, actual)

    def __hash__(self) -> int:
        return 0

    def _close(self, expected: Any, actual: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(actual, dict)
                and expected.keys() == actual.keys()
                and all(self._close(expected[key], actual[key]) for key in expected)
            )
        if isinstance(expected, (list, tuple)):
            return (
                type(actual) is type(expected)
                and len(actual) == len(expected)
                and all(map(self._close, expected, actual))
            )
        if not isinstance(actual, (int, float)):
            return bool(expected == actual)
        return bool(expected == actual or abs(expected - actual) <= max(self._rel * abs(expected), self._abs))


def _parametrize(names: str | list[str], rows: list[Any]) -> Callable[[Callable[..., object]], Callable[..., None]]:
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

    def decorate(function: Callable[..., object]) -> Callable[..., None]:
        def test_every_row(**others: Any) -> None:  # those of a decorator above
            for row in rows:
                function(**dict(zip(keys, row if len(keys) > 1 else [row], strict=True)), **others)

        test_every_row.__name__ = function.__name__
        return test_every_row

    return decorate
