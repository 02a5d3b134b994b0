"""LiveCodeBench rows as they are published (code generation, full and lite releases).

Facts about the form, from the released files: `public_test_cases` is JSON text, a list of {"input", "output",
"testtype": "stdin" | "functional"}; `private_test_cases` is the same, or base64 of zlib of a pickle of that JSON text;
`metadata` is JSON text with `func_name` where tests call a function, whose arguments are JSON values, one per line.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any

from megatron_klear.data.jsonl import JsonObject

_LARGEST_BYTES = 2**30
"""Of unpacked tests; the largest published ones are some hundred MB."""

_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "typing",
)  # fmt: skip
_IMPORTS = "".join(f"import {name}\nfrom {name} import *\n" for name in _MODULES) + "from builtins import *\n"
"""What LiveCodeBench's own harness gives every answer: starter code names List and others without importing them."""

_STDIN_INSTRUCTION = (
    "Write a Python program that solves the problem. It reads the input from standard input and writes the answer to "
    "standard output. Put the whole program into one fenced block, ```python ... ```, after your reasoning."
)
_CALL_INSTRUCTION = (
    "Complete this starter code in Python so that it solves the problem. Put the whole solution into one fenced block, "
    "```python ... ```, after your reasoning.\n\n```python\n{starter}\n```"
)


class _TextUnpickler(pickle.Unpickler):
    """Unpickles texts only: a benchmark file must not be able to run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle wants {module}.{name}, and may hold text only")


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
    if wrong:
        return wrong
    starter = str(value.get("starter_code") or "").strip()
    calls = kinds == {"functional"}
    instruction = _CALL_INSTRUCTION.format(starter=starter) if calls else _STDIN_INSTRUCTION
    tests = [*public, *private]
    return {
        "id": value.get("question_id"),
        "domain": "code",
        "messages": [{"role": "user", "content": f"{str(value['question_content']).strip()}\n\n{instruction}"}],
        "reference": _calls(str(function), tests) if calls else _programs(tests),
    }


def _programs(tests: list[dict[str, str]]) -> dict[str, Any]:
    asked = [{"input": test["input"], "output": test["output"]} for test in tests]
    return {"kind": "stdin", "preamble": _IMPORTS, "tests": asked}


def _calls(function: str, tests: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "kind": "call",
        "preamble": _IMPORTS,
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
        if unpacker.unconsumed_tail:
            wrong.append(f"{key} unpacks to more than {_LARGEST_BYTES} bytes")
            return "[]"
        text = _TextUnpickler(io.BytesIO(content)).load()
    except (binascii.Error, ValueError, zlib.error, pickle.UnpicklingError, EOFError, IndexError, KeyError) as error:
        wrong.append(f"{key} is neither JSON nor packed JSON ({error})")
        return "[]"
    if not isinstance(text, str):
        wrong.append(f"{key} must hold text, got {type(text).__name__}")
        return "[]"
    return text


def _parsed(key: str, text: Any, wrong: list[str]) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        wrong.append(f"{key} is not JSON ({error})")
        return []
