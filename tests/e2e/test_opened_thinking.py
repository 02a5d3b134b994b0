"""A chat template that opens the thinking itself, as Qwen3-Thinking-2507's, from the settings to every grade.

The model is a Qwen3 without attention: its next token depends on the last one alone, so that it writes what it is made
for. Nothing stands in for anything.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_klear import rollouts, verify
from megatron_klear.data import ChatTokenizer, load_chat_tokenizer
from megatron_klear.rollout.ledger import LedgerReader
from tests.chat_tokenizers import OPENING_TEMPLATE, THINKING_TEMPLATE, write_tokenizer
from tests.e2e.conftest import Start

WRITTEN = "t</think>\\boxed{7}"
"""What the model writes inside its thinking; no character twice, and no two that are one token."""


def write_model(directory: Path, chat: ChatTokenizer, template: str) -> None:
    """A model that writes `WRITTEN` after the line break that ends the prompt, after a tag where that opens none."""
    size = -(-chat.num_tokens // 16) * 16
    config = Qwen3Config(
        vocab_size=size, hidden_size=size, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    begin = chat.encode("\n" if template == OPENING_TEMPLATE else "\n<think>").tolist()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in pairwise([*begin, *chat.encode(WRITTEN).tolist(), chat.end_of_turn_id]):
            model.lm_head.weight[following, token] = 3.0  # times the norm's sqrt(size), against zeros
    model.save_pretrained(directory)


def settings_of(directory: Path, template: str) -> Path:
    chat = load_chat_tokenizer(write_tokenizer(directory / "model", template))
    write_model(directory / "model", chat, template)
    rows = [
        {"id": f"p{n}", "domain": "math", "messages": [{"role": "user", "content": f"{n}?"}], "reference": reference}
        for n, reference in enumerate(("7", "8", "7", "8"))
    ]
    for name, some in (("prompts", rows[:2]), ("heldout", rows[2:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": f"<think>\n{WRITTEN}"}]
    (directory / "sft.jsonl").write_text(json.dumps({"id": "s", "messages": messages, "source": "here"}) + "\n")
    config = directory / "config.yaml"
    config.write_text(
        f"run: {{dir: {directory / 'run'}, device: cpu}}\n"
        f"model: {{hf_dir: {directory / 'model'}, dtype: float32}}\n"
        f"tokenizer: {{dir: {directory / 'model'}}}\n"
        f"data: {{heldout: [{directory / 'heldout.jsonl'}], max_prompt_tokens: 64}}\n"
        "optimizer: {lr: 1.0e-6, warmup_steps: 0}\n"
        "packing: {token_budget: 256}\n"
        "reward: {workers: 1, timeout_seconds: 30}\n"
        "evaluation: {prompts: 2, max_response_tokens: 24, temperature: 0.0, samples_per_prompt: 1}\n"
        "observe: {tensorboard: false, report: false}\n"
    )
    return config


TEMPLATES = {"opens": OPENING_TEMPLATE, "opens nothing": THINKING_TEMPLATE}


@pytest.mark.parametrize("template", TEMPLATES)
def test_rl_grades_evaluates_shows_exports_and_replays_what_the_template_makes_of_a_response(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    config, run = settings_of(tmp_path, TEMPLATES[template]), tmp_path / "run"
    rl = [
        f"data.prompts=[{tmp_path / 'prompts.jsonl'}]", "rl.steps=1", "rl.prompts_per_step=2", "rl.minibatch_prompts=2",
        "rollout.responses_per_prompt=2", "rollout.max_response_tokens=24", "algorithm.filter_zero_advantage=false",
    ]  # fmt: skip
    launch = start("train_rl", config, rl, ranks=1)
    assert launch.wait() == [0], launch.output()
    with LedgerReader(run / "ledger.sqlite") as reader:
        graded = {g.prompt.prompt_id: [g.grades[i].outcome for i in range(2)] for g in reader.groups_of_step(1)}
    assert graded == {"p0": ["correct"] * 2, "p1": ["wrong"] * 2}
    assert json.loads((run / "result.json").read_text())["accuracy"] == 0.5

    text = "<think>" + "\n" * (template == "opens") + WRITTEN + "<|im_end|>"
    [examples] = run.glob("rollouts/*.jsonl")
    assert {json.loads(line)["response"] for line in examples.read_text().splitlines()} == {text}
    assert rollouts.main([str(run), "export", str(tmp_path / "out.jsonl")]) == 0
    exported = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["response"] for row in exported] == [text] * 4
    assert rollouts.main([str(run), "show", "p0", "--response", "0"]) == 0
    assert capsys.readouterr().out.count("<think>") == 1, "prompt and response as they are, token by token"

    if template == "opens nothing":
        return
    again = [*rl, f"run.dir={tmp_path / 'replayed'}", f"scheduling.replay_from={run}"]
    launch = start("train_rl", config, again, ranks=1)
    assert launch.wait() == [0], launch.output()
    assert "made under other settings" not in launch.output()
    assert json.loads((tmp_path / "replayed" / "result.json").read_text())["accuracy"] == 0.5

    assert verify.main(["--rewards", str(config), *rl]) == 0, capsys.readouterr().out


def test_fine_tuning_evaluates_what_the_template_makes_of_a_response(start: Start, tmp_path: Path) -> None:
    config = settings_of(tmp_path, OPENING_TEMPLATE)
    sft = [f"data.sft=[{tmp_path / 'sft.jsonl'}]", "sft.steps=1", "sft.batch_sequences=1"]
    launch = start("train_sft", config, sft, ranks=1)
    assert launch.wait() == [0], launch.output()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"] == 0.5
