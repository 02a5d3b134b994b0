"""Teacher and sampling model through the in-process engine: the same text as transformers, drawn once."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.curation_inputs import row
from megatron_klear.config.sampler import SamplerSettings
from megatron_klear.data import load_chat_tokenizer
from megatron_klear.errors import CheckpointError, ConfigError
from megatron_klear.records import Rollout
from megatron_klear.rollout import open_sampler as open_sampler_module
from megatron_klear.rollout.open_sampler import _own_names, _servers_fingerprint, directory_fingerprint, open_sampler
from megatron_klear.rollout.sglang import EngineFacts

RunCuration = Callable[..., Any]
TEMPLATE = """
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' + OPENING -}}{%- endif -%}
"""


def make_model(directory: Path, *, seed: int = 0, opens_think: bool = False) -> Path:
    """A tiny Qwen3 with a byte-level tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    opening = "'<think>\\n'" if opens_think else "''"
    chat = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
            "chat_template": TEMPLATE.replace("OPENING", opening)}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(chat))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, max_position_embeddings=256, initializer_range=0.25,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def sampler_settings(directory: Path, **more: Any) -> dict[str, Any]:
    chosen = {"hf_dir": str(directory), "dtype": "float32", "max_response_tokens": 24, "max_prompt_tokens": 200}
    return chosen | {"responses": 3, "device": "cpu"} | more


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    settings = SamplerSettings(**sampler_settings(directory, temperature=0.0, top_p=1.0))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = Qwen3ForCausalLM.from_pretrained(directory).eval()
    with open_sampler(settings, section="teacher", cache=tmp_path / "c", seed=0) as sampler:
        assert sampler.chat.opening == ""
        for question in ("2+2?", "why is the sky blue?"):
            asked = [{"role": "user", "content": question}]
            group = next(sampler.responses.sample([sampler.prompt("p", "math", asked)], num_responses=1))
            rendered = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            ids = torch.tensor([tokenizer(rendered)["input_ids"]])
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
            )  # fmt: skip
            expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=False)
            assert sampler.chat.response_text(group.rollouts[0].response_ids) == expected.removesuffix("<|im_end|>")


def test_the_marker_that_the_prompt_opened_is_part_of_the_text(tmp_path: Path) -> None:
    settings = SamplerSettings(**sampler_settings(make_model(tmp_path / "m", opens_think=True)))
    with open_sampler(settings, section="teacher", cache=tmp_path / "c", seed=0) as sampler:
        assert sampler.chat.opening == "<think>\n"
        prompt = sampler.prompt("p", "math", [{"role": "user", "content": "why?"}])
        rollout = next(sampler.responses.sample([prompt], num_responses=1)).rollouts[0]
        assert sampler.chat.response_text(rollout.response_ids).startswith("<think>\n")


def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    first, second = make_model(tmp_path / "a"), make_model(tmp_path / "b", seed=1)
    prints = {directory_fingerprint(d, dtype=t) for d in (first, second) for t in ("float32", "bfloat16")}
    assert len(prints) == 4
    assert directory_fingerprint(first, dtype="float32") in prints


def test_models_that_cannot_be_used_are_refused_in_words(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    settings = SamplerSettings(**sampler_settings(directory))
    opened = open_sampler(settings, section="teacher", cache=tmp_path / "c", seed=0)
    with pytest.raises(ConfigError, match=r"teacher.hf_dir: its tokenizer has 260 tokens, its model 100 embeddings"):
        opened.__enter__()
    (directory / "config.json").write_text(json.dumps(config))
    weights = next(directory.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:200])
    opened = open_sampler(settings, section="teacher", cache=tmp_path / "c", seed=0)
    with pytest.raises(CheckpointError, match="not a safetensors file, or cut short"):
        opened.__enter__()


