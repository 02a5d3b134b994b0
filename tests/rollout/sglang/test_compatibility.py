"""A server that does not serve our model is refused when it is connected, all reasons at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.config.yarn import Yarn
from megatron_klear.errors import ConfigError
from megatron_klear.rollout.sglang import Expected, SglangEngine
from megatron_klear.weight_sync import EngineGroup
from tests.rollout.sglang.conftest import VOCAB, StandIn, standing_in


def connect(
    *urls: str,
    vocab_size: int = VOCAB,
    longest: int = 100,
    deterministic: bool = False,
    samples: Any = (),
    yarn: Yarn | Literal["any"] | None = "any",
    stop_ids: tuple[int, ...] | None = None,
    verify: str | None = None,
) -> Any:
    expected = Expected(
        vocab_size=vocab_size,
        longest_sequence=longest,
        deterministic=deterministic,
        tokenizer_samples=samples,
        yarn=yarn,
        stop_ids=stop_ids,
        verify=verify,
    )
    engine = SglangEngine(urls, SglangSettings(), expected, in_flight=4)
    engine.close()
    return engine.engines[0].facts


def problems(*arguments: Any, **keywords: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        connect(*arguments, **keywords)
    assert all(problem.startswith("sglang.urls: engine ") for problem in error.value.problems)
    return error.value.problems


def test_a_server_of_our_model_tells_what_it_is(stand_in: StandIn) -> None:
    facts = connect(stand_in.url)
    assert (facts.version, facts.device, facts.tp, facts.dtype) == ("0.5.23", "cpu", 1, "float32")
    assert (facts.quantization, facts.incremental, facts.context_length) == (None, True, 512)


@pytest.mark.parametrize(
    ("told", "verify", "wanted"),
    [
        ({"dp_size": 2}, "checksum", ["it has dp_size 2", "start it without --dp-size"]),
        ({"pp_size": 2, "dp_size": 1}, "checksum", ["it has pp_size 2", "start it without --pp-size"]),
        ({"quantization": "fp8", "load_format": "auto"}, "logprobs", ["start it with --load-format flash_rl"]),
        ({"quantization": "fp8", "load_format": "flash_rl"}, "checksum", ["weight_sync.verify is checksum"]),
    ],
)
def test_a_server_that_cannot_take_weights_is_refused_where_they_are_published(
    told: dict[str, Any], verify: str, wanted: list[str], stand_in: StandIn
) -> None:
    stand_in.answers["/server_info"] |= told
    (problem,) = problems(stand_in.url, verify=verify)
    assert all(text in problem for text in wanted)
    assert connect(stand_in.url).version == "0.5.23", "one that is only sampled from may be so"


def test_a_quantised_server_that_can_take_weights_is_used(stand_in: StandIn) -> None:
    stand_in.answers["/server_info"] |= {"quantization": "fp8", "load_format": "flash_rl", "dp_size": 1}
    assert connect(stand_in.url, verify="logprobs").quantization == "fp8"


def test_what_answers_something_else_is_a_mistake_however_few_must_answer(stand_in: StandIn) -> None:
    """One that gives no answer may come back; a page of something else is no server that is starting."""
    expected = Expected(vocab_size=VOCAB, longest_sequence=100)
    with standing_in() as other:
        other.answers["/server_info"] = lambda handler, body: handler.reply(200, "<html>hello</html>")
        with pytest.raises(ConfigError, match="no JSON"):
            SglangEngine([stand_in.url, other.url], SglangSettings(), expected, in_flight=4, least=1)
    engine = SglangEngine([stand_in.url, "http://127.0.0.1:9"], SglangSettings(), expected, in_flight=4, least=1)
    engine.close()
    assert set(engine.absent) == {1}


@pytest.mark.parametrize("version", ["0.5.20", "0.4.99.post2", "dev"])
def test_an_old_version_is_refused(version: str, stand_in: StandIn) -> None:
    stand_in.answers["/server_info"] |= {"version": version}
    (problem,) = problems(stand_in.url)
    assert f"its SGLang is {version}, needs 0.5.21 at least; update it with tools/setup_sglang.sh" in problem


def test_another_model_is_refused_with_every_reason(stand_in: StandIn) -> None:
    stand_in.answers["/model_info"] |= {"architectures": ["LlamaForCausalLM"]}
    found = "\n".join(problems(stand_in.url, vocab_size=90, longest=505))
    assert "it serves LlamaForCausalLM, needs Qwen3ForCausalLM" in found
    assert "its model has 83 tokens, ours has 90 (model.vocab_size)" in found
    assert "its context is 512 tokens, and prompt and response together take up to 513 with a margin of 8" in found


def test_another_tokenizer_is_refused(stand_in: StandIn) -> None:
    stand_in.answers["/server_info"] |= {"skip_tokenizer_init": False}
    stand_in.answers["/tokenize"] = {"tokens": [1, 2]}
    assert connect(stand_in.url, samples=[("a b", [1, 2])]).version == "0.5.23"
    (problem,) = problems(stand_in.url, samples=[("a b", [1, 2]), ("c", [3])])
    assert "its tokenizer makes [1, 2] of 'c', ours makes [3] (tokenizer.dir)" in problem


def test_a_server_that_draws_by_chance_is_refused_where_seeds_are_asked_for(stand_in: StandIn) -> None:
    (problem,) = problems(stand_in.url, deterministic=True)
    assert "it draws by chance, and sglang.deterministic is set; start it with --enable-deterministic" in problem
    stand_in.answers["/server_info"] |= {"enable_deterministic_inference": True}
    assert connect(stand_in.url, deterministic=True).version == "0.5.23"


YARN = Yarn(factor=2.5, original_positions=64)


def served(folder: Path, stand_in: StandIn, config: dict[str, Any], override: dict[str, Any] | None = None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    stand_in.answers["/model_info"] |= {"model_path": str(folder)}
    stand_in.answers["/server_info"] |= {"json_model_override_args": json.dumps(override or {})}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rotary_embedding_that_is_not_ours_is_refused(key: str, stand_in: StandIn, tmp_path: Path) -> None:
    plain: dict[str, Any] = {key: None if key == "rope_scaling" else {"rope_type": "default", "rope_theta": 1e6}}
    scaled = {key: YARN.hf_scaling()}
    served(tmp_path, stand_in, plain)
    assert connect(stand_in.url, yarn=None).version == "0.5.23"
    (problem,) = problems(stand_in.url, yarn=YARN)
    assert f"by {tmp_path}/config.json it computes with no YaRN, ours YaRN of factor 2.5 from 64 positions" in problem
    assert "(yarn.factor, yarn.original_positions, yarn.apply_to)" in problem
    assert 'rope_scaling {"rope_type": "yarn", "factor": 2.5' in problem
    for config, override in ((scaled, {}), (plain, {"rope_scaling": YARN.hf_scaling()}), (plain, scaled)):
        served(tmp_path, stand_in, config, override)
        assert connect(stand_in.url, yarn=YARN).version == "0.5.23"
        (problem,) = problems(stand_in.url, yarn=None)
        assert "it computes with YaRN of factor 2.5 from 64 positions, ours no YaRN" in problem
        (problem,) = problems(stand_in.url, yarn=replace(YARN, factor=4.0))
        assert "ours YaRN of factor 4" in problem
    served(tmp_path, stand_in, scaled, {key: None})
    assert connect(stand_in.url, yarn=None).version == "0.5.23"
    served(tmp_path, stand_in, {key: {"rope_type": "linear", "factor": 2.0}})
    assert 'the rotary embedding {"rope_type": "linear"' in problems(stand_in.url, yarn=None)[0]
    assert connect(stand_in.url).version == "0.5.23", "a teacher may have any"


def test_yarn_of_a_server_whose_model_cannot_be_read_is_warned_of(
    stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.answers["/model_info"] |= {"model_path": "Qwen/Qwen3-8B"}
    assert connect(stand_in.url, yarn=None).version == "0.5.23"
    assert not caplog.text
    assert connect(stand_in.url, yarn=YARN).version == "0.5.23"
    assert "nothing here tells whether it computes with YaRN of factor 2.5 (yarn.factor)" in caplog.text


def test_a_server_that_ends_responses_elsewhere_is_refused(stand_in: StandIn, tmp_path: Path) -> None:
    served(tmp_path, stand_in, {"eos_token_id": 3})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert connect(stand_in.url, stop_ids=(5, 3, 9)).version == "0.5.23", "ends that it lacks come with every request"
    (problem,) = problems(stand_in.url, stop_ids=(3,))
    assert f"in {tmp_path} it ends responses at [5], too, and ours end at [3] only" in problem
    assert "start it from model.hf_dir, or name these tokens in rollout.stop_tokens" in problem
    served(tmp_path, stand_in, {"eos_token_id": 3}, {"eos_token_id": [3, 11]})
    assert "at [5, 11], too" in problems(stand_in.url, stop_ids=(3,))[0]
    assert connect(stand_in.url).version == "0.5.23"


def test_the_end_token_of_a_servers_tokenizer_is_one_of_its_ends(stand_in: StandIn, tmp_path: Path) -> None:
    served(tmp_path, stand_in, {})
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    added = [{"content": "<end>", "id": 7}]
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    stand_in.answers["/model_info"] |= {"tokenizer_path": str(tokenizer)}
    assert connect(stand_in.url, stop_ids=(3,)).version == "0.5.23", "it was started without its tokenizer"
    stand_in.answers["/server_info"] |= {"skip_tokenizer_init": False}
    assert connect(stand_in.url, stop_ids=(3, 7)).version == "0.5.23"
    assert "it ends responses at [7], too" in problems(stand_in.url, stop_ids=(3,))[0]


def test_ends_of_a_server_whose_model_cannot_be_read_are_warned_of(
    stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.answers["/model_info"] |= {"model_path": "Qwen/Qwen3-8B"}
    assert connect(stand_in.url, stop_ids=(3,)).version == "0.5.23"
    assert "nothing here tells which tokens end its responses beside [3]: no Qwen/Qwen3-8B/config.json" in caplog.text


def test_the_vocabulary_of_a_paused_server_is_read_from_its_folder(
    stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.answers["/ready"] = lambda handler, body: handler.reply(503, "")
    served(tmp_path, stand_in, {"vocab_size": 83})
    assert connect(stand_in.url).version == "0.5.23"
    assert "its model has 83 tokens, ours has 84 (model.vocab_size)" in problems(stand_in.url, vocab_size=84)[0]
    served(tmp_path, stand_in, {"vocab_size": 83}, {"vocab_size": 84})
    assert connect(stand_in.url, vocab_size=84).version == "0.5.23"
    assert not caplog.text
    stand_in.answers["/model_info"] |= {"model_path": "Qwen/Qwen3-8B"}
    assert connect(stand_in.url, vocab_size=84).version == "0.5.23"
    assert "nothing here tells how many tokens its model has" in caplog.text
    assert "/generate" not in stand_in.paths(), "it would wait until the server goes on"
    stand_in.answers["/ready"] = {}
    assert "its model has 83 tokens" in problems(stand_in.url, vocab_size=84)[0], "one that goes on tells"


def test_sampling_parameters_that_a_server_adds_are_refused(stand_in: StandIn) -> None:
    stand_in.answers["/model_info"] |= {"preferred_sampling_params": {"top_k": 20}}
    (problem,) = problems(stand_in.url)
    assert "it adds {'top_k': 20} to what requests ask for; start it without --preferred-sampling-params" in problem


@pytest.mark.parametrize(
    ("told", "most"),
    [
        ({"max_running_requests": 48}, 48),
        ({"max_running_requests": None}, None),
        ({"max_running_requests": 48, "internal_states": [{"effective_max_running_requests_per_dp": 40}] * 2}, 80),
        ({"max_running_requests": 48, "internal_states": [{}]}, None),
    ],
)
def test_how_many_requests_a_server_generates_for_at_a_time(
    stand_in: StandIn, told: dict[str, Any], most: int | None
) -> None:
    stand_in.answers["/server_info"] |= told
    assert connect(stand_in.url).most_running == most


def test_what_is_no_server_of_sglang_is_refused(stand_in: StandIn) -> None:
    stand_in.answers["/server_info"] = "<html>welcome</html>"
    (problem,) = problems(stand_in.url)
    assert "must be an" in problem or "must be a running SGLang server" in problem
    del stand_in.answers["/server_info"]
    (problem,) = problems(stand_in.url)
    assert "/server_info answered status 404" in problem


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("/server_info", {"tp_size": None}),
        ("/server_info", {"tp_size": [2]}),
        ("/server_info", {"tp_size": "two"}),
        ("/server_info", {"internal_states": 3}),
        ("/model_info", {"architectures": 7}),
        ("/model_info", {"architectures": [None]}),
    ],
)
def test_facts_of_no_known_kind_are_refused(stand_in: StandIn, path: str, facts: dict[str, Any]) -> None:
    stand_in.answers[path] |= facts
    (problem,) = problems(stand_in.url)
    assert f"engine 0 ({stand_in.url}): /server_info or /model_info cannot be read: " in problem


def test_a_tokenizer_that_tells_no_tokens_has_none_to_show(stand_in: StandIn) -> None:
    stand_in.answers["/server_info"] |= {"skip_tokenizer_init": False}
    stand_in.answers["/tokenize"] = {"tokens": None}
    assert connect(stand_in.url, samples=[("a b", [1, 2])]).version == "0.5.23"


def test_problems_of_all_servers_come_together(stand_in: StandIn) -> None:
    found = problems("http://127.0.0.1:9", stand_in.url, "http://127.0.0.1:7")
    assert len(found) == 2
    assert "engine 0 (http://127.0.0.1:9): /server_info: no connection" in found[0]
    assert "engine 2 (http://127.0.0.1:7)" in found[1]


def test_a_real_server_fits_and_others_are_told_apart(sglang_urls: dict[str, str]) -> None:
    for dtype, url in sglang_urls.items():
        facts = connect(url, longest=96)
        assert (facts.device, facts.tp, facts.dtype, facts.incremental) == ("cpu", 1, dtype, True)
    found = "\n".join(problems(sglang_urls["float32"], vocab_size=84, longest=97))
    assert "its model has 83 tokens, ours has 84" in found
    assert "its context is 104 tokens" in found


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_real_server_that_was_left_paused_is_judged_as_any(sglang_urls: dict[str, str], mode: str) -> None:
    url = sglang_urls["float32"]
    engine = SglangEngine([url], SglangSettings(), Expected(vocab_size=VOCAB, longest_sequence=96), in_flight=1)
    group = EngineGroup([engine.engines[0].caller], 60.0)
    group.call("/pause_generation", {"mode": mode})
    try:
        assert connect(url, longest=96).context_length == 104
        (problem,) = problems(url, vocab_size=84, longest=96)
        assert "its model has 83 tokens, ours has 84 (model.vocab_size)" in problem
    finally:
        group.call("/continue_generation", {})
        engine.close()


def test_the_folder_that_a_server_was_started_from_counts_and_not_that_of_the_newest_weights(
    stand_in: StandIn, tmp_path: Path
) -> None:
    """A trainer has put those weights there, with a config.json of its own."""
    published = tmp_path / "published"
    published.mkdir()
    served(published, stand_in, {"rope_scaling": YARN.hf_scaling()})
    (tmp_path / "config.json").write_text(json.dumps({"rope_scaling": None}))
    stand_in.answers["/server_info"] |= {"model_path": str(tmp_path)}
    (problem,) = problems(stand_in.url, yarn=YARN)
    assert f"by {tmp_path}/config.json it computes with no YaRN" in problem
