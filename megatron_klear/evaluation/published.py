r"""Benchmark rows as they are published, turned into prompt rows; each row says by its keys what it is.

prompt row      {"id", "domain": "math" | "code", "messages", "reference"}             as everywhere in this project
AIME            {"messages"?, "meta": {"problem", "solution", "answer"?}}              the bare answer is in `solution`
                {"id" | "ID", "problem" | "Problem", "solution"?, "answer" | "Answer"}     with or without capitals
HMMT            {"id", "messages", "solution": "\\boxed{...}", "answer"?}
                {"problem_idx", "problem", "answer", "problem_type"?}
plain math      {"id"?, "problem" | "question", "answer" | "solution"}
LiveCodeBench   {"question_id", "question_content", "starter_code", "public_test_cases", "private_test_cases",
                "metadata", "contest_date"}                                            see `livecodebench`

Files are JSON lines or Parquet, which is what the hub has of AIME and HMMT. One judge for one nesting would score the
others 0, so a row that has no answer where its form has it is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from megatron_klear.data.index.parts import plan_parts, read_part
from megatron_klear.data.jsonl import JsonObject, json_type, read_objects
from megatron_klear.data.problems import Problems
from megatron_klear.data.rows import PromptRow, prompt_row
from megatron_klear.evaluation.livecodebench import contest_day, is_livecodebench, livecodebench_row

MATH_INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
"""Follows a problem that is published without messages."""

_LONGEST_BARE_ANSWER = 200
"""A `solution` longer than this, without a box, is a worked solution and no answer."""

_MATH_KEYS = ("id", "problem_idx", "unique_id", "problem", "question", "answer", "solution")
_COLUMNS = (
    *_MATH_KEYS, "ID", *map(str.capitalize, _MATH_KEYS), "messages", "meta", "domain", "reference", "question_id",
    "question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata", "contest_date",
)  # fmt: skip
"""What is read of a Parquet file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contests:
    """The contests whose LiveCodeBench problems are asked: by day, both days included; None bounds nothing."""

    first: date | None = None
    last: date | None = None

    def __bool__(self) -> bool:
        return self.first is not None or self.last is not None

    def hold(self, day: date) -> bool:
        """Whether the problems of a day's contests are asked."""
        return (self.first is None or self.first <= day) and (self.last is None or day <= self.last)


ALL_CONTESTS = Contests()


def read_benchmark(
    path: str | Path, *, setting: str, instruction: str = MATH_INSTRUCTION, contests: Contests = ALL_CONTESTS
) -> list[PromptRow]:
    """Rows of one benchmark file in any of the published forms.

    Args:
        path: JSON lines or Parquet.
        setting: dotted path of the setting that lists the file.
        instruction: follows a math problem that comes without messages.
        contests: leaves out LiveCodeBench's problems of other contests, without unpacking their tests.

    Raises:
        DataError: naming file and line of everything that is wrong, repeated ids and a file without rows included.
    """
    path = Path(path)
    problems = Problems(f"the benchmark {path} of {setting}")
    rows: dict[str, PromptRow] = {}
    left_out = 0
    for where, value in _objects(path, problems, setting):
        if contests and is_livecodebench(value):
            day = contest_day(value)
            if isinstance(day, str):
                problems.add(where, day)
                continue
            if not contests.hold(day):
                left_out += 1
                continue
        row = _row(where, value, default_id=f"{path.stem}:{where.rpartition(':')[2]}", instruction=instruction)
        if isinstance(row, list):
            for text in row:
                problems.add(where, text)
        elif row.row_id in rows:
            problems.add(where, f"has the id {row.row_id!r} of {rows[row.row_id].where}; ids must be unique in a file")
        else:
            rows[row.row_id] = row
    if not rows and left_out and not problems:
        problems.add(str(path), f"none of its {left_out} problems is of a contest of the days that are asked for")
    elif not rows and not problems:
        problems.add(str(path), f"no rows at all; list a file with rows in {setting}")
    problems.raise_if_any()
    return list(rows.values())


def _objects(path: Path, problems: Problems, setting: str) -> Iterator[tuple[str, JsonObject]]:
    """Yield (where, object) of a file; what cannot be read is added to the problems."""
    if path.suffix != ".parquet":
        yield from read_objects([path], problems, setting=setting)
        return
    parts = plan_parts([str(path)], setting=setting, required=())
    values = itertools.chain.from_iterable(read_part(part, str(path), columns=_COLUMNS) for part in parts)
    for number, value in enumerate(values, start=1):
        where = f"{path}:{number}"
        if isinstance(value, str):
            problems.add(where, value)
        elif value is not None:
            # What a row leaves out is null in Parquet.
            yield where, {key: item for key, item in value.items() if item is not None}


def _row(where: str, value: JsonObject, *, default_id: str, instruction: str) -> PromptRow | list[str]:
    if "domain" in value and "reference" in value:
        return prompt_row(where, value)
    if is_livecodebench(value):
        made = livecodebench_row(value)
        return made if isinstance(made, list) else prompt_row(where, made)
    return _math_row(where, value, default_id, instruction)


def _math_row(where: str, value: JsonObject, default_id: str, instruction: str) -> PromptRow | list[str]:
    meta = value.get("meta")
    more = {key: item for key, item in meta.items() if item is not None} if isinstance(meta, dict) else {}
    given: Mapping[str, Any] = {**value, **more}
    # Some files have keys with capitals; a key without wins where there are both.
    source = {**{key.lower(): item for key, item in given.items()}, **given}
    problem = next((source[key] for key in ("problem", "question") if isinstance(source.get(key), str)), None)
    messages = value.get("messages")
    if messages is None:
        if problem is None or not problem.strip():
            return [
                "is no benchmark row: expected a prompt row (id, domain, messages, reference), messages or a problem "
                f"with an answer, or LiveCodeBench's keys; got the keys {_keys(value)}"
            ]
        messages = [{"role": "user", "content": f"{problem.strip()}\n\n{instruction}"}]
    answer = _answer(source)
    if answer is None:
        got = json_type(source.get("answer", source.get("solution")))
        return [f"has no answer: expected `answer`, or `solution` as a short text or with a \\boxed answer, got {got}"]
    row_id = next(
        (source[key] for key in ("id", "problem_idx", "unique_id") if source.get(key) is not None), default_id
    )
    return prompt_row(
        where, {"id": row_id, "domain": "math", "messages": _ending_with_user(messages), "reference": answer}
    )


def _keys(value: JsonObject) -> str:
    shown = ", ".join(sorted(value)[:20]) or "none"
    return shown if len(shown) <= 400 else f"{shown[:400]} ..."


def _answer(source: Mapping[str, Any]) -> str | int | None:
    """`answer`, else the last box of `solution`, else a short `solution`; None where there is none of them."""
    for key in ("answer", "solution"):
        text = source.get(key)
        if isinstance(text, int) and not isinstance(text, bool):
            return text
        if isinstance(text, float) and text.is_integer():
            return int(text)  # a column of whole numbers that had a gap somewhere becomes one of floats
        if not isinstance(text, str) or not text.strip():
            continue
        if key == "answer" or re.search(r"\\boxed\s*\{", text) or len(text) <= _LONGEST_BARE_ANSWER:
            return text.strip()  # the grader takes the last box of a reference that has some
    return None


def _ending_with_user(messages: Any) -> Any:
    """Without the assistant's message that some files end with: it is the answer."""
    if isinstance(messages, list) and len(messages) > 1:
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") == "assistant":
            return messages[:-1]
    return messages


def benchmark_name(path: str | Path) -> str:
    """Name of a benchmark: the file's, without ending."""
    return Path(path).stem
