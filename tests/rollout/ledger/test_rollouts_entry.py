"""python -m megatron_klear.rollouts: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_klear.records import Grade, Prompt, Rollout
from megatron_klear.rollout.ledger import OPENING, Ledger
from megatron_klear.rollouts import main

WORDS = ["what", "is", "two", "and", "four", "[b]"]


@pytest.fixture
def run(tmp_path: Path, written: Ledger) -> Path:
    """A run directory with a tokenizer of six words and one graded group; the ledger is still open for writing."""
    return tmp_path


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Ledger]:
    """The ledger of `run`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="what"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "config.yaml").write_text(f"tokenizer:\n  dir: {tmp_path / 'tokenizer'}\n")
    prompt = Prompt(prompt_id="sum", domain="math", token_ids=np.array([0, 1, 2, 3, 2]), reference="4", text="2+2?")

    def rollout(*tokens: int) -> Rollout:
        return Rollout(
            response_ids=np.array(tokens), rollout_logprobs=np.full(len(tokens), -0.5, np.float32),
            finish_reason="stop", policy_versions=((0, 1), (1, len(tokens) - 1)),
        )  # fmt: skip

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        [group] = ledger.reserve([(0, prompt)], num_responses=2)
        ledger.save_response(group, 0, rollout(4, 5))
        ledger.save_response(group, 1, rollout(2, 3, 2))
        ledger.save_grades(group, [
            Grade(outcome="correct", reward=1.0), Grade(outcome="wrong", reward=-1.0, reason="not [bold] 4")
        ])  # fmt: skip
        ledger.reserve([(1, prompt)], num_responses=2)
        yield ledger


def said(capsys, *arguments: object, status: int = 0) -> str:
    assert main([str(a) for a in arguments]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


def test_list(run, capsys):
    text = said(capsys, run, "list")
    assert "1 reserved, 1 graded; 2 shown" in text
    [line] = [line.split() for line in text.splitlines() if "graded" in line and line.startswith(" sum")]
    assert line == ["sum", "0", "graded", "-", "2/2", "1", "+0.00", "2", "0", "to", "1"]
    [line] = [line.split() for line in said(capsys, run, "list", "--responses", "--outcome", "wrong").splitlines()
              if line.startswith(" sum")]  # fmt: skip
    assert line == ["sum", "0", "1", "graded", "-", "wrong", "-1.00", "3", "stop", "0x1", "1x2", "1"]


def test_a_list_that_was_cut_says_so_and_shows_the_newest(run, capsys):
    text = said(capsys, run, "list", "--limit", 1)
    assert "the newest 1 are shown (--limit)" in text
    [line] = [line.split() for line in text.splitlines() if line.startswith(" sum")]
    assert line[1] == "1", "the second epoch"
    text = said(capsys, run, "list", "--responses", "--limit", 1)
    assert "responses: the newest 1 are shown (--limit)" in text
    for limit in (2, -1):
        assert "responses: 2 shown" in said(capsys, run, "list", "--responses", "--limit", limit)


def test_show_decodes_with_the_tokenizer_of_the_run(run, capsys):
    text = said(capsys, run, "show", "sum", "--epoch", 0)
    assert "what is two and two" in text
    assert "four [b]" in text, "text is not markup"
    assert "wrong -1.00 not [bold] 4" in text
    assert "2 tokens, stop; versions 0x1 1x1; mean logprob -0.500" in text
    only = said(capsys, run, "show", "sum", "--epoch", 0, "--response", 1, "--ids")
    assert "[2, 3, 2]" in only
    assert "response 0" not in only
    (run / "config.yaml").unlink()
    assert "[4, 5]" in said(capsys, run, "show", "sum", "--epoch", 0)


def test_show_takes_an_id_as_it_stands_and_list_takes_percent_for_any_text(tmp_path, capsys):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for token, name in enumerate(("s%m", "sum", "sam")):
            prompt = Prompt(prompt_id=name, domain="math", token_ids=np.array([token]), reference="4")
            ledger.reserve([(0, prompt)], num_responses=2)
    assert "[0]" in said(capsys, tmp_path, "show", "s%m", "--ids")
    assert "no group of prompt su%" in said(capsys, tmp_path, "show", "su%", status=2)
    assert "3 reserved; 1 shown" in said(capsys, tmp_path, "list", "--prompt-id", "su%")
    assert "3 reserved; 3 shown" in said(capsys, tmp_path, "list", "--prompt-id", "s%m")


def test_export_jsonl(run, capsys):
    out = run / "out.jsonl"
    assert "1 responses written" in said(capsys, run, "export", out, "--min-reward", 1, "--tokens")
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["response"] == "four [b]"
    assert (row["outcome"], row["reward"], row["prompt"], row["reference"]) == ("correct", 1.0, "2+2?", "4")
    assert (row["token_ids"], row["logprobs"], row["policy_versions"]) == ([4, 5], [-0.5, -0.5], [[0, 1], [1, 1]])
    assert list(run.glob("*.new")) == []


def test_exported_text_begins_with_what_the_chat_template_opened(run, written, capsys):
    written.set_fact("grading", json.dumps({OPENING: "[T]\n"}))
    out = run / "out.jsonl"
    assert "2 responses written" in said(capsys, run, "export", out)
    assert [json.loads(line)["response"] for line in out.read_text().splitlines()] == [
        "[T]\nfour [b]",
        "[T]\ntwo and two",
    ]


def test_export_parquet(run, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="writing Parquet needs pyarrow, which is optional")
    out = run / "out.parquet"
    assert "2 responses written" in said(capsys, run, "export", out, "--tokens")
    rows = parquet.read_table(out).to_pylist()
    assert [row["response"] for row in rows] == ["four [b]", "two and two"]
    assert [row["token_ids"] for row in rows] == [[4, 5], [2, 3, 2]]
    assert [row["step"] for row in rows] == [None, None]
    assert "0 responses written" in said(capsys, run, "export", out, "--step", 5)


def test_what_cannot_be_done_is_one_clear_message(run, capsys, tmp_path):
    assert "no group of prompt nine; some that there are: sum" in said(capsys, run, "show", "nine", status=2)
    assert "must end in .jsonl or .parquet" in said(capsys, run, "export", "out.csv", status=2)
    assert "is not a directory" in said(capsys, tmp_path / "nowhere", "list", status=2)
    (tmp_path / "empty").mkdir()
    assert "no ledger" in said(capsys, tmp_path / "empty", "list", status=2)
    assert "cannot be written" in said(capsys, run, "export", tmp_path / "nowhere" / "a.jsonl", status=2)


def test_help_teaches_and_nothing_heavy_is_imported(run):
    root = str(Path(__file__).parents[3])
    code = (
        "import sys; from megatron_klear.rollouts import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), "list"], capture_output=True, text=True, env={"PYTHONPATH": root},
        timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    helped = subprocess.run(
        [sys.executable, "-m", "megatron_klear.rollouts", "--help"], capture_output=True, text=True,
        env={"PYTHONPATH": root}, timeout=60,
    )  # fmt: skip
    assert helped.returncode == 0
    for words in ("reserved", "committed", "examples", "--outcome ungraded", "export"):
        assert words in helped.stdout
