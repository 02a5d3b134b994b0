"""Runs the tests that a piece of code defines as pytest and unittest would: functions, classes, what they set up."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import Any

from megatron_klear.reward.sandbox.inside.pytest_part import Skipped, is_skipped


def run_defined(names: dict[str, Any], before: dict[str, Any]) -> None:
    """Run the tests among names that were not there before.

    Raises:
        Whatever a test raises; `Skipped` where it wants not to be run.
    """
    cases: list[str] = []
    for name, value in names.items():
        if before.get(name) is value:
            continue
        is_function = isinstance(value, types.FunctionType) and name.startswith("test")
        if is_function or (isinstance(value, type) and _is_unittest(value)):
            cases.append(name)
        elif isinstance(value, type) and name.startswith("Test"):
            cases += [f"{name}.{method}" for method in dir(value) if method.startswith("test")]
    if cases:
        run_cases(names, [case for case in cases if not is_skipped(_found(names, case)[1])] or cases)


def run_cases(names: dict[str, Any], cases: Iterable[str]) -> None:
    """Run some tests.

    Args:
        names: of the tests' module.
        cases: `test_a`, or `TestB.test_c`, classes within classes likewise, or a `unittest` case with all of its tests.

    Raises:
        Whatever one raises; `Skipped` where it wants not to be run.
    """
    module = types.SimpleNamespace(**{n: v for n, v in names.items() if isinstance(v, types.FunctionType)})
    _hook(module, "setup_module", module)
    for case in cases:
        owner, found = _found(names, case)
        if isinstance(found, type):
            _run_unittest(found, None)
        elif isinstance(owner, type) and _is_unittest(owner):
            _run_unittest(owner, [case.rpartition(".")[2]])
        elif isinstance(owner, type):
            _run_method(owner, case.rpartition(".")[2])
        else:
            _hook(module, "setup_function", found)
            names[case]()
            _hook(module, "teardown_function", found)
    _hook(module, "teardown_module", module)


def _found(names: dict[str, Any], case: str) -> tuple[Any, Any]:
    """What a case is part of, if anything, and itself."""
    owner, found = None, None
    for part in case.split("."):
        owner, found = found, names[part] if found is None else getattr(found, part)
    return owner, found


def _run_method(owner: type, name: str) -> None:
    _hook(owner, "setup_class", owner)
    instance = owner()
    method = getattr(instance, name)
    _hook(instance, "setup_method", method)
    method()
    _hook(instance, "teardown_method", method)
    _hook(owner, "teardown_class", owner)


def _hook(owner: Any, name: str, argument: object) -> None:
    """Call what sets up or tears down, if it is there, with what it may want to know."""
    hook = getattr(owner, name, None)
    if hook is not None:
        code = getattr(getattr(hook, "__func__", hook), "__code__", None)
        wanted = (code.co_argcount if code else 0) - isinstance(hook, types.MethodType)
        hook(*[argument][: max(wanted, 0)])


def _is_unittest(value: type) -> bool:
    unittest = sys.modules.get("unittest")
    return unittest is not None and issubclass(value, unittest.TestCase)


def _run_unittest(case: Any, methods: Iterable[str] | None) -> None:
    """Run a case, or some of its methods, as a suite, which sets up its class and its module."""
    import unittest

    if methods is None:
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    else:
        suite = unittest.TestSuite(map(case, methods))
    tests: list[Any] = list(suite)
    assert tests, f"{case.__name__} has no tests"
    marked = [t for owner in tests for t in (owner, getattr(owner, owner._testMethodName)) if is_skipped(t)]
    raised: list[Any] = []

    class Result(unittest.TestResult):
        def addError(self, test: Any, err: Any) -> None:
            raised.append(err[1])

    result = Result()
    suite.run(result)
    if raised:
        raise raised[0]
    faults = [*result.errors, *result.failures]
    if faults:
        raise AssertionError(faults[0][1])
    if result.unexpectedSuccesses:
        raise AssertionError("unexpected success")
    # What is marked is left out beside others; what skips itself is not what it was asked to be.
    if len(result.skipped) > min(len(marked), len(tests) - 1):
        raise Skipped(f"skipped: {result.skipped[0][1]}")
