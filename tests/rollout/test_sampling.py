from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_klear.rollout.sampling import response_uniforms, sample_tokens

# Quantile 1 - 1e-4 of chi-square, by degrees of freedom: a right sampler fails one seed in ten thousand.
CHI_SQUARE_LIMIT = {2: 18.42, 4: 23.51, 11: 37.37}


def exact_nucleus(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Probabilities that are sampled from, by the definition, in Python floats."""
    weights = [math.exp(x / temperature) for x in logits]
    probabilities = [w / math.fsum(weights) for w in weights]
    kept, mass = [], 0.0
    for token in sorted(range(len(logits)), key=lambda t: (-probabilities[t], t)):
        kept.append(token)
        mass += probabilities[token]
        if mass >= top_p:
            break
    return [p / mass if t in kept else 0.0 for t, p in enumerate(probabilities)]


def inverse(probabilities: list[float], uniform: float, order: list[int]) -> int:
    mass = 0.0
    for token in order:
        mass += probabilities[token]
        if uniform < mass:
            return token
    return order[-1]


@pytest.mark.parametrize(("temperature", "top_p", "support"), [(1.0, 1.0, 12), (0.6, 0.9, 5), (1.7, 0.4, 3)])
def test_frequencies_follow_the_exact_distribution(temperature: float, top_p: float, support: int) -> None:
    logits = [1.2, -0.4, 0.3, 2.1, -1.5, 0.0, 0.9, 1.6, -0.2, 0.5, 1.9, -0.9]
    count = 20000
    uniforms = torch.tensor([response_uniforms(5, "a prompt", index, 1)[0] for index in range(count)])
    tokens, _ = sample_tokens(torch.tensor(logits).expand(count, -1), uniforms, temperature=temperature, top_p=top_p)
    expected = np.array(exact_nucleus(logits, temperature, top_p)) * count
    observed = np.bincount(tokens.numpy(), minlength=12)
    kept = expected > 0
    assert kept.sum() == support
    assert observed[~kept].sum() == 0
    assert ((observed - expected)[kept] ** 2 / expected[kept]).sum() < CHI_SQUARE_LIMIT[support - 1]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_every_row_is_the_inverse_of_its_own_distribution(top_p: float) -> None:
    rng = np.random.default_rng(0)
    logits, uniforms = rng.normal(0, 2, (300, 17)), rng.random(300)
    tokens, logprobs = sample_tokens(
        torch.tensor(logits, dtype=torch.float32), torch.tensor(uniforms), temperature=0.8, top_p=top_p
    )
    for row, uniform, token, logprob in zip(logits.tolist(), uniforms, tokens.tolist(), logprobs.tolist(), strict=True):
        probabilities = exact_nucleus(row, 0.8, top_p)
        by_probability = sorted(range(17), key=lambda t: -probabilities[t])
        assert token == inverse(probabilities, uniform, list(range(17)) if top_p == 1.0 else by_probability)
        # Over the whole vocabulary, whatever the nucleus.
        assert logprob == pytest.approx(math.log(exact_nucleus(row, 0.8, 1.0)[token]), abs=2e-6)


def test_greedy_takes_the_largest_and_reports_temperature_one() -> None:
    logits = torch.randn(9, 31, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample_tokens(logits, torch.rand(9).double(), temperature=0.0, top_p=0.3)
    assert tokens.tolist() == [max(range(31), key=row.__getitem__) for row in logits.tolist()]
    exact = [math.log(max(exact_nucleus(row, 1.0, 1.0))) for row in logits.tolist()]
    assert logprobs.tolist() == pytest.approx(exact, abs=1e-6)


def test_a_vanishing_nucleus_is_the_most_probable_token_and_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]]).expand(50, -1)
    uniforms = torch.linspace(0, 1 - 1e-9, 50, dtype=torch.float64)
    tokens, _ = sample_tokens(logits, uniforms, temperature=1.0, top_p=1e-9)
    assert tokens.unique().tolist() == [1]


def test_impossible_tokens_are_never_drawn_at_either_end() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.5 - 2**-50, 0.5, 1 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.999):
        tokens, logprobs = sample_tokens(logits, uniforms, temperature=1.0, top_p=top_p)
        assert tokens.tolist() == [1, 1, 3, 3]
        assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 4)


def test_low_precision_logits_are_judged_in_float32() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, logprobs = sample_tokens(logits, torch.rand(6).double(), temperature=1.0, top_p=1.0)
    assert logprobs.dtype == torch.float32
    tokens, again = sample_tokens(logits.double(), torch.zeros(6).double(), temperature=0.0, top_p=1.0)
    torch.testing.assert_close(again.double(), logits.double().log_softmax(-1).amax(-1), atol=1e-6, rtol=0)
    assert tokens.dtype == torch.int64


def test_uniforms_are_keyed_prefix_stable_and_spread_evenly() -> None:
    base = response_uniforms(3, "p", 0, 4000)
    assert np.array_equal(base[:10], response_uniforms(3, "p", 0, 10))
    others = [response_uniforms(*key, 4000) for key in ((4, "p", 0), (3, "q", 0), (3, "p", 1), (-3, "p", 0))]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06
    counts = np.histogram(base, bins=12, range=(0, 1))[0]
    assert counts.sum() == 4000
    assert ((counts - 4000 / 12) ** 2 / (4000 / 12)).sum() < CHI_SQUARE_LIMIT[11]


def test_keys_cannot_be_confused_by_joining_their_parts() -> None:
    assert not np.array_equal(response_uniforms(1, "1\n2", 2, 4), response_uniforms(1, "2", 1, 4))
    assert not np.array_equal(response_uniforms(11, "x", 1, 4), response_uniforms(1, "x", 11, 4))


def test_uniforms_stay_what_they_were_so_that_old_runs_resume() -> None:
    expected = [0.6265178760416632, 0.3919248953144241, 0.8138623743020647]
    assert response_uniforms(1234, "prompt-7", 2, 3).tolist() == expected
