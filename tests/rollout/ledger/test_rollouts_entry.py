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
    assert line == [
        "sum",
        "0",
        "1",
        "graded",
        "-",
        "wrong",
        "-1.00",
        "3",
        "stop",
        "0x1",
        "1x2",
        "1",
        "not",
        "[bold]",
        "4",
    ]


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
    assert "response 1: wrong -1.00" in text
    assert "reason: not [bold] 4" in text
    assert "2 tokens, stop; versions 0x1 1x1; mean logprob -0.500" in text
    only = said(capsys, run, "show", "sum", "--epoch", 0, "--response", 1, "--ids")
    assert "[2, 3, 2]" in only
    assert "response 0" not in only
    (run / "config.yaml").unlink()
    assert "[4, 5]" in said(capsys, run, "show", "sum", "--epoch", 0)


def test_show_says_what_is_left_of_a_group_whose_tokens_were_removed(run, written, capsys):
    written.commit(1, [1])
    written.trained(1)
    written.prune(1)
    lines = said(capsys, run, "show", "sum", "--epoch", 0).splitlines()
    removed = "its tokens were removed (scheduling.keep_steps)"
    assert lines[-2:] == [
        f"response 0: correct +1.00; 2 tokens, stop; versions 0x1 1x1; {removed}",
        f"response 1: wrong -1.00 (not [bold] 4); 3 tokens, stop; versions 0x1 1x2; {removed}",
    ]
    assert said(capsys, run, "show", "sum", "--epoch", 0, "--response", 1).splitlines()[-1] == lines[-1]
    assert "no responses yet" in said(capsys, run, "show", "sum")


@pytest.mark.parametrize("index", [2, 9, -1])
def test_a_response_out_of_range_is_told_the_range(run, capsys, index):
    text = said(capsys, run, "show", "sum", "--epoch", 0, "--response", index, status=2)
    assert text == f"--response: prompt sum, epoch 0 has responses 0 to 1, and no {index}\n"


def test_a_response_that_has_not_begun_is_no_empty_page(run, capsys):
    text = said(capsys, run, "show", "sum", "--epoch", 1, "--response", 1, status=2)
    assert text == "--response: response 1 of prompt sum, epoch 1 has no tokens yet\n"


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
    assert (row["group_id"], row["domain"], row["draws"]) == (1, "math", 0)
    assert list(run.glob("*.new")) == []


def test_only_a_domain(run, written, capsys):
    prompt = Prompt(prompt_id="code", domain="code", token_ids=np.array([0]), reference="{}")
    [group] = written.reserve([(0, prompt)], num_responses=1)
    rollout = Rollout(
        response_ids=np.array([4]), rollout_logprobs=np.zeros(1, np.float32), finish_reason="stop",
        policy_versions=((0, 1),),
    )  # fmt: skip
    written.save_response(group, 0, rollout)
    written.replace_responses(group, {0: rollout}, why="a reason")
    out = run / "out.jsonl"
    assert "1 responses written" in said(capsys, run, "export", out, "--domain", "code")
    row = json.loads(out.read_text())
    assert (row["group_id"], row["domain"], row["draws"]) == (3, "code", 1)
    assert "; 1 shown" in said(capsys, run, "list", "--domain", "code")
    assert "responses: 2 shown" in said(capsys, run, "list", "--domain", "math", "--responses")


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
    assert [(row["group_id"], row["domain"], row["draws"]) for row in rows] == [(1, "math", 0)] * 2
    assert "0 responses written" in said(capsys, run, "export", out, "--step", 5)


def test_events(run, written, capsys):
    written.note("resumed", [None], step=0)
    written.replace_responses(1, {}, why="rollout.temperature: 1.0 -> [0.9]")
    lines = [line.split() for line in said(capsys, run, "events").splitlines() if line.startswith(" 20")]
    assert [line[2:] for line in lines] == [
        ["drawn", "again", "sum", "0", "rollout.temperature:", "1.0", "->", "[0.9]"],
        ["resumed", "0"],
    ]
    text = said(capsys, run, "events", "--limit", 1)
    assert "the newest 1 are shown (--limit)" in text
    assert "resumed" not in text
    assert "events: 1 shown" in said(capsys, run, "events", "--event", "drawn again")
    assert "events: 1 shown" in said(capsys, run, "events", "--prompt-id", "s%")
    assert "events: 0 shown" in said(capsys, run, "events", "--prompt-id", "s%", "--event", "resumed")
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "events", "--event", "trend"])


def test_check(run, written, capsys):
    written.commit(3, [1])
    text = said(capsys, run, "check")
    assert "groups: 1 reserved, 0 generated, 0 graded, 1 committed, 0 trained\n" in text
    assert "steps: none trained, 1 promised (3)" in text
    written.trained(3)
    text = said(capsys, run, "check")
    assert "steps: 1 trained (3), none promised" in text
    assert "every trained group was trained once" in text


def test_check_lists_what_was_not_trained_once(run, written, capsys):
    written.commit(1, [1])
    written.trained(1)
    written.note("trained", [1, 2], step=2)
    assert main([str(run), "check"]) == 1
    text = capsys.readouterr().out
    assert [line.split() for line in text.splitlines() if line.startswith(" sum")] == [
        ["sum", "0", "trained", "2", "1"],
        ["sum", "1", "reserved", "1", "0"],
    ]
    assert "every" not in text


def test_what_cannot_be_done_is_one_clear_message(run, capsys, tmp_path):
    text = said(capsys, run, "show", "nine", status=2)
    assert text == "PROMPT_ID: no group of prompt nine; some that there are: sum, sum\n"
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
    for words in (
        "reserved",
        "committed",
        "examples",
        "--outcome ungraded",
        "export",
        "RUN events --event",
        "RUN check",
    ):
        assert words in helped.stdout
