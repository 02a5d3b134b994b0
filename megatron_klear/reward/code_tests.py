"""The tests of a code problem: the `reference` of a row of domain code, as JSON.

    {"kind": "stdin", "tests": [{"input": "1 2\\n", "output": "3\\n"}, ...]}
    {"kind": "call", "function": "add", "tests": [{"args": [1, 2], "output": 3}, ...]}
    {"kind": "assert", "tests": ["assert add(1, 2) == 3", ...], "setup": "import math"}
    {"kind": "pytest", "code": "def test_add():\\n    assert add(1, 2) == 3\\n"}

`json_schema()` is the whole schema. Every kind may have `preamble` (code run before the answer, such as imports),
`solution` (an answer known to be right, for the linter) and `cpu_seconds` (the limit of one test, in place of the
setting's). All tests of a problem are run for every response, in their order.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_klear.reward.code_compare import different_text, different_value

_STRICT = ConfigDict(strict=True, extra="forbid")
_Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seconds = Annotated[float | None, Field(gt=0, le=600)]

ANSWER_FILE = "answer"


class BadTestsError(ValueError):
    """The tests of a problem cannot be used."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _Problem:
    preamble: str = ""
    """Code that is run before the answer, in the same namespace."""

    solution: str | None = None
    """Code known to be right."""

    cpu_seconds: _Seconds = None
    """CPU time of one test; null takes the setting."""

    def sources(self, program: str) -> dict[str, str]:
        """The code of a test, by name, in the order that it is run in."""
        return {"preamble": self.preamble, ANSWER_FILE: program} if self.preamble else {ANSWER_FILE: program}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StdinTest:
    """What a program is given and must print; trailing space and empty lines at the end do not count."""

    input: str
    output: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StdinProblem(_Problem):
    """A program that reads standard input and writes standard output."""

    kind: Literal["stdin"]
    tests: Annotated[list[StdinTest], Field(min_length=1)]
    tolerance: _Tolerance = 0.0
    """Absolute or relative error allowed in printed numbers; 0 compares decimals exactly (1.50 equals 1.5)."""

    def messages(self) -> list[dict[str, str]]:
        """What the sandbox is told of each test; never what is expected."""
        return [{"kind": "stdin", "input": test.input} for test in self.tests]

    def judge(self, index: int, output: bytes) -> str:
        """What is wrong with the output of a test, or an empty text."""
        return different_text(self.tests[index].output, output, self.tolerance)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CallTest:
    """The arguments of one call and its result, as JSON data: tuples and sets are lists, keys are strings."""

    output: Any
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CallProblem(_Problem):
    """A function, at the top level or in a class `Solution`."""

    kind: Literal["call"]
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    tests: Annotated[list[CallTest], Field(min_length=1)]
    tolerance: _Tolerance = 1e-6
    """Absolute or relative error allowed where a number is not whole."""

    def messages(self) -> list[dict[str, str]]:
        """What the sandbox is told of each test; never what is expected."""
        return [
            {"kind": "call", "function": self.function, "arguments": json.dumps([test.args, test.kwargs])}
            for test in self.tests
        ]

    def judge(self, index: int, output: bytes) -> str:
        """What is wrong with the result of a test, or an empty text."""
        return different_value(self.tests[index].output, output, self.tolerance)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AssertProblem(_Problem):
    """Pieces of code, each of them one test: assertions, test functions, `unittest` cases."""

    kind: Literal["assert"]
    tests: Annotated[list[str], Field(min_length=1)]
    setup: str = ""
    """Code that every test starts with, such as imports and functions of its own."""

    def __post_init__(self) -> None:
        for where, code in (("setup", self.setup), *((f"tests.{i}", test) for i, test in enumerate(self.tests))):
            if not _parsed(code, where).body and where != "setup":
                raise ValueError(f"{where}: holds no code")
            _require_plain_tests(code, where)

    def messages(self) -> list[dict[str, str]]:
        """What the sandbox is told of each test: the process of the answer is told nothing of it."""
        return [{"kind": "assert", "setup": self.setup, "test": test} for test in self.tests]

    def judge(self, index: int, output: bytes) -> str:
        """Whether the test came to its end, as the process that ran it says."""
        return _unless_passed(output)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PytestProblem(_Problem):
    """A file of tests as pytest would collect it, without fixtures: each function or method is one test."""

    kind: Literal["pytest"]
    code: str

    def __post_init__(self) -> None:
        _require_plain_tests(self.code, "code")
        if not self._calls():
            raise ValueError("code: defines no function test_... and no class Test... with one")

    def messages(self) -> list[dict[str, str]]:
        """What the sandbox is told of each test; see `AssertProblem`."""
        return [{"kind": "assert", "setup": self.code, "test": call} for call in self._calls()]

    def judge(self, index: int, output: bytes) -> str:
        """Whether the test came to its end."""
        return _unless_passed(output)

    def _calls(self) -> list[str]:
        calls = []
        for item in _parsed(self.code, "code").body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test"):
                calls.append(f"{item.name}()")
            elif isinstance(item, ast.ClassDef) and item.name.startswith("Test"):
                calls += _calls_of_class(item)
        return calls


