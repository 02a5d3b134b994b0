"""Whose the names are that the tests of a problem use: the answer's, or of what judges it.

An answer must define what it is asked for, and nothing else that a test relies on: with a `Counter`, a `math` or an
`isclose` of its own it would judge itself.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import symtable
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_MODULES = frozenset(
    {
        *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "io"),
        *("itertools", "json", "math", "operator", "os", "random", "re", "statistics", "string", "sys", "time"),
        "unittest",
    }
)
"""What tests use without importing it, by attributes."""

_MEMBERS = {
    **dict.fromkeys(("ChainMap", "Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"), "collections"),
    **dict.fromkeys(("date", "datetime", "timedelta"), "datetime"),
    **dict.fromkeys(("inf", "isclose", "nan", "pi"), "math"),
    "Decimal": "decimal",
    "Fraction": "fractions",
    "reduce": "functools",
}
"""What tests use without importing it, by name."""

_STARRED = _MODULES | {"builtins", "typing"}
"""Modules whose names are known here, where a preamble imports all of them."""

_DYNAMIC = frozenset({"eval", "exec", "getattr", "globals", "locals", "vars"})
"""By which tests may use a name that cannot be seen."""

_BUILTINS = frozenset(dir(builtins))
_FUNCTIONS = frozenset(
    name
    for name, value in vars(builtins).items()
    if callable(value)
    and not (isinstance(value, type) and issubclass(value, BaseException))
    and not name.startswith("_")
    and name != "print"
)
"""What a problem may ask for although Python has it."""


class Names(NamedTuple):
    """What becomes of names that the answer, too, may define.

    Attributes:
        owed: the answer must define them, although they are builtins, or names of the library or the preamble.
        stubs: the preamble only declares them; the answer's are used where it defines them.
        library: what tests use of the standard library without importing it: name, and where it is, `math` or
            `collections:Counter`.
    """

    owed: list[str]
    stubs: list[str]
    library: dict[str, str]


class _Uses(NamedTuple):
    """Names of a piece of code: those it binds at its top level, and those it uses and does not bind."""

    bound: frozenset[str]
    free: frozenset[str]


@functools.lru_cache(maxsize=256)
def names_of_tests(preamble: str, setup: str, tests: Sequence[str], defines: Sequence[str]) -> Names:
    """Decide about the names of a problem's tests.

    A name that every test uses, where the tests use none that is left for an answer to define, is what they are about:
    `sum` of `assert sum(1, 2) == 3`.

    Args:
        preamble, setup: code that runs before the answer, and before each test.
        tests: code of each.
        defines: names that are the answer's by declaration.

    Raises:
        ValueError: a piece is not Python, or it cannot be told what of an answer the tests are about.
    """
    stubs = _stubs(preamble)
    given = _uses(preamble).bound - stubs
    starred = frozenset(_starred(preamble))
    before = _uses(setup)
    free = [(_uses(test).free | before.free) - _uses(test).bound - before.bound for test in tests]
    free_anywhere = frozenset[str]().union(*free)
    library = {
        name: place
        for name in sorted(free_anywhere - given - starred - stubs - set(defines))
        if (place := _place(name, [setup, *tests]))
    }
    owed = set(defines)
    left = (free_anywhere | _uses(preamble).free) - given - starred - library.keys() - _BUILTINS
    if not owed and not left and not free_anywhere & _DYNAMIC:
        of_others = _FUNCTIONS | given | starred | library.keys()
        named = [(_uses(test).free - before.bound) & of_others for test in tests]
        common = frozenset.intersection(*named) - given
        if len(common) == 1:
            owed |= common
        elif any(named):
            listed = ", ".join(sorted(frozenset[str]().union(*named)))
            raise ValueError(f"the tests use no name that is only an answer's; name in defines which is, of {listed}")
    library = {name: place for name, place in library.items() if name not in owed}
    return Names(sorted(owed), sorted((stubs & free_anywhere) - owed), library)


@functools.lru_cache(maxsize=256)
def _uses(code: str) -> _Uses:
    try:
        table = symtable.symtable(code, "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"is not Python: {error}") from error
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    for inner in _inner(table):
        for symbol in inner.get_symbols():
            if symbol.is_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
            elif symbol.is_global() and symbol.is_referenced():
                used.add(symbol.get_name())
    return _Uses(frozenset(bound), frozenset(used - bound))


def _inner(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from _inner(child)


def _starred(code: str) -> Iterator[str]:
    """Names that come by `from module import *`, of well-known modules."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.module in _STARRED:
            module = importlib.import_module(node.module)
            public = [name for name in dir(module) if not name.startswith("_")]
            yield from getattr(module, "__all__", public)


def _place(name: str, codes: Sequence[str]) -> str:
    """Where the standard library has a name as the tests use it; empty where it is not the library's."""
    if name == "pytest":  # the sandbox has a module of this name (inside/pytest_part.py)
        return name
    if name not in _MODULES and name not in _MEMBERS:
        return ""
    nodes = [node for code in codes for node in ast.walk(ast.parse(code))]
    attributes = [
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name
    ]
    has_others = sum(isinstance(n, ast.Name) and n.id == name for n in nodes) > len(attributes)
    if name in _MODULES and not has_others and set(attributes) <= set(dir(importlib.import_module(name))):
        return name
    return f"{_MEMBERS[name]}:{name}" if name in _MEMBERS else ""


def _stubs(code: str) -> frozenset[str]:
    """Functions without a body, and classes of nothing but such methods beside `__init__`: the answer's to write."""
    found = set()
    for item in ast.parse(code).body:
        if isinstance(item, ast.FunctionDef) and _is_empty(item):
            found.add(item.name)
        elif isinstance(item, ast.ClassDef) and not item.bases and not item.decorator_list:
            methods = [part for part in item.body if isinstance(part, ast.FunctionDef) and part.name != "__init__"]
            if methods and all(map(_is_empty, methods)):
                found.add(item.name)
    return frozenset(found)


def _is_empty(function: ast.FunctionDef) -> bool:
    """Whether a function holds nothing but its docstring, `pass`, `...`, or that it is not implemented."""
    return all(
        isinstance(part, ast.Pass)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        or (isinstance(part, ast.Raise) and "NotImplementedError" in ast.unparse(part))
        for part in function.body
    )
