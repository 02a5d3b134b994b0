from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_klear.errors import RolloutError, WeightSyncError
from megatron_klear.records import Prompt, RolloutGroup
from megatron_klear.rollout import LocalEngine, RolloutEngine, RolloutProgress, SamplingParams
from megatron_klear.rollout.sampling import response_uniforms

MakeReference = Callable[..., Qwen3ForCausalLM]
MakeEngine = Callable[..., LocalEngine]
MakePrompts = Callable[..., list[Prompt]]
STOPS = (3, 17)


def params(temperature: float = 1.0, top_p: float = 1.0, limit: int = 24, stops: tuple[int, ...] = STOPS):
    return SamplingParams(temperature=temperature, top_p=top_p, max_response_tokens=limit, stop_token_ids=stops)


def token_lists(groups: list[RolloutGroup]) -> dict[str, list[list[int]]]:
    return {g.prompt.prompt_id: [r.response_ids.tolist() for r in g.rollouts] for g in groups}


def distribution(model: Qwen3ForCausalLM, ids: list[int], temperature: float) -> list[float]:
    """Next-token probabilities from a full forward pass without any cache."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    return torch.softmax(logits / temperature, dim=-1).tolist()


def one_by_one(
    model: Qwen3ForCausalLM, prompt: Prompt, response: int, sampling: SamplingParams, seed: int
) -> tuple[list[int], str]:
    """A response drawn the plain way: alone, no cache, sets and sums in Python."""
    uniforms = response_uniforms(seed, prompt.prompt_id, response, sampling.max_response_tokens)
    tokens: list[int] = []
    for uniform in uniforms:
        probabilities = distribution(model, prompt.token_ids.tolist() + tokens, sampling.temperature)
        order = list(range(len(probabilities)))
        if sampling.top_p < 1.0:
            order.sort(key=lambda t: -probabilities[t])
            while sum(probabilities[t] for t in order[:-1]) >= sampling.top_p:
                order.pop()
        drawn, mass = uniform * sum(probabilities[t] for t in order), 0.0
        for token in order:
            mass += probabilities[token]
            if drawn < mass:
                break
        tokens.append(token)
        if token in sampling.stop_token_ids:
            return tokens, "stop"
    return tokens, "length"


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_equals_transformers_generate(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts, tied: bool
) -> None:
    changes = {"tie_word_embeddings": tied}
    reference = make_reference(seed=3, **changes)
    engine = make_engine(reference, changes=changes, batch_responses=4)
    prompts = make_prompts(5, 1, 17, 9, 30, 2, 12)
    groups = engine.generate(prompts, num_responses=1, sampling=params(temperature=0.0, limit=40, stops=(3,)), seed=0)
    reasons = set()
    for group in groups:
        ids = torch.from_numpy(group.prompt.token_ids)[None]
        full = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=3,
            pad_token_id=0,
        )
        rollout = group.rollouts[0]
        assert rollout.response_ids.tolist() == full[0, ids.shape[1] :].tolist()
        reasons.add(rollout.finish_reason)
        assert rollout.finish_reason == ("stop" if rollout.response_ids[-1] == 3 else "length")
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_samples_equal_plain_sampling_of_each_response_alone(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts, temperature: float, top_p: float
) -> None:
    reference = make_reference()
    prompts = make_prompts(4, 11, 1, 7, 20)
    sampling = params(temperature, top_p)
    engine = make_engine(reference, batch_responses=4, prefill_tokens=16)  # forces refills and split groups
    groups = engine.generate(prompts, num_responses=3, sampling=sampling, seed=11)
    reasons = []
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            tokens, reason = one_by_one(reference, group.prompt, index, sampling, seed=11)
            assert rollout.response_ids.tolist() == tokens
            assert rollout.finish_reason == reason
            reasons.append(reason)
    assert set(reasons) == {"stop", "length"}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.8), (1.5, 1.0), (0.0, 1.0)])
def test_logprobs_equal_teacher_forcing_over_the_whole_vocabulary(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts, temperature: float, top_p: float
) -> None:
    reference = make_reference()
    engine = make_engine(reference, batch_responses=5)
    groups = engine.generate(make_prompts(6, 1, 23), num_responses=3, sampling=params(temperature, top_p), seed=2)
    for group in groups:
        for rollout in group.rollouts:
            ids = np.concatenate([group.prompt.token_ids, rollout.response_ids])
            logits = reference(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].float()
            exact = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            start = len(group.prompt.token_ids) - 1
            expected = exact[start:-1].gather(-1, torch.from_numpy(rollout.response_ids)[:, None])[:, 0]
            np.testing.assert_allclose(rollout.rollout_logprobs, expected.numpy(), atol=1e-5, rtol=0)


def test_a_response_does_not_depend_on_batch_size_neighbours_or_order(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    reference, prompts = make_reference(), make_prompts(3, 19, 8, 1, 14, 6)
    whole = token_lists(
        make_engine(reference, batch_responses=64).generate(prompts, num_responses=5, sampling=params(), seed=4)
    )
    for slots in (1, 2, 7, 30):
        engine = make_engine(reference, batch_responses=slots, prefill_tokens=20)
        assert token_lists(engine.generate(prompts[::-1], num_responses=5, sampling=params(), seed=4)) == whole
        alone = token_lists(engine.generate(prompts[2:3], num_responses=2, sampling=params(), seed=4))
        assert alone["p2"] == whole["p2"][:2]


def test_the_same_call_gives_the_same_bits_and_another_seed_does_not(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    engine, prompts = make_engine(make_reference(), batch_responses=5), make_prompts(4, 9, 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (
        engine.generate(prompts, num_responses=4, sampling=params(), seed=seed) for seed in (7, 7, 8)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert token_lists(first) == token_lists(again)
    for one, two in zip(first, again, strict=True):
        for a, b in zip(one.rollouts, two.rollouts, strict=True):
            assert a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes()
    assert token_lists(first) != token_lists(other)
    assert len({tuple(r.response_ids) for r in first[0].rollouts}) > 1


def test_records_have_the_promised_types_order_and_versions(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    engine: RolloutEngine = make_engine(make_reference())
    prompts = make_prompts(5, 3, 4)
    groups = engine.generate(prompts, num_responses=2, sampling=params(limit=6), seed=0)
    assert [g.prompt for g in groups] == prompts
    for rollout in (r for g in groups for r in g.rollouts):
        length = len(rollout.response_ids)
        assert rollout.response_ids.dtype == np.int64
        assert rollout.rollout_logprobs.dtype == np.float32
        assert rollout.rollout_logprobs.shape == (length,)
        assert rollout.policy_versions == ((0, length),)
        assert np.isin(rollout.response_ids[:-1], STOPS).sum() == 0
        assert rollout.finish_reason == "stop" or length == 6
    assert engine.generate([], num_responses=2, sampling=params(), seed=0) == []


def test_without_stop_tokens_every_response_fills_its_budget(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    engine = make_engine(make_reference(), batch_responses=3)
    groups = engine.generate(make_prompts(2, 5), num_responses=4, sampling=params(limit=150, stops=()), seed=0)
    assert {(len(r.response_ids), r.finish_reason) for g in groups for r in g.rollouts} == {(150, "length")}
    single = engine.generate(make_prompts(2, 5), num_responses=4, sampling=params(limit=1, stops=()), seed=0)
    assert [r.response_ids[0] for g in single for r in g.rollouts] == [
        r.response_ids[0] for g in groups for r in g.rollouts
    ]


def test_progress_rises_to_the_totals(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    seen: list[RolloutProgress] = []
    engine = make_engine(make_reference(), batch_responses=3)
    groups = engine.generate(make_prompts(3, 3, 3), num_responses=3, sampling=params(), seed=0, on_progress=seen.append)
    assert [p.finished_responses for p in seen] == sorted(p.finished_responses for p in seen)
    assert {p.total_responses for p in seen} == {9}
    tokens = sum(len(r.response_ids) for g in groups for r in g.rollouts)
    assert (seen[-1].finished_responses, seen[-1].generated_tokens) == (9, tokens)


def test_new_weights_change_the_answers_and_the_version(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    old, new = make_reference(seed=1), make_reference(seed=2)
    engine, prompts = make_engine(old), make_prompts(5, 6)
    before = engine.generate(prompts, num_responses=2, sampling=params(), seed=0)
    engine.update_weights(new.named_parameters(), version=5)
    assert engine.policy_version == 5
    after = engine.generate(prompts, num_responses=2, sampling=params(), seed=0)
    assert token_lists(after) != token_lists(before)
    assert after[0].rollouts[0].policy_versions[0][0] == 5
    fresh = make_engine(new).generate(prompts, num_responses=2, sampling=params(), seed=0)
    assert token_lists(after) == token_lists(fresh)


def test_no_answers_before_weights_or_after_a_broken_update(
    fields: dict[str, Any], make_reference: MakeReference, make_prompts: MakePrompts
) -> None:
    engine, prompts, weights = LocalEngine(fields), make_prompts(4), list(make_reference().named_parameters())
    request = {"num_responses": 1, "sampling": params(), "seed": 0}
    assert engine.policy_version == -1
    with pytest.raises(RolloutError, match="received no weights"):
        engine.generate(prompts, **request)
    engine.update_weights(weights, version=3)
    good = token_lists(engine.generate(prompts, **request))
    with pytest.raises(WeightSyncError, match=r"1 missing: lm_head\.weight"):
        engine.update_weights([pair for pair in weights if pair[0] != "lm_head.weight"], version=4)
    assert engine.policy_version == 3
    with pytest.raises(RolloutError, match="version 4 did not complete"):
        engine.generate(prompts, **request)
    engine.update_weights(weights, version=4)
    assert token_lists(engine.generate(prompts, **request)) == good


def test_a_stream_that_fails_half_way_leaves_the_engine_refusing(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    engine = make_engine(make_reference())

    def broken():
        yield next(iter(make_reference(seed=5).named_parameters()))
        raise ConnectionError("peer is gone")

    with pytest.raises(ConnectionError):
        engine.update_weights(broken(), version=1)
    with pytest.raises(RolloutError, match="mixture"):
        engine.generate(make_prompts(4), num_responses=1, sampling=params(), seed=0)


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_does_not_go_up_is_refused_and_harms_nothing(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts, version: int
) -> None:
    engine, prompts = make_engine(make_reference(seed=1)), make_prompts(4)
    before = token_lists(engine.generate(prompts, num_responses=1, sampling=params(), seed=0))
    with pytest.raises(WeightSyncError, match="versions must go up"):
        engine.update_weights(make_reference(seed=2).named_parameters(), version=version)
    assert token_lists(engine.generate(prompts, num_responses=1, sampling=params(), seed=0)) == before


def test_diverged_weights_stop_generation_by_prompt(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    reference = make_reference()
    reference.model.norm.weight.fill_(3e38)  # finite, but the logits overflow
    with pytest.raises(RolloutError, match=r"not finite.*p0.*optimizer\.lr"):
        make_engine(reference).generate(make_prompts(4), num_responses=2, sampling=params(), seed=0)


def test_requests_that_do_not_fit_the_model_name_every_problem(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts(240, 3, 3)
    prompts[1].token_ids[0] = 29
    prompts[2] = Prompt(prompt_id="empty", domain="math", token_ids=np.array([], np.int64), reference="")
    with pytest.raises(RolloutError) as caught:
        make_engine(make_reference()).generate(
            prompts, num_responses=0, sampling=params(limit=17, stops=(5, 99)), seed=0
        )
    text = str(caught.value)
    for part in (
        "rollout.responses_per_prompt",
        "stop tokens [99]",
        "prompt p0 has 240 tokens",
        "rollout.max_response_tokens of 17",
        "model.max_position_embeddings of 256",
        "prompt p1 holds token ids",
        "prompt empty has no tokens",
    ):
        assert part in text
    with pytest.raises(RolloutError, match="unique"):
        make_engine(make_reference()).generate(make_prompts(3) * 2, num_responses=1, sampling=params(), seed=0)


def test_a_prompt_may_fill_the_context_to_the_last_position(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    groups = make_engine(make_reference()).generate(
        make_prompts(240), num_responses=1, sampling=params(limit=16, stops=()), seed=0
    )
    assert len(groups[0].rollouts[0].response_ids) == 16


def test_a_closed_engine_says_so(
    make_reference: MakeReference, make_engine: MakeEngine, make_prompts: MakePrompts
) -> None:
    engine = make_engine(make_reference())
    engine.close()
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        engine.generate(make_prompts(3), num_responses=1, sampling=params(), seed=0)
    with pytest.raises(WeightSyncError, match="closed"):
        engine.update_weights([], version=9)


def test_a_directory_serves_as_config(
    tmp_path: Path, fields: dict[str, Any], make_reference: MakeReference, make_prompts: MakePrompts
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields | {"torch_dtype": "bfloat16"}))
    reference = make_reference()
    answers = []
    for source in (tmp_path, str(tmp_path), fields):
        engine = LocalEngine(source)
        engine.update_weights(reference.named_parameters(), version=0)
        answers.append(token_lists(engine.generate(make_prompts(5), num_responses=2, sampling=params(), seed=0)))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "'llama'.*'qwen3'"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "model.num_query_groups"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_configs_of_other_models_are_refused(fields: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RolloutError, match=text):
        LocalEngine(fields | changes)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"model\.hf_dir"):
        LocalEngine(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RolloutError, match=r"model\.hf_dir"):
        LocalEngine(tmp_path)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_agrees_with_its_own_teacher_forcing(
    fields: dict[str, Any], make_reference: MakeReference, make_prompts: MakePrompts
) -> None:
    reference = make_reference()
    engine = LocalEngine(fields, device="cuda", dtype=torch.bfloat16, batch_responses=5)
    engine.update_weights(reference.named_parameters(), version=0)
    reference = reference.to("cuda", torch.bfloat16)
    groups = engine.generate(make_prompts(6, 1, 23), num_responses=4, sampling=params(), seed=2)
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.from_numpy(np.concatenate([group.prompt.token_ids, rollout.response_ids])).cuda()
            start, tokens = len(group.prompt.token_ids) - 1, ids[len(group.prompt.token_ids) :, None]
            logits = reference(input_ids=ids[None], use_cache=False).logits[0].float()
            plain = torch.log_softmax(logits, -1)[start:-1].gather(-1, tokens)[:, 0].cpu().numpy()
            assert np.abs(plain - rollout.rollout_logprobs).mean() < 0.05
