r"""Write the quickstart's data: a tokenizer, worked examples, problems to practise on and held-out problems.

The problems are sums of four to six one-digit numbers from reasoning-gym's `chain_sum` (questions and gold answers are
its own), such as `7 - 6 + 5 + 0 =`. The worked examples play a teacher with two habits: two times in five a running
total per line, otherwise the result at once. All end on the right answer, but a small model can hardly learn to do a
whole sum in its head. That writing more pays is for reinforcement learning to find out.

Training and held-out problems are disjoint by construction: a problem's side is a hash of its signed numbers in
sorted order, whatever the seed. So no held-out problem, nor one with the same numbers in another order, is ever
trained on, in any run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoning_gym.factory import create_dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PROBLEM_SIZES = {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 1}
"""Settings of `chain_sum`."""

HELDOUT_BYTES = 26
"""Problems whose hash starts with a byte below this, one in ten, are held out."""

STYLES = {"totals": 0.4, "brief": 0.6}
"""The teacher's habits and how often each is followed: a running total per line, or the result at once."""

PAD_TOKEN, START_TOKEN, END_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK_START, THINK_END = "<think>", "</think>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# reasoning-gym draws item i of a data set from seed + i: streams stay apart when their seeds do.
_STREAM_LENGTH = 1_000_000
_CHUNK = 5000


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One sum: the question and answer of reasoning-gym, and its numbers with their signs, as in ("7", "-6", "+0")."""

    question: str
    answer: str
    terms: tuple[str, ...]

    @property
    def key(self) -> str:
        """What two problems share when one is the other with its numbers in another order."""
        return ",".join(str(number) for number in sorted(map(int, self.terms)))

    @property
    def is_heldout(self) -> bool:
        """The side of the split, a function of the numbers alone."""
        return hashlib.sha256(self.key.encode()).digest()[0] < HELDOUT_BYTES


def problem_stream(seed: int) -> Iterator[Problem]:
    """Yield problems of both sides, none twice, always in the same order for a seed.

    Raises:
        ValueError: the generator has hardly any new problems left.
    """
    seen: set[str] = set()
    dataset = create_dataset("chain_sum", size=_STREAM_LENGTH, seed=seed * _STREAM_LENGTH, **PROBLEM_SIZES)
    for start in range(0, _STREAM_LENGTH, _CHUNK):
        known = len(seen)
        for index in range(start, start + _CHUNK):
            entry = dataset[index]
            if entry["question"] in seen:
                continue
            seen.add(entry["question"])
            terms = entry["metadata"]["expression"].replace("+ ", "+").replace("- ", "-").split()
            yield Problem(question=entry["question"], answer=entry["answer"], terms=tuple(terms))
        if len(seen) - known < _CHUNK // 4:
            break
    raise ValueError(f"there are only about {len(seen):,} different problems; ask for fewer rows")


def worked_solution(problem: Problem, style: str) -> str:
    r"""The teacher's response in one of `STYLES`: `<think>` lines `</think>`, then `\boxed{answer}`.

    Raises:
        ValueError: there is no such style.
    """
    if style == "brief":
        lines = [f"{''.join(problem.terms)}={problem.answer}"]
    elif style == "totals":
        lines, total = [], int(problem.terms[0])
        for term in problem.terms[1:]:
            lines.append(f"{total}{term}={total + int(term)}")
            total += int(term)
    else:
        raise ValueError(f"got style {style!r}, allowed: {', '.join(STYLES)}")
    return "\n".join([THINK_START, *lines, THINK_END, f"\\boxed{{{problem.answer}}}"])


def sft_row(problem: Problem, style: str, number: int) -> dict[str, Any]:
    """A worked example as a line of sft.jsonl."""
    user = {"role": "user", "content": problem.question}
    assistant = {"role": "assistant", "content": worked_solution(problem, style)}
    return {"id": f"chain-sum-sft-{number:06d}", "messages": [user, assistant], "source": f"chain_sum/{style}"}


def prompt_row(problem: Problem, part: str, number: int) -> dict[str, Any]:
    """A problem with its gold answer as a line of prompts.jsonl or heldout.jsonl."""
    return {
        "id": f"chain-sum-{part}-{number:06d}",
        "domain": "math",
        "messages": [{"role": "user", "content": problem.question}],
        "reference": problem.answer,
    }


def build_tokenizer() -> Tokenizer:
    r"""A byte-pair tokenizer for printable ASCII in which each digit is a token and so is each word of the question.

    It is the same for every seed. `\boxed{`, the chat markers and the thinking tags are single tokens; the thinking
    tags are not special tokens, so that they stay in decoded text.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\\boxed\{|[0-9]| ?[A-Za-z]+| ?[-+=]|\s|[^\sA-Za-z0-9]")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    characters = string.ascii_letters + string.digits + string.punctuation + " \n"
    # Merging all there is to merge in one question makes a token of each of its words.
    question = next(problem_stream(0)).question
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=[to_bytes.pre_tokenize_str(character)[0][0] for character in characters],
        show_progress=False,
    )
    tokenizer.train_from_iterator([question, "user\nassistant\n", "\\boxed{ + - ="], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (THINK_START, THINK_END)])
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Write a Hugging Face tokenizer directory with its chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN,
        "additional_special_tokens": [START_TOKEN],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def draw_problems(seed: int, *, training: int, heldout: int) -> tuple[list[Problem], list[Problem]]:
    """Draw that many problems of either side, each in the order of the stream."""
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    wanted = (training, heldout)
    for problem in problem_stream(seed):
        side = int(problem.is_heldout)
        if len(sides[side]) < wanted[side]:
            sides[side].append(problem)
        elif len(sides[1 - side]) == wanted[1 - side]:
            break
    assert {p.key for p in sides[0]}.isdisjoint(p.key for p in sides[1]), "a held-out problem is trained on"
    return sides


