"""A server that does not serve our model is refused when it is connected, all reasons at once."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError
from megatron_klear.rollout.sglang import Expected, SglangEngine
from tests.rollout.sglang.conftest import VOCAB, StandIn


def connect(
    *urls: str, vocab_size: int = VOCAB, longest: int = 100, deterministic: bool = False, samples: Any = ()
) -> Any:
    expected = Expected(
        vocab_size=vocab_size, longest_sequence=longest, deterministic=deterministic, tokenizer_samples=samples
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


def test_what_is_no_server_of_sglang_is_refused(stand_in: StandIn) -> None:
    stand_in.answers["/server_info"] = "<html>welcome</html>"
    (problem,) = problems(stand_in.url)
    assert "must be an" in problem or "must be a running SGLang server" in problem
    del stand_in.answers["/server_info"]
    (problem,) = problems(stand_in.url)
    assert "/server_info answered status 404" in problem


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