def test_curation_draws_grades_and_labels_and_draws_nothing_twice(run_curation: RunCuration, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    rows = [row(i, f"What is {i}?") for i in range(5)] + [row(9, "long " * 60), row(10, "a <|im_end|> inside")]
    settings: dict[str, Any] = {
        "task": "sft", "stages": ("respond", "difficulty", "correctness"), "input": {"max_reject_share": 0.5},
        "teacher": sampler_settings(directory, chunk_responses=6), "sampler": sampler_settings(directory, responses=2),
        "correctness": {"keep_unfinished": True}, "reward": {"workers": 1, "timeout_seconds": 20.0},
    }  # fmt: skip
    done = run_curation(rows, **settings)
    assert [name for name in done.ids if name.startswith("r0")] == ["r0#0", "r0#1", "r0#2"]
    assert len(done.ids) == 15
    assert {r["reason"] for r in done.dropped} == {"prompt too long"}
    assert "chat marker <|im_end|>" in done.rejects[0]["reason"]
    assert {r["difficulty"] for r in done.rows} == {"hard"}

    def count(name: str) -> int:
        with sqlite3.connect(tmp_path / "run" / name) as connection:
            return int(connection.execute("SELECT COUNT(*), MAX(rowid) FROM responses").fetchone()[1])

    assert (count("responses-teacher.sqlite"), count("responses-sampler.sqlite")) == (15, 10)
    texts = [r["messages"][-1]["content"] for r in done.rows]
    # All stages lost: the responses are found again, none is drawn.
    import shutil

    shutil.rmtree(tmp_path / "run" / "stages")
    again = run_curation(rows, **settings)
    assert [r["messages"][-1]["content"] for r in again.rows] == texts
    assert (count("responses-teacher.sqlite"), count("responses-sampler.sqlite")) == (15, 10)


def facts(**more: Any) -> EngineFacts:
    given = {"version": "0.5.23", "device": "cuda", "tp": 1, "dtype": "auto", "quantization": None, "incremental": True,
             "context_length": 100, "model_path": "teacher", "weight_version": "default"}  # fmt: skip
    return EngineFacts(**(given | more))


def test_servers_are_known_by_what_they_say_of_their_model() -> None:
    settings = SamplerSettings(hf_dir="m", engine="sglang", urls=("http://a:1", "http://b:1"))
    prints = {
        _servers_fingerprint([facts(**change)] * 2, settings, "teacher")
        for change in ({}, {"model_path": "other"}, {"weight_version": "7"}, {"quantization": "fp8"}, {"dtype": "half"})
    }
    prints.add(_servers_fingerprint([facts()] * 2, dataclasses.replace(settings, weights_name="second"), "teacher"))
    assert len(prints) == 6
    assert _servers_fingerprint([facts(tp=4)] * 2, settings, "teacher") in prints
    with pytest.raises(ConfigError, match=r"teacher.urls: http://b:1 serves \['other'"):
        _servers_fingerprint([facts(), facts(model_path="other")], settings, "teacher")


def test_servers_with_other_weights_or_yarn_under_the_same_path_are_told_apart(tmp_path: Path) -> None:
    settings = SamplerSettings(hf_dir="m", engine="sglang", urls=("http://a:1",))
    (tmp_path / "config.json").write_text("{}")
    prints = []
    for weights, more in [(b"1", {}), (b"2", {}), (b"2", {"overrides": "{}"}), (b"2", {"context_length": 9})]:
        (tmp_path / "model.safetensors").write_bytes(weights)
        prints.append(_servers_fingerprint([facts(model_path=str(tmp_path), **more)], settings, "teacher"))
    assert len(set(prints)) == 4
    assert _servers_fingerprint([facts(model_path=str(tmp_path))], settings, "teacher") == prints[1]


def test_servers_whose_files_cannot_be_seen_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    settings = SamplerSettings(hf_dir="m", engine="sglang", urls=("http://a:1",))
    _servers_fingerprint([facts(model_path="far/away")], settings, "teacher")
    assert "change teacher.weights_name" in caplog.text


def test_messages_of_the_shared_client_name_the_settings_of_the_sampler() -> None:
    text = "sglang.urls: engine 0: its context is 10 (data.max_prompt_tokens, rollout.max_response_tokens)"
    assert _own_names(text, "teacher") == (
        "teacher.urls: engine 0: its context is 10 (teacher.max_prompt_tokens, teacher.max_response_tokens)"
    )


# Like that of models that always think: it renders the opening of an answer itself, of which the prompt ends.
THINKING = """
{%- for m in messages -%}{%- set text = m.content -%}
{%- if m.role == 'assistant' and '</think>' in text -%}
    {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
    {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""


class Says:
    """An engine that gives the same texts to every question, one after the other."""

    def __init__(self, directory: Path, texts: tuple[str, ...]) -> None:
        self._tokenizer, self._texts = AutoTokenizer.from_pretrained(directory), texts
        self.prompts: list[list[int]] = []

    def generate(self, prompts: Any, *, on_rollout: Any, **_: Any) -> list[Any]:
        for number, prompt in enumerate(prompts):
            self.prompts.append(prompt.token_ids.tolist())
            ids = np.array(self.ids(number % len(self._texts)))
            on_rollout(
                prompt, 0,
                Rollout(response_ids=ids, rollout_logprobs=np.zeros(len(ids), dtype=np.float32), finish_reason="stop",
                        policy_versions=((0, len(ids)),)),
            )  # fmt: skip
        return []

    def ids(self, number: int) -> list[int]:
        return list(self._tokenizer(self._texts[number] + "<|im_end|>", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("template", ["as it stands", "opens the thinking"])
def test_responses_to_prompts_that_open_the_thinking_are_graded_kept_and_trained_on_as_they_were_drawn(
    run_curation: RunCuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """From the draw to the tokens of fine-tuning: the same ones, with the thinking once and in whole."""
    directory = make_model(tmp_path / "m", opens_think=True)
    if template == "opens the thinking":
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": THINKING}))
    texts = (
        "I add.\n</think>\n\n\\boxed{2}", "I guess.\n</think>\n\n\\boxed{3}", "I never end \\boxed{2}",
        "<think>\nTwice opened.\n</think>\n\n\\boxed{2}",
    )  # fmt: skip
    engine = Says(directory, texts)

    @contextmanager
    def engine_of(*_: Any) -> Iterator[tuple[Says, str]]:
        yield engine, "says"

    monkeypatch.setattr(open_sampler_module, "_engine", engine_of)
    done = run_curation(
        [row(1, "1 + 1?")], task="sft", stages=("respond", "correctness"),
        correctness={"keep_wrong": "all", "keep_unfinished": True},
        teacher=sampler_settings(directory, responses=4), reward={"workers": 1, "timeout_seconds": 20.0},
    )  # fmt: skip
    kept = {r["messages"][-1]["content"]: r["outcome"] for r in done.rows}
    assert kept["<think>\n" + texts[0]] == "correct"
    assert kept["<think>\n" + texts[1]] == "wrong"
    assert set(done.audit("respond")["tables"]["responses by outcome"].items()) == {
        ("correct", 1), ("wrong", 1), ("malformed", 2)
    }  # fmt: skip
    chat = load_chat_tokenizer(directory)
    for number, finished in enumerate(done.rows[:2]):
        (made,) = chat.encode_conversations([finished["messages"]])
        assert not isinstance(made, Exception), made
        assert made.token_ids.tolist() == engine.prompts[0] + engine.ids(number)
        assert made.trained_spans == ((len(engine.prompts[0]), len(made.token_ids)),)