def write_all(out: Path, *, seed: int, sft_rows: int, prompts: int, heldout: int) -> str:
    """Write everything below `out` and return a summary for people.

    Raises:
        ValueError: more problems are asked for than there are.
    """
    training, held = draw_problems(seed, training=sft_rows + prompts, heldout=heldout)
    styles = random.Random(seed).choices(list(STYLES), weights=list(STYLES.values()), k=sft_rows)
    worked = [sft_row(p, style, i) for i, (p, style) in enumerate(zip(training, styles, strict=False))]
    tokenizer = build_tokenizer()
    write_tokenizer(out / "tokenizer", tokenizer)
    files = {
        "sft.jsonl": worked,
        "prompts.jsonl": [prompt_row(p, "train", i) for i, p in enumerate(training[sft_rows:])],
        "heldout.jsonl": [prompt_row(p, "heldout", i) for i, p in enumerate(held)],
    }
    for name, rows in files.items():
        write_rows(out / name, rows)
    counts = {style: sum(row["source"].endswith(style) for row in worked) for style in STYLES}
    return "\n".join(
        [
            f"{out / 'tokenizer'}: {tokenizer.get_vocab_size()} tokens",
            f"{out / 'sft.jsonl'}: {sft_rows} worked examples "
            f"({counts['totals']} with running totals, {counts['brief']} with the result at once)",
            f"{out / 'prompts.jsonl'}: {prompts} problems to practise on",
            f"{out / 'heldout.jsonl'}: {heldout} held-out problems, none with the numbers of a training problem",
            f"an example: {training[0].question}",
            worked_solution(training[0], "totals"),
        ]
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, must be at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2000:
        raise argparse.ArgumentTypeError(f"got {value}, must be from 0 to 1999")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    parser.add_argument("--seed", type=_seed, default=1, help="which problems are drawn (default: 1)")
    parser.add_argument("--sft-rows", type=_positive, default=30000, metavar="N", help="worked examples (30000)")
    parser.add_argument("--prompts", type=_positive, default=4096, metavar="N", help="problems to practise on (4096)")
    parser.add_argument("--heldout", type=_positive, default=512, metavar="N", help="held-out problems (512)")
    given = parser.parse_args(arguments)
    sizes = {"sft_rows": given.sft_rows, "prompts": given.prompts, "heldout": given.heldout}
    try:
        print(write_all(given.out, seed=given.seed, **sizes))
    except (OSError, ValueError) as error:
        print(f"quickstart_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
