"""What tests use most of pytest, which the sandbox's interpreter does not have; the rest is refused by name."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Skipped(BaseException):
    """A test is not to be run, and is no test for an answer then."""


def is_skipped(test: object) -> bool:
    """Whether a test is marked to be skipped, as unittest notes it, too."""
    return bool(getattr(test, "__unittest_skip__", False))


def make_module() -> types.ModuleType:
    """A module in the place of pytest: raises, approx, param, fail, skip, and marks."""
    module = types.ModuleType("pytest")
    module.__dict__.update(
        raises=_raises, approx=_Approx, param=_Parameters, fail=_fail, skip=_skip, mark=_Marks(), __getattr__=_refuse
    )
    return module


def _refuse(name: str) -> NoReturn:
    raise AttributeError(f"pytest.{name} is not supported by this grader")


def _raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> Any:
    if not call:
        return _raising(expected, match)
    function, *arguments = call
    with _raising(expected, match) as caught:
        function(*arguments, **named)
    return caught


@contextmanager
def _raising(expected: Any, match: str | None) -> Iterator[types.SimpleNamespace]:
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


def _fail(reason: str = "", pytrace: bool = True) -> NoReturn:
    raise AssertionError(reason)


def _skip(reason: str = "", *, allow_module_level: bool = False) -> NoReturn:
    raise Skipped(f"skipped: {reason}")


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


class _Parameters(tuple[Any, ...]):
    """One row of `parametrize`; an id says nothing to a grader."""

    def __new__(cls, *values: Any, id: str | None = None) -> _Parameters:
        return super().__new__(cls, values)


def _parametrize(
    names: str | list[str], rows: list[Any], ids: Any = None
) -> Callable[[Callable[..., object]], Callable[..., None]]:
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [row if len(keys) > 1 or isinstance(row, _Parameters) else (row,) for row in rows]

    def decorate(function: Callable[..., object]) -> Callable[..., None]:
        if isinstance(function, type):
            raise TypeError("parametrize of a class is not supported by this grader")

        def test_every_row(*instance: Any, **others: Any) -> None:  # the others are those of a decorator above
            for row in rows:
                function(*instance, **dict(zip(keys, row, strict=True)), **others)

        test_every_row.__name__ = function.__name__
        return test_every_row

    return decorate


def _skipif(condition: object, *, reason: str = "") -> Callable[[Any], Any]:
    if isinstance(condition, str):
        raise TypeError("a condition of skipif in quotes is not supported by this grader")
    return _skipping(reason) if condition else lambda test: test


def _skipping(reason: str) -> Callable[[Any], Any]:
    def decorate(test: Any) -> Any:
        def skipped(*arguments: Any, **named: Any) -> None:
            raise Skipped(f"skipped: {reason}")

        if isinstance(test, type):
            test.setup_method = test.setUp = skipped  # type: ignore[attr-defined]
            return test
        skipped.__name__ = test.__name__
        skipped.__unittest_skip__ = True  # type: ignore[attr-defined]
        return skipped

    return decorate


def _mark_skip(reason: Any = "") -> Any:
    return _skipping("")(reason) if callable(reason) else _skipping(reason)


class _Marks:
    """Marks that mean something are done or refused; others are names for choosing tests, and change nothing."""

    parametrize = staticmethod(_parametrize)
    skip = staticmethod(_mark_skip)
    skipif = staticmethod(_skipif)

    def __getattr__(self, name: str) -> Any:
        if name in ("xfail", "usefixtures", "asyncio", "anyio", "trio"):
            _refuse(f"mark.{name}")

        def mark(*arguments: Any, **named: Any) -> Any:
            return arguments[0] if len(arguments) == 1 and callable(arguments[0]) and not named else lambda test: test

        return mark
