"""Which tests a file of tests has, as pytest would collect it; what calling them would not run is refused."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence


def cases_of(code: ast.Module) -> list[str]:
    """The tests of a file by name: `test_a`, `TestB.test_c`; those that are marked to be skipped are left out.

    Raises:
        ValueError: the file has a mark for all of its tests.
    """
    if any("pytestmark" in _bound_names(item) for item in code.body):
        raise ValueError("code: pytestmark, a mark for all tests, is not supported")
    classes = {item.name: item for item in code.body if isinstance(item, ast.ClassDef)}
    found: list[str] = []
    for item in code.body:
        if isinstance(item, ast.FunctionDef) and item.name.startswith("test") and not _is_skipped(item):
            found.append(item.name)
        elif isinstance(item, ast.ClassDef):
            found += _cases_of_class(item, classes, "")
    return list(dict.fromkeys(found))


def require_plain_tests(code: ast.Module, where: str) -> None:
    """Refuse tests whose call runs nothing of them.

    Args:
        where: they stand, for the message.

    Raises:
        ValueError: a test is a coroutine or a generator.
    """
    for item in ast.walk(code):
        is_test = isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name.startswith("test")
        if is_test and (_yields(item) or isinstance(item, ast.AsyncFunctionDef)):
            name = getattr(item, "name", "")
            raise ValueError(f"{where}: {name} is async or yields, so that calling it asserts nothing")


def _cases_of_class(item: ast.ClassDef, classes: dict[str, ast.ClassDef], within: str) -> Iterator[str]:
    family = list(_family(item, classes))
    is_unittest = any(_last_name(base) == "TestCase" for kind in family for base in kind.bases)
    parts = {
        part.name: part
        for kind in reversed(family)
        for part in kind.body
        if isinstance(part, (ast.FunctionDef, ast.ClassDef))
    }
    off = any("__test__" in _bound_names(part) for part in item.body)
    if off or _is_skipped(item) or not (is_unittest or item.name.startswith("Test")):
        return
    for name, part in parts.items():
        if isinstance(part, ast.ClassDef):
            if not is_unittest:
                yield from _cases_of_class(part, classes, f"{within}{item.name}.")
        elif name.startswith("test") and not _is_skipped(part):
            yield f"{within}{item.name}.{name}"


def _family(item: ast.ClassDef, classes: dict[str, ast.ClassDef], seen: tuple[str, ...] = ()) -> Iterator[ast.ClassDef]:
    """A class of a file and those of the same file that it derives from."""
    yield item
    for base in item.bases:
        name = ast.unparse(base)
        if name in classes and name not in (*seen, item.name):
            yield from _family(classes[name], classes, (*seen, item.name))


def _is_skipped(item: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether it is marked `skip`, of pytest or of unittest, without a condition."""
    called = [mark.func if isinstance(mark, ast.Call) else mark for mark in item.decorator_list]
    return any(_last_name(mark) == "skip" for mark in called)


def _bound_names(item: ast.stmt) -> Sequence[str]:
    return [target.id for target in getattr(item, "targets", []) if isinstance(target, ast.Name)]


def _last_name(expression: ast.expr) -> str:
    return ast.unparse(expression).rpartition(".")[2]


def _yields(node: ast.AST) -> bool:
    """Whether a function is a generator; those defined within it do not count."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return any(
        isinstance(child, (ast.Yield, ast.YieldFrom)) or (not isinstance(child, inner) and _yields(child))
        for child in ast.iter_child_nodes(node)
    )