def _calls_of_class(item: ast.ClassDef) -> list[str]:
    """One call for each test method; a case of unittest runs it with its own setUp and tearDown."""
    methods = {f.name: f for f in item.body if isinstance(f, ast.FunctionDef)}
    tests = [name for name in methods if name.startswith("test")]
    if any(ast.unparse(base).rpartition(".")[2] == "TestCase" for base in item.bases):
        judged = "assert _result.wasSuccessful(), (_result.errors + _result.failures)[0][1]"
        return [f"_result = {item.name}({name!r}).run(); {judged}" for name in tests]
    if "setup_method" not in methods:
        return [f"_test = {item.name}(); _test.{name}()" for name in tests]
    given = "_test.{}" if len(methods["setup_method"].args.args) > 1 else ""
    return [f"_test = {item.name}(); _test.setup_method({given.format(name)}); _test.{name}()" for name in tests]


def _yields(node: ast.AST) -> bool:
    """Whether a function is a generator; those defined within it do not count."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return any(
        isinstance(child, (ast.Yield, ast.YieldFrom)) or (not isinstance(child, inner) and _yields(child))
        for child in ast.iter_child_nodes(node)
    )


def _require_plain_tests(code: str, where: str) -> None:
    """Refuse tests whose call runs nothing of them.

    Raises:
        ValueError: a test is a coroutine or a generator.
    """
    for item in ast.walk(_parsed(code, where)):
        is_test = isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name.startswith("test")
        if is_test and (_yields(item) or isinstance(item, ast.AsyncFunctionDef)):
            name = getattr(item, "name", "")
            raise ValueError(f"{where}: {name} is async or yields, so that calling it asserts nothing")


CodeProblem = StdinProblem | CallProblem | AssertProblem | PytestProblem

_ADAPTER: TypeAdapter[CodeProblem] = TypeAdapter(Annotated[CodeProblem, Field(discriminator="kind")])


def json_schema() -> dict[str, Any]:
    """The JSON schema of a code problem's reference."""
    return _ADAPTER.json_schema()


@functools.lru_cache(maxsize=256)
def parse_problem(reference: str) -> CodeProblem:
    """Read and check the tests of a problem.

    Args:
        reference: JSON text.

    Raises:
        BadTestsError: naming everything that is wrong with them.
    """
    try:
        return _ADAPTER.validate_json(reference)
    except ValidationError as error:
        found = [f"{_dotted(item['loc'])}{item['msg']}" for item in error.errors(include_url=False)[:5]]
        more = f" and {error.error_count() - 5} more" if error.error_count() > 5 else ""
        raise BadTestsError(f"the tests cannot be used: {'; '.join(found)}{more}") from error
    except (ValueError, RecursionError) as error:  # half of a surrogate pair, for one
        raise BadTestsError(f"the tests cannot be read: {type(error).__name__}") from error


def _dotted(location: Sequence[str | int]) -> str:
    """A place in the reference, without the name of the kind that pydantic puts first."""
    path = ".".join(str(part) for part in location if part not in ("stdin", "call", "assert", "pytest"))
    return f"{path}: " if path else ""


def _parsed(code: str, where: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: is not Python: {error}") from error


def _unless_passed(output: bytes) -> str:
    return "" if output == b"passed" else "the test did not come to its end"
