from __future__ import annotations

import ast
import importlib.util
import json
import operator
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from math_verify import parse, verify
from transformers import AutoTokenizer

from megatron_klear.config import load_settings
from megatron_klear.reward.answers import last_box
from megatron_klear.reward.think import split_thinking

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart_data.py"
SIZES = ("--sft-rows", "600", "--prompts", "80", "--heldout", "60")
FILES = ("sft.jsonl", "prompts.jsonl", "heldout.jsonl")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart_data"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row: dict) -> str:
    return row["messages"][0]["content"]


def numbers(row: dict) -> tuple[int, ...]:
    """The signed numbers of a question in sorted order, read by a regular expression of the test's own."""
    found = re.findall(r"([-+]?) ?(\d+)", question(row).partition(":")[2])
    return tuple(sorted(int(sign + digits) for sign, digits in found))


def evaluate(expression: str) -> int:
    """Value of a sum of integers, by Python's own grammar."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub}

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            assert isinstance(node.op, ast.USub)
            return -walk(node.operand)
        assert isinstance(node, ast.Constant)
        return node.value

    return walk(ast.parse(expression.strip(), mode="eval").body)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "data"
    assert script.main(["--out", str(out), "--seed", "3", *SIZES]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(data: Path):
    return AutoTokenizer.from_pretrained(data / "tokenizer")


def test_writes_the_rows_that_the_data_files_are_documented_to_hold(data: Path) -> None:
    sft, prompts, heldout = (rows(data / name) for name in FILES)
    assert (len(sft), len(prompts), len(heldout)) == (600, 80, 60)
    for row in sft:
        assert set(row) == {"id", "messages", "source"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    for row in prompts + heldout:
        assert set(row) == {"id", "domain", "messages", "reference"}
        assert row["domain"] == "math"
        assert [message["role"] for message in row["messages"]] == ["user"]
    assert len({row["id"] for row in sft + prompts + heldout}) == 740
    assert len({question(row) for row in sft + prompts + heldout}) == 740
    assert sorted(path.name for path in data.iterdir()) == ["heldout.jsonl", "prompts.jsonl", "sft.jsonl", "tokenizer"]


def test_no_heldout_problem_has_the_numbers_of_a_training_problem_of_any_seed(data: Path, tmp_path: Path) -> None:
    assert script.main(["--out", str(tmp_path), "--seed", "4", "--sft-rows", "3000", *SIZES[2:]]) == 0
    heldout = {numbers(row) for out in (data, tmp_path) for row in rows(out / "heldout.jsonl")}
    training = {numbers(row) for out in (data, tmp_path) for name in FILES[:2] for row in rows(out / name)}
    assert len(heldout) > 100
    assert heldout.isdisjoint(training)


def test_one_problem_in_ten_is_held_out() -> None:
    stream = script.problem_stream(8)
    share = sum(next(stream).is_heldout for _ in range(4000)) / 4000
    assert share == pytest.approx(26 / 256, abs=0.02)


def test_every_line_of_thought_and_every_answer_is_right(data: Path) -> None:
    for row in rows(data / "sft.jsonl"):
        split = split_thinking(row["messages"][1]["content"])
        assert not split.is_malformed
        expression = question(row).partition(":")[2].strip(" =")
        lines = split.thinking.strip().split("\n")
        for line in lines:
            left, right = line.split("=")
            assert evaluate(left) == int(right)
        box, _ = last_box(split.answer)
        assert box == str(evaluate(expression))
        terms = re.findall(r"[-+]?\d", expression.replace(" ", ""))
        if row["source"] == "chain_sum/brief":
            assert [line.partition("=")[0] for line in lines] == ["".join(terms)]
        else:
            assert len(lines) == len(terms) - 1
            assert all(line.partition("=")[0].endswith(term) for line, term in zip(lines, terms[1:], strict=True))


def test_three_worked_examples_in_five_are_brief(data: Path) -> None:
    sources = [row["source"] for row in rows(data / "sft.jsonl")]
    assert set(sources) == {"chain_sum/brief", "chain_sum/totals"}
    assert 310 < sources.count("chain_sum/brief") < 410


def test_references_are_right_and_math_verify_tells_them_from_wrong_answers(data: Path) -> None:
    for row in rows(data / "heldout.jsonl") + rows(data / "prompts.jsonl"):
        value = evaluate(question(row).partition(":")[2].strip(" ="))
        assert row["reference"] == str(value)
        gold = parse(row["reference"])
        assert verify(gold, parse(f"\\boxed{{{value}}}"))
        assert not verify(gold, parse(f"\\boxed{{{value + 1}}}"))


def test_tokenizer_gives_back_every_text_and_keeps_digits_and_markers_apart(data: Path, tokenizer) -> None:
    for row in rows(data / "sft.jsonl")[:100]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for marker in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "\\boxed{", " problem"):
        assert len(tokenizer(marker)["input_ids"]) == 1, marker
    assert len(tokenizer("1234567890")["input_ids"]) == 10
    printable = "".join(map(chr, range(32, 127))) + "\n"
    assert tokenizer.decode(tokenizer(printable)["input_ids"]) == printable
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_thinking_tags_stay_where_special_tokens_are_left_out(tokenizer) -> None:
    ids = tokenizer("<think>\n1+2=3\n</think>\n\\boxed{3}<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n1+2=3\n</think>\n\\boxed{3}"


def test_chat_template_ends_the_prompt_where_the_response_begins(data: Path, tokenizer) -> None:
    for row in rows(data / "sft.jsonl")[:50]:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        assert prompt == f"<|im_start|>user\n{question(row)}<|im_end|>\n<|im_start|>assistant\n"
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert whole == prompt + row["messages"][1]["content"] + "<|im_end|>\n"
        prompt_ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(whole)["input_ids"][: len(prompt_ids)] == prompt_ids


def test_same_seed_writes_the_same_bytes_and_another_seed_other_problems(data: Path, tmp_path: Path) -> None:
    for name, seed in (("again", "3"), ("other", "5")):
        assert script.main(["--out", str(tmp_path / name), "--seed", seed, *SIZES]) == 0
    written = [path.relative_to(data) for path in sorted(data.rglob("*")) if path.is_file()]
    assert len(written) == 5
    for path in written:
        assert (tmp_path / "again" / path).read_bytes() == (data / path).read_bytes()
    for name in FILES:
        assert (tmp_path / "other" / name).read_bytes() != (data / name).read_bytes()
    tokenizer_file = Path("tokenizer", "tokenizer.json")
    assert (tmp_path / "other" / tokenizer_file).read_bytes() == (data / tokenizer_file).read_bytes()


@pytest.mark.parametrize("entry", ["sft", "rl"])
def test_shipped_settings_load_and_fit_the_data(entry: str, data: Path, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "sft" / "checkpoints" / "step_00000900").mkdir(parents=True)
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        f"tokenizer.dir={data / 'tokenizer'}",
        f"data.heldout=[{data / 'heldout.jsonl'}]",
        f"data.sft=[{data / 'sft.jsonl'}]" if entry == "sft" else f"data.prompts=[{data / 'prompts.jsonl'}]",
        *([f"checkpoint.start_from={tmp_path / 'sft'}"] if entry == "rl" else []),
    ]
    settings = load_settings(ROOT / "examples" / f"quickstart_{entry}.yaml", overrides, entry=entry, world_size=2)
    assert len(tokenizer) <= settings.architecture.vocab_size < len(tokenizer) + 4
    longest_prompt = longest_response = 0
    for row in rows(data / "sft.jsonl"):
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        longest_prompt = max(longest_prompt, len(tokenizer(prompt)["input_ids"]))
        response = row["messages"][1]["content"] + "<|im_end|>"
        longest_response = max(longest_response, len(tokenizer(response)["input_ids"]))
    assert longest_prompt <= settings.data.max_prompt_tokens
    assert longest_response <= settings.rollout.max_response_tokens
    assert longest_response <= (settings.evaluation.max_response_tokens or 0)


def test_both_halves_of_the_quickstart_train_one_model_and_measure_alike() -> None:
    sft, rl = (yaml.safe_load((ROOT / "examples" / f"quickstart_{e}.yaml").read_text()) for e in ("sft", "rl"))
    for section in ("model", "tokenizer", "evaluation"):
        assert sft[section] == rl[section]
    assert sft["data"]["heldout"] == rl["data"]["heldout"]
    assert rl["checkpoint"]["start_from"] == sft["run"]["dir"]
    assert rl["rl"]["steps"] * rl["rl"]["prompts_per_step"] <= 4096, "a prompt would be practised on twice"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--heldout", "0"], "got 0, must be at least 1"),
        (["--seed", "-1"], "got -1, must be from 0 to 1999"),
        (["--sft-rows", "many"], "invalid"),
    ],
)
def test_refuses_impossible_sizes(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--out", str(tmp_path / "data"), *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_says_when_there_are_too_few_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(script, "PROBLEM_SIZES", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    assert script.main(["--out", str(tmp_path / "data"), "--sft-rows", "5000"]) == 2
    assert "there are only about 200 different problems; ask for fewer rows" in capsys.readouterr().err


def test_says_when_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert script.main(["--out", str(tmp_path / "file"), *SIZES]) == 2
    assert "file" in capsys.readouterr().err


def test_runs_as_a_command_and_sums_up(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run([*command, "--out", str(tmp_path), *SIZES], capture_output=True, text=True, check=True)
    assert "600 worked examples" in done.stdout
    assert "60 held-out problems" in done.stdout
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for option in ("--out", "--seed", "--sft-rows", "--prompts", "--heldout"):
        assert option in helped.stdout
