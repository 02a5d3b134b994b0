"""The tests of a code problem: the `reference` of a row of domain code, as JSON.

    {"kind": "stdin", "tests": [{"input": "1 2\\n", "output": "3\\n"}, ...]}
    {"kind": "call", "function": "add", "tests": [{"args": [1, 2], "output": 3}, ...]}
    {"kind": "assert", "tests": ["assert add(1, 2) == 3", ...], "setup": "import math"}
    {"kind": "pytest", "code": "def test_add():\\n    assert add(1, 2) == 3\\n"}

`json_schema()` is the whole schema. Every kind may have `preamble` (code run before the answer, such as imports),
`solution` (an answer known to be right, for the linter) and `cpu_seconds` (the limit of one test, in place of the
setting's). All tests of a problem are run for every response, in their order.

Tests that are code mean what they say whatever an answer defines: names of the preamble, of Python and of the standard
library are theirs. A name that is asked of the answer all the same is found where it is the only one that the tests can
be about (`assert sum(1, 2) == 3`); otherwise `defines` tells. A function of the preamble without a body is the answer's
to write.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_klear.reward.code_cases import cases_of, require_plain_tests
from megatron_klear.reward.code_compare import different_text, different_value
from megatron_klear.reward.code_names import Names, names_of_tests
from megatron_klear.reward.sandbox.limits import Limits

_STRICT = ConfigDict(strict=True, extra="forbid")
_Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
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
    """What a program is given and must print; how words are spaced and empty lines around the whole do not count."""

    input: str
    output: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StdinProblem(_Problem):
    """A program that reads standard input and writes standard output."""

    kind: Literal["stdin"]
    tests: Annotated[list[StdinTest], Field(min_length=1)]
    tolerance: _Tolerance = 0.0
    """Absolute or relative error allowed in printed numbers; 0 compares decimals exactly (1.50 equals 1.5)."""

    def messages(self) -> list[dict[str, Any]]:
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
    function: _Identifier
    tests: Annotated[list[CallTest], Field(min_length=1)]
    tolerance: _Tolerance = 1e-6
    """Relative error allowed where a number is not whole; NaN and Infinity must be just that."""

    def messages(self) -> list[dict[str, Any]]:
        """What the sandbox is told of each test; never what is expected."""
        return [
            {"kind": "call", "function": self.function, "arguments": json.dumps([test.args, test.kwargs])}
            for test in self.tests
        ]

    def judge(self, index: int, output: bytes) -> str:
        """What is wrong with the result of a test, or an empty text."""
        return different_value(self.tests[index].output, output, self.tolerance)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _CheckedProblem(_Problem):
    """Tests that are code. They run beside the answer, in a process with a preamble of its own."""

    defines: list[_Identifier] = Field(default_factory=list)
    """Names that an answer must define although they are builtins, or names of the preamble or the standard library;
    needed only where the tests do not tell (code_names.py)."""

    def judge(self, index: int, output: bytes) -> str:
        """Whether the test came to its end, as the process that ran it says."""
        return "" if output == b"passed" else "the test did not come to its end"

    def _messages(self, setup: str, tests: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """What the sandbox is told of tests, each some code and the name of the one case of it that is run."""
        names = self._names(setup, [code for code, _ in tests])
        shared = {"kind": "assert", "preamble": self.preamble, "setup": setup, **names._asdict()}
        return [{**shared, "test": code, "case": case} for code, case in tests]

    def _names(self, setup: str, tests: Sequence[str]) -> Names:
        _parsed(self.preamble, "preamble")
        return names_of_tests(self.preamble, setup, tuple(tests), tuple(self.defines))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AssertProblem(_CheckedProblem):
    """Pieces of code, each of them one test: assertions, test functions, `unittest` cases."""

    kind: Literal["assert"]
    tests: Annotated[list[str], Field(min_length=1)]
    setup: str = ""
    """Code that every test starts with, such as imports and functions of its own."""

    def __post_init__(self) -> None:
        for where, code in (("setup", self.setup), *((f"tests.{i}", test) for i, test in enumerate(self.tests))):
            parsed = _parsed(code, where)
            if not parsed.body and where != "setup":
                raise ValueError(f"{where}: holds no code")
            require_plain_tests(parsed, where)
        self._names(self.setup, self.tests)

    def messages(self) -> list[dict[str, Any]]:
        """What the sandbox is told of each test: the process of the answer is told nothing of it."""
        return self._messages(self.setup, [(test, "") for test in self.tests])


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PytestProblem(_CheckedProblem):
    """A file of tests as pytest would collect it, without fixtures: each function or method is one test."""

    kind: Literal["pytest"]
    code: str

    def __post_init__(self) -> None:
        parsed = _parsed(self.code, "code")
        require_plain_tests(parsed, "code")
        if not cases_of(parsed):
            raise ValueError("code: defines no function test_... and no class Test... with one, or all are skipped")
        self._names("", [self.code])

    def messages(self) -> list[dict[str, Any]]:
        """What the sandbox is told of each test; see `AssertProblem`."""
        return self._messages("", [(self.code, case) for case in cases_of(_parsed(self.code, "code"))])


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


def met_tests(problem: CodeProblem, messages: Sequence[dict[str, Any]], limits: Limits) -> str:
    """A fingerprint of what an answer is scored by: the tests as they are run and judged, their order, their limits.

    Args:
        problem: what judges them.
        messages: the tests that are run, in their order.
        limits: of each.

    Returns:
        Their number and a digest, for instance "16 tests 5c0d1e7f9a3b2c4d".
    """
    judged = _ADAPTER.dump_json(problem, exclude={"solution"})
    digest = hashlib.blake2b(judged, digest_size=8)
    digest.update(json.dumps([messages, asdict(limits)]).encode())
    return f"{len(messages)} tests {digest.hexdigest()}"


def _dotted(location: Sequence[str | int]) -> str:
    """A place in the reference, without the name of the kind that pydantic puts first."""
    path = ".".join(str(part) for part in location if part not in ("stdin", "call", "assert", "pytest"))
    return f"{path}: " if path else ""


def _parsed(code: str, where: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: is not Python: {error}") from error
