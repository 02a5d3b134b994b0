r"""Write raw rows for the curation example: problems of reasoning-gym with a played teacher's responses; a benchmark.

Problems and gold answers are reasoning-gym's own, from four of its tasks as four sources. Small problems repeat by
themselves, and some of the training problems are also in the benchmark, as happens with data collected from the web.
The teacher is played: it thinks in a sentence and is right more often on easy tasks. So is the model whose pass rate
says how hard a problem is. A few rows are damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reasoning_gym.factory import create_dataset

# Task, its settings, and how often the played teacher is right.
TASKS: dict[str, tuple[dict[str, Any], float]] = {
    "chain_sum": ({"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}, 0.95),
    "decimal_chain_sum": ({"min_terms": 2, "max_terms": 3}, 0.7),
    "simple_equations": ({}, 0.5),
    "count_bits": ({}, 0.3),
}
RESPONSES, GUESSES, WIDTH = 4, 8, 64
_OPENING = "State the final answer to the following arithmetic problem: "


def problems(task: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and gold answers of a task.

    What all sums begin with is left out: eight words of it and one number would be a 9-gram, and a third of the sums
    would be taken for the benchmark's.
    """
    for item in create_dataset(task, size=count, seed=seed, **TASKS[task][0]):
        yield item["question"].removeprefix(_OPENING), str(item["answer"])


def response(answer: str, chance: float, rng: random.Random) -> str:
    """A response that is right with the given chance; one in thirty forgets to close its thinking."""
    said = answer if rng.random() < chance else f"{rng.randint(100, 999)}"
    if rng.random() < 1 / 30:
        return f"<think>I work it out and get \\boxed{{{said}}}"
    return f"<think>I work it out step by step and get {said}.</think>\n\nThe answer is \\boxed{{{said}}}."


def embedding(text: str) -> list[float]:
    """Hashed counts of letters in threes: close for alike texts, and enough for an example."""
    counts = [0.0] * WIDTH
    for start in range(len(text) - 2):
        counts[hashlib.blake2b(text[start : start + 3].encode(), digest_size=2).digest()[0] % WIDTH] += 1.0
    return counts


def rows(count: int, rng: random.Random) -> Iterator[str]:
    """Lines of the input: good rows, and now and then a damaged one."""
    for task, (_, chance) in TASKS.items():
        for number, (question, answer) in enumerate(problems(task, count, seed=1)):
            right = chance - 0.2 + 0.3 * rng.random()
            row = {
                "id": f"{task}-{number}",
                "domain": "math",
                "source": task,
                "messages": [{"role": "user", "content": question}],
                "reference": answer,
                "responses": [response(answer, chance, rng) for _ in range(RESPONSES)],
                "pass_rate": sum(rng.random() < right for _ in range(GUESSES)) / GUESSES,
                "embedding": embedding(question),
            }
            if rng.random() < 0.01:
                del row[rng.choice(["messages", "domain"])]
            line = json.dumps(row)
            yield line[: len(line) // 2] if rng.random() < 0.005 else line


def main() -> None:
    """Write rows.jsonl and benchmark.jsonl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/curation/data"))
    parser.add_argument("--count", type=int, default=400, help="problems of each task")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = "".join(line + "\n" for line in rows(options.count, random.Random(7)))
    (options.out / "rows.jsonl").write_text(lines, encoding="utf-8")
    # In the form that AIME is published in; its first ten problems of each task are also training problems.
    with (options.out / "benchmark.jsonl").open("w", encoding="utf-8") as file:
        for task in TASKS:
            heldout = list(problems(task, 20, seed=10_001))
            for question, answer in [*list(problems(task, 10, seed=1)), *heldout]:
                row = {"messages": [{"role": "user", "content": question}], "meta": {"solution": answer}}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
