"""Generations as a file: JSON lines, one response each, whoever wrote them.

{"problem_id", "response", "index"?, "benchmark"?, "finish_reason"?: "stop" | "length" | "abort", "num_tokens"?}

or all responses to a problem in one row, with `responses`, a list, in place of `response`. Responses without an index
get the smallest ones that no earlier row has. A row that cannot be used is put into a rejects file with file, line and
reason, and counted; the others are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from megatron_klear.data.jsonl import JsonObject, json_type, read_objects
from megatron_klear.data.problems import Problems
from megatron_klear.records import FinishReason

_FINISH_REASONS = get_args(FinishReason)
_LARGEST_COUNT = 2**53
"""Larger ones are no count of anything, and no floating point number holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One response to a problem.

    Attributes:
        problem_id: of the problem, unique within its benchmark.
        index: which of the responses to it.
        response: text, without the prompt and the end token.
        finish_reason: why it ended.
        num_tokens: its length; None where nobody counted.
        benchmark: name of the benchmark; empty where there is only one.
    """

    problem_id: str
    index: int
    response: str
    finish_reason: FinishReason = "stop"
    num_tokens: int | None = None
    benchmark: str = ""


class Rejects(Problems):
    """Rows that cannot be used, written to a file as they are found: {"where", "reason"}.

    Args:
        subject: what is being read.
        path: the rejects file; made with the first reject.
    """

    def __init__(self, subject: str, path: Path) -> None:
        super().__init__(subject)
        self.path = path
        path.unlink(missing_ok=True)

    def add(self, where: str, what: str) -> None:
        """Note a row that is left out."""
        super().add(where, what)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"where": where, "reason": what}) + "\n")


def read_generations(path: str | Path, rejects: Rejects) -> Iterator[Generation]:
    """Usable responses of a file, in its order; (benchmark, problem_id, index) is unique among them.

    Args:
        path: JSON lines.
        rejects: takes the rows that cannot be used, and a file that cannot be read.
    """
    seen: dict[tuple[str, str], _Indices] = {}
    for where, value in read_objects([path], rejects, setting="GENERATIONS"):
        wrong = _faults(value)
        if wrong:
            rejects.add(where, "; ".join(wrong))
            continue
        key = (value.get("benchmark", ""), str(value["problem_id"]))
        indices = seen.setdefault(key, _Indices())
        responses = [value["response"]] if "response" in value else value["responses"]
        for number, response in enumerate(responses):
            index = value["index"] + number if "index" in value else indices.free()
            if not indices.take(index):
                rejects.add(where, f"response {index} to problem {key[1]!r} was given before")
                continue
            yield Generation(
                problem_id=key[1],
                index=index,
                response=response,
                finish_reason=cast(FinishReason, value.get("finish_reason", "stop")),
                num_tokens=value.get("num_tokens"),
                benchmark=key[0],
            )


class _Indices:
    """The indices of the responses to a problem that were given so far."""

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._free = 0

    def free(self) -> int:
        """The smallest that was not given."""
        while self._free in self._taken:
            self._free += 1
        return self._free

    def take(self, index: int) -> bool:
        """Note one as given; whether it was free."""
        is_free = index not in self._taken
        self._taken.add(index)
        return is_free


def write_generations(path: Path, generations: Iterable[Generation]) -> None:
    """Write a generations file, in one piece or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for generation in generations:
            file.write(json.dumps(asdict(generation)) + "\n")
    part.replace(path)


def _faults(value: JsonObject) -> list[str]:
    wrong = []
    problem_id = value.get("problem_id")
    if isinstance(problem_id, bool) or not isinstance(problem_id, (str, int)) or problem_id == "":
        wrong.append(f"problem_id must be a text or a whole number, got {_got(value, 'problem_id')}")
    if ("response" in value) == ("responses" in value):
        wrong.append("expected one of response and responses")
    elif "response" in value and not isinstance(value["response"], str):
        wrong.append(f"response must be a text, got {json_type(value['response'])}")
    elif "responses" in value and not _is_texts(value["responses"]):
        wrong.append("responses must be a list of at least one text")
    if not _is_count(value.get("index", 0)):
        wrong.append(f"index must be a whole number from 0 to 2^53, got {_got(value, 'index')}")
    if value.get("finish_reason", "stop") not in _FINISH_REASONS:
        wrong.append(f"finish_reason must be one of {', '.join(_FINISH_REASONS)}, got {value['finish_reason']!r}")
    if value.get("num_tokens") is not None and not _is_count(value["num_tokens"]):
        wrong.append(f"num_tokens must be a whole number from 0 to 2^53, got {_got(value, 'num_tokens')}")
    if not isinstance(value.get("benchmark", ""), str):
        wrong.append(f"benchmark must be a text, got {_got(value, 'benchmark')}")
    return wrong


def _got(value: JsonObject, key: str) -> str:
    return json.dumps(value[key])[:80] if key in value else "none"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_COUNT


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
