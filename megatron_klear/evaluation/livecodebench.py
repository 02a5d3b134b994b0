"""LiveCodeBench rows as they are published (code generation, full and lite releases).

Facts about the form, from the released files: `public_test_cases` is JSON text, a list of {"input", "output",
"testtype": "stdin" | "functional"}; `private_test_cases` is the same, or base64 of zlib of a pickle of that JSON text;
`metadata` is JSON text with `func_name` where tests call a function, whose arguments are JSON values, one per line;
`starter_code` is empty unless there is such a function; `contest_date` is ISO text, or a timestamp in Parquet copies.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from datetime import date, datetime
from typing import Any

from megatron_klear.data.jsonl import JsonObject, json_type

_LARGEST_BYTES = 2**30
"""Of unpacked tests; the largest published ones are some hundred MB."""

_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
_CONTENTS = (*_MODULES, "builtins", "typing")
"""Of which every name is given; builtins after those that have names of theirs, such as io.open and math.pow."""

_GIVEN = "\n".join(
    [
        *(f"from {name} import *" for name in _CONTENTS),
        f"import {', '.join(_MODULES)}",
        "sys.setrecursionlimit(50_000)",
        "",
    ]
)
"""What LiveCodeBench's own harness gives every answer, in its order: a module that has a member of its name (bisect,
copy, datetime, random) is the module; starter code names List and others without importing them."""

_STDIN_INSTRUCTION = (
    "Write a Python program that solves the problem. It reads the input from standard input and writes the answer to "
    "standard output. Put the whole program into one fenced block, ```python ... ```, after your reasoning."
)
_CALL_INSTRUCTION = (
    "Complete this starter code in Python so that it solves the problem. Put the whole solution into one fenced block, "
    "```python ... ```, after your reasoning.\n\n```python\n{starter}\n```"
)


_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
_AROUND_TEXTS = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")
"""Opcodes of a pickle that holds one text, in any protocol."""


def is_livecodebench(value: JsonObject) -> bool:
    """Whether a row has LiveCodeBench's keys."""
    return "question_content" in value and "public_test_cases" in value


def livecodebench_row(value: JsonObject) -> JsonObject | list[str]:
    """The prompt row of a LiveCodeBench row, or everything that is wrong with it."""
    wrong: list[str] = []
    public = _tests("public_test_cases", value.get("public_test_cases"), wrong)
    private = _tests("private_test_cases", value.get("private_test_cases", "[]"), wrong)
    metadata = _parsed("metadata", value.get("metadata") or "{}", wrong)
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    kinds = {test["testtype"] for test in [*public, *private]}
    if not wrong and not kinds:
        wrong.append("has no tests")
    if len(kinds) > 1:
        wrong.append(f"mixes tests of the kinds {', '.join(sorted(kinds))}")
    if kinds == {"functional"} and not (isinstance(function, str) and function.isidentifier()):
        wrong.append(f"metadata must name the function that its tests call (func_name), got {function!r}")
    content, starter = value.get("question_content"), value.get("starter_code")
    starter = "" if starter is None else starter
    if not isinstance(content, str) or not content.strip():
        got = "an empty text" if isinstance(content, str) else json_type(content)
        wrong.append(f"question_content must be a text, got {got}")
    if not isinstance(starter, str):
        wrong.append(f"starter_code must be a text, got {json_type(starter)}")
    elif kinds == {"functional"} and not starter.strip():
        wrong.append("starter_code is empty, and without it nobody knows what function the tests call")
    if wrong:
        return wrong
    starter = starter.strip()
    calls = kinds == {"functional"}
    instruction = _CALL_INSTRUCTION.format(starter=starter) if calls else _STDIN_INSTRUCTION
    tests = [*public, *private]
    return {
        "id": value.get("question_id"),
        "domain": "code",
        "messages": [{"role": "user", "content": f"{str(content).strip()}\n\n{instruction}"}],
        "reference": _calls(str(function), tests) if calls else _programs(tests),
    }


def contest_day(value: JsonObject) -> date | str:
    """The day of a row's contest, or why it is not known."""
    given = value.get("contest_date")
    if isinstance(given, datetime):
        return given.date()
    try:
        return datetime.fromisoformat(given).date()  # type: ignore[arg-type]  # a TypeError is one of the answers
    except (TypeError, ValueError):
        got = repr(given[:40]) if isinstance(given, str) else json_type(given)
        return f"contest_date must be a date such as 2025-02-01T00:00:00, got {got}"


def _programs(tests: list[dict[str, str]]) -> dict[str, Any]:
    asked = [{"input": test["input"], "output": test["output"]} for test in tests]
    return {"kind": "stdin", "preamble": _GIVEN, "tests": asked}


def _calls(function: str, tests: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "kind": "call",
        "preamble": _GIVEN,
        "function": function,
        "tests": [
            {
                "args": [json.loads(line) for line in test["input"].split("\n") if line.strip()],
                "output": json.loads(test["output"]),
            }
            for test in tests
        ],
    }


def _tests(key: str, packed: Any, wrong: list[str]) -> list[dict[str, str]]:
    """Tests of a field; what is wrong with it is added to `wrong`."""
    if isinstance(packed, str) and not packed.lstrip().startswith("["):
        packed = _unpacked(key, packed, wrong)
    tests = packed if isinstance(packed, list) else _parsed(key, packed, wrong)
    if not isinstance(tests, list):
        wrong.append(f"{key} must be a list of tests as JSON")
        return []
    good = []
    for number, test in enumerate(tests, start=1):
        fault = _fault(test)
        if fault:
            wrong.append(f"{key}, test {number}: {fault}")
        else:
            good.append(test)
    return good


def _fault(test: Any) -> str:
    if not isinstance(test, dict) or not all(isinstance(test.get(k), str) for k in ("input", "output", "testtype")):
        return "expected input, output and testtype as texts"
    if test["testtype"] not in ("stdin", "functional"):
        return f"testtype must be stdin or functional, got {test['testtype']!r}"
    if test["testtype"] == "functional":
        try:
            for text in [*test["input"].split("\n"), test["output"]]:
                if text.strip():
                    json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"its arguments and result must be JSON values, one per line ({error})"
        if not test["output"].strip():
            return "it has no result"
    return ""


def _unpacked(key: str, packed: str, wrong: list[str]) -> str:
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(packed, validate=True), _LARGEST_BYTES)
        if not unpacker.eof:
            wrong.append(f"{key} unpacks to more than {_LARGEST_BYTES} bytes, or is cut off")
            return "[]"
        return _unpickled(content)
    except (binascii.Error, ValueError, zlib.error) as error:
        wrong.append(f"{key} is neither JSON nor packed JSON ({error})")
        return "[]"


def _unpickled(content: bytes) -> str:
    """The text that a pickle holds, read from its opcodes.

    No unpickler runs: one that refuses every class can still be made to take all memory by ten bytes (`LONG_BINPUT`
    with a large number).

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in _TEXTS and not texts:
                texts.append(str(argument))
            elif opcode.name not in _AROUND_TEXTS:
                raise ValueError(f"the pickle may hold one text and nothing else, found {opcode.name}")
    except ValueError:
        raise
    except Exception as error:  # whatever damaged bytes make the reader raise
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not texts:
        raise ValueError("the pickle holds no text")
    return texts[0]


def _parsed(key: str, text: Any, wrong: list[str]) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        wrong.append(f"{key} is not JSON ({error})")
        return []
