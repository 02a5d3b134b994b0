r"""Benchmark rows as they are published, turned into prompt rows; each row says by its keys what it is.

prompt row      {"id", "domain": "math" | "code", "messages", "reference"}             as everywhere in this project
AIME            {"messages"?, "meta": {"problem", "solution", "answer"?}}              the bare answer is in `solution`
HMMT            {"id", "messages", "solution": "\\boxed{...}", "answer"?}
plain math      {"id"?, "problem" | "question", "answer" | "solution"}
LiveCodeBench   {"question_id", "question_content", "starter_code", "public_test_cases", "private_test_cases",
                "metadata"}                                                            see `livecodebench`

One judge for one nesting would score the others 0, so a row that has no answer where its form has it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_klear.data.jsonl import JsonObject, json_type, read_objects
from megatron_klear.data.problems import Problems
from megatron_klear.data.rows import PromptRow, prompt_row
from megatron_klear.evaluation.livecodebench import is_livecodebench, livecodebench_row

MATH_INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
"""Follows a problem that is published without messages."""

_LONGEST_BARE_ANSWER = 200
"""A `solution` longer than this, without a box, is a worked solution and no answer."""


def read_benchmark(path: str | Path, *, setting: str, instruction: str = MATH_INSTRUCTION) -> list[PromptRow]:
    """Rows of one benchmark file in any of the published forms.

    Args:
        path: JSON lines.
        setting: dotted path of the setting that lists the file.
        instruction: follows a math problem that comes without messages.

    Raises:
        DataError: naming file and line of everything that is wrong, repeated ids and a file without rows included.
    """
    path = Path(path)
    problems = Problems(f"the benchmark {path} of {setting}")
    rows: dict[str, PromptRow] = {}
    for where, value in read_objects([path], problems, setting=setting):
        row = _row(where, value, default_id=f"{path.stem}:{where.rpartition(':')[2]}", instruction=instruction)
        if isinstance(row, list):
            for text in row:
                problems.add(where, text)
        elif row.row_id in rows:
            problems.add(where, f"has the id {row.row_id!r} of {rows[row.row_id].where}; ids must be unique in a file")
        else:
            rows[row.row_id] = row
    if not rows and not problems:
        problems.add(str(path), f"no rows at all; list a file with rows in {setting}")
    problems.raise_if_any()
    return list(rows.values())


def _row(where: str, value: JsonObject, *, default_id: str, instruction: str) -> PromptRow | list[str]:
    if "domain" in value and "reference" in value:
        return prompt_row(where, value)
    if is_livecodebench(value):
        made = livecodebench_row(value)
        return made if isinstance(made, list) else prompt_row(where, made)
    return _math_row(where, value, default_id, instruction)


def _math_row(where: str, value: JsonObject, default_id: str, instruction: str) -> PromptRow | list[str]:
    meta = value.get("meta")
    source: Mapping[str, Any] = {**value, **meta} if isinstance(meta, dict) else value
    problem = next((source[key] for key in ("problem", "question") if isinstance(source.get(key), str)), None)
    messages = value.get("messages")
    if messages is None:
        if problem is None or not problem.strip():
            return [
                "is no benchmark row: expected a prompt row (id, domain, messages, reference), messages or a problem "
                f"with an answer, or LiveCodeBench's keys; got the keys {', '.join(sorted(value)) or 'none'}"
            ]
        messages = [{"role": "user", "content": f"{problem.strip()}\n\n{instruction}"}]
    answer = _answer(source)
    if answer is None:
        got = json_type(source.get("answer", source.get("solution")))
        return [f"has no answer: expected `answer`, or `solution` as a short text or with a \\boxed answer, got {got}"]
    row_id = next((source[key] for key in ("id", "problem_idx", "unique_id") if key in source), default_id)
    return prompt_row(
        where, {"id": row_id, "domain": "math", "messages": _ending_with_user(messages), "reference": answer}
    )


def _answer(source: Mapping[str, Any]) -> str | int | None:
    """`answer`, else the last box of `solution`, else a short `solution`; None where there is none of them."""
    for key in ("answer", "solution"):
        text = source.get(key)
        if isinstance(text, int) and not isinstance(text, bool):
            return text
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
