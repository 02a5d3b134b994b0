"""Write long chains of thought that people can read: competition mathematics solved by language models.

    python examples/champ_data.py --out runs/champ/data [--problems 270] [--long-tokens 12000 --long-rows 8]

The conversations are those of champ-dataset (270 problems, MIT licence): a model's work on a problem becomes the
thinking part, its one-sentence summary the answer. As they have some hundred tokens each, `--long-rows` of the problems
also get a row of up to `--long-tokens` tokens, in which one model's attempts follow one another. Writes OUT/sft (JSON
lines by model, the long rows as Parquet) and OUT/tokenizer, a byte-pair tokenizer learned from these texts.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from quickstart_data import END_TOKEN, PAD_TOKEN, START_TOKEN, THINK_END, THINK_START, write_rows, write_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

Row = dict[str, Any]
FIRST_TRY = "0-Shot"
VOCABULARY = 1024


def read_problems(count: int) -> dict[str, Any]:
    """The first problems of the data set, by their names."""
    text = (files("champ_dataset") / "dataset_files" / "v0.json").read_text(encoding="utf-8")
    return dict(list(json.loads(text)["problems"].items())[:count])


def row(name: str, question: str, work: str, answer: str, source: str) -> Row:
    """An SFT row: the work is the thinking part."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"{THINK_START}\n{work.strip()}\n{THINK_END}\n\n{answer.strip()}"},
    ]
    return {"id": name, "messages": messages, "source": source}


def attempts(problem: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """(model, kind of prompt, texts in turns) of the conversations in which a model solves and then summarises."""
    for kind, conversation in problem["conversations"].items():
        model, _, prompt = kind.partition("|")
        texts = [message["text"] or "" for message in conversation["messages"]]
        if len(texts) == 5 and all(text.strip() for text in texts):
            yield model, prompt, texts


def short_rows(problems: dict[str, Any]) -> dict[str, list[Row]]:
    """Each model's first try at each problem, by model."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for name, problem in problems.items():
        for model, prompt, texts in attempts(problem):
            if prompt == FIRST_TRY:
                rows[model].append(row(f"{name}/{model}", texts[1], texts[2], texts[4], model))
    return rows


def long_rows(problems: dict[str, Any], count: int, tokens: int, tokenizer: Tokenizer) -> list[Row]:
    """Rows of up to so many tokens, one for each of the first problems."""
    rows = []
    for name, problem in list(problems.items())[:count]:
        work, length, answer = "", 0, ""
        for _, _, texts in attempts(problem):
            added = len(tokenizer.encode(texts[2]).ids) + 64
            if length + added > tokens:
                break
            work, length, answer = f"{work}\n\nAnother way.\n\n{texts[2].strip()}", length + added, texts[4]
        rows.append(row(f"{name}/long", problem["_text"], work, answer, "long"))
    return rows


def learn_tokenizer(rows: list[Row]) -> Tokenizer:
    """A byte-level byte-pair tokenizer of these rows; the thinking tags are tokens that stay in decoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((message["content"] for r in rows for message in r["messages"]), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (THINK_START, THINK_END)])
    return tokenizer


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--problems", type=int, default=270, help="problems to take")
    parser.add_argument("--long-tokens", type=int, default=12_000, help="most tokens of a long row")
    parser.add_argument("--long-rows", type=int, default=8, help="problems that also get a long row")
    options = parser.parse_args()
    problems = read_problems(options.problems)
    short = short_rows(problems)
    tokenizer = learn_tokenizer([r for rows in short.values() for r in rows][:400])
    write_tokenizer(options.out / "tokenizer", tokenizer)
    (options.out / "sft").mkdir(parents=True, exist_ok=True)
    for model, rows in short.items():
        write_rows(options.out / "sft" / f"{model.replace(' ', '-')}.jsonl", rows)
    long = long_rows(problems, options.long_rows, options.long_tokens, tokenizer)
    if long:
        pq.write_table(pa.Table.from_pylist(long), options.out / "sft" / "long.parquet")
    print(f"{options.out}: {sum(map(len, short.values()))} rows and {len(long)} long ones, {VOCABULARY} tokens")


if __name__ == "__main__":
    main()
