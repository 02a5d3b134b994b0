"""A step's comparison of engine and trainer: metrics, weights by sequence, and what a stopped run is told."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_klear.algorithm import OffPolicyCorrection
from megatron_klear.config import CorrectionSettings
from megatron_klear.errors import MismatchError
from megatron_klear.records import Grade, Prompt, Rollout, RolloutGroup, ScoredGroup
from megatron_klear.session.agreement import Agreement
from megatron_klear.session.off_policy import off_policy

PUBLISHED = 7


def group(name: str, prompt: int, responses: list[tuple[list[float], tuple[tuple[int, int], ...]]]) -> ScoredGroup:
    """A group from (engine logprobs, policy versions) of each response."""
    rollouts = tuple(
        Rollout(
            response_ids=np.arange(len(logprobs)),
            rollout_logprobs=np.array(logprobs, dtype=np.float32),
            finish_reason="stop",
            policy_versions=versions,
        )
        for logprobs, versions in responses
    )
    count = len(rollouts)
    return ScoredGroup(
        group=RolloutGroup(
            prompt=Prompt(prompt_id=name, domain="math", token_ids=np.arange(prompt), reference=""), rollouts=rollouts
        ),
        grades=(Grade(outcome="correct", reward=1.0),) * count,
        rewards=np.ones(count, dtype=np.float32),
        is_correct=np.ones(count, dtype=np.bool_),
        graded=np.ones(count, dtype=np.bool_),
        advantages=np.ones(count, dtype=np.float32),
    )


GROUPS = [
    group("p", 2, [([-1.0, -2.0, -3.0], ((PUBLISHED, 3),)), ([-1.0], ((PUBLISHED, 1),))]),
    group("q", 1, [([-1.0, -2.0, -2.0, -2.0], ((PUBLISHED - 2, 1), (PUBLISHED - 1, 1), (PUBLISHED, 2)))]),
]


def trainer(**differences: list[float]) -> dict[str, np.ndarray]:
    """The trainer's logprobs: the engine's plus differences at the response; something else at the prompt."""
    found = {}
    for one in GROUPS:
        for j, rollout in enumerate(one.group.rollouts):
            name = f"{one.group.prompt.prompt_id}{j}"
            added = np.array(differences.get(name, [0.0] * len(rollout.response_ids)), dtype=np.float32)
            prompt = np.full(len(one.group.prompt.token_ids), -9.0, dtype=np.float32)
            found[name[0] + "#" + name[1]] = np.concatenate([prompt, rollout.rollout_logprobs + added])
    return found


def compare(old, *, proof: str = "checksum", **settings):
    session = SimpleNamespace(
        settings=SimpleNamespace(correction=CorrectionSettings(**settings)), step=PUBLISHED, agreement=None
    )
    return off_policy(session, GROUPS, old, published=PUBLISHED, proof=proof)


def test_metrics_by_hand_over_response_tokens_alone():
    weights, metrics = compare(trainer(p0=[0.5, -0.25, 0.0], q0=[0.0, 0.0, 0.0, 0.25]), bound=0.3)
    assert weights is None
    assert metrics["mismatch/mean_abs"] == pytest.approx(1.0 / 8)
    assert metrics["mismatch/max_abs"] == 0.5
    assert metrics["mismatch/share_beyond"] == 1 / 8
    assert metrics["mismatch/share_stale"] == 2 / 8
    assert metrics["kl/rollout_trainer_k1"] == pytest.approx(-0.5 / 8)
    k3 = sum(math.exp(x) - 1 - x for x in (0.5, -0.25, 0.25)) / 8
    assert metrics["kl/rollout_trainer"] == pytest.approx(k3)
    assert not any(name.startswith("correction/") for name in metrics)


def test_weights_stand_at_their_tokens():
    weights, metrics = compare(trainer(p0=[1.0, -0.25, 0.0], q0=[0.0, 0.0, 0.0, 0.25]), kind="token", cap=1.5)
    assert weights is not None
    assert weights.keys() == {"p#0", "p#1", "q#0"}
    np.testing.assert_allclose(weights["p#0"], [1, 1, 1.5, math.exp(-0.25), 1], rtol=1e-7)
    np.testing.assert_allclose(weights["p#1"], [1, 1, 1], rtol=0)
    np.testing.assert_allclose(weights["q#0"], [1, 1, 1, 1, math.exp(0.25)], rtol=1e-7)
    assert all(values.dtype == np.float32 for values in weights.values())
    assert metrics["correction/share_cut"] == 1 / 8
    assert metrics["correction/weight_mean"] == pytest.approx((1.5 + math.exp(-0.25) + math.exp(0.25) + 5) / 8)
    assert 0 < metrics["correction/effective_sample_size"] < 1


def test_a_step_without_groups_has_nothing_to_compare():
    assert compare({}) == (None, {})


def test_numerics_are_told_from_unknown_weights():
    differing = trainer(p0=[3.0, -3.0, 3.0])
    with pytest.raises(MismatchError, match=r"step 8: .*1.12 nats, correction.stop_above_mean = 1.*") as caught:
        compare(differing)
    told = str(caught.value)
    assert "Cause: numerics" in told
    assert "tokens of version 7, the published one: 6, mean |difference| 1.5 nats" in told
    assert "tokens of older versions: 2, mean |difference| 0 nats" in told
    with pytest.raises(MismatchError, match=r"numerics. The engine has the trainer's weights"):
        compare(differing, proof="same tensors")
    with pytest.raises(MismatchError, match=r"stale weights, or numerics.*version 7.*weight_sync.verify=checksum"):
        compare(differing, proof="logprobs")
    with pytest.raises(MismatchError, match=r"other weights, or numerics.*scheduling.replay_from.*version 7"):
        compare(differing, proof="recorded")


def test_staleness_is_told_by_version():
    with pytest.raises(MismatchError) as caught:
        compare(trainer(q0=[4.0, 5.0, 0.1, 0.0]))
    told = str(caught.value)
    assert "Cause: staleness" in told
    assert "versions 5 to 6, and version 7 is published" in told
    assert "numerics" not in told


def test_where_all_tokens_are_old_neither_cause_is_claimed():
    """As in every step but the first with scheduling.mode=one_step_off."""
    session = SimpleNamespace(
        settings=SimpleNamespace(correction=CorrectionSettings()), step=PUBLISHED + 1, agreement=None
    )
    with pytest.raises(MismatchError) as caught:
        off_policy(session, GROUPS, trainer(p0=[9.0, -3.0, 3.0]), published=PUBLISHED + 1, proof="checksum")
    told = str(caught.value)
    assert "Cause: staleness, or numerics. All tokens were sampled by versions 5 to 7, and version 8 is" in told
    assert "scheduling.mode=sync" in told
    with pytest.raises(MismatchError) as caught:
        off_policy(session, GROUPS, trainer(p0=[9.0, -3.0, 3.0]), published=PUBLISHED + 1, proof="recorded")
    told = str(caught.value)
    assert "Cause: other weights, staleness, or numerics. The tokens were recorded by the run" in told
    assert "as of its versions 5 to 7" in told
    assert "scheduling.rollout_only, all its steps were recorded from the weights of step 5 alone" in told
    assert "weight_sync" not in told, "a replay has no engines whose settings would help"


def test_where_all_tokens_are_old_an_earlier_step_tells_numerics_from_age():
    session = SimpleNamespace(settings=SimpleNamespace(correction=CorrectionSettings()), step=PUBLISHED, agreement=None)
    off_policy(session, GROUPS, trainer(p0=[0.5, -0.25, 0.0]), published=PUBLISHED, proof="checksum")
    assert session.agreement == Agreement(PUBLISHED + 1, 6, pytest.approx(0.75 / 6))
    session.step += 1
    with pytest.raises(MismatchError) as caught:
        off_policy(session, GROUPS, trainer(p0=[9.0, -3.0, 3.0]), published=PUBLISHED + 1, proof="checksum")
    told = str(caught.value)
    assert "Cause: staleness. These tokens were sampled by versions 5 to 7, and version 8 is published" in told
    assert f"the newest that were not, 6 of step {PUBLISHED + 1}, agreed: mean |difference| 0.125 nats" in told


def test_only_the_newest_step_with_current_tokens_says_that_both_compute_alike():
    session = SimpleNamespace(settings=SimpleNamespace(correction=CorrectionSettings()), step=PUBLISHED, agreement=None)
    # 6 current tokens differ by 1.2 nats, and with 2 old ones that do not the step passes: 0.9.
    apart = trainer(p0=[1.2, 1.2, 1.2], p1=[1.2], q0=[0.0, 0.0, 1.2, 1.2])
    off_policy(session, GROUPS, trainer(), published=PUBLISHED, proof="checksum")
    assert session.agreement == Agreement(PUBLISHED + 1, 6, 0.0)
    session.step += 1
    off_policy(session, GROUPS, trainer(), published=PUBLISHED + 1, proof="checksum")
    assert session.agreement == Agreement(PUBLISHED + 1, 6, 0.0), "a step with old tokens alone shows nothing"
    session.step += 1
    off_policy(session, GROUPS, apart, published=PUBLISHED, proof="checksum")
    assert session.agreement is None
    with pytest.raises(MismatchError, match="Cause: staleness, or numerics"):
        off_policy(session, GROUPS, trainer(p0=[9.0, -3.0, 3.0]), published=PUBLISHED + 1, proof="checksum")


def test_limits_and_no_limits():
    differing = trainer(p0=[3.0, -3.0, 3.0])
    compare(differing, stop_above_mean=None)
    compare(differing, stop_above_mean=1.2)
    with pytest.raises(MismatchError, match=r"37.50% of tokens beyond correction.bound = 1 nats"):
        compare(differing, stop_above_mean=None, stop_above_share=0.3)
    compare(differing, stop_above_mean=None, stop_above_share=0.375)


def test_a_logprob_that_is_not_a_number_stops_the_run():
    with pytest.raises(MismatchError, match="nan nats"):
        compare(trainer(p1=[math.nan]), stop_above_mean=100.0)


def test_settings_and_algorithm_have_the_same_defaults():
    settings, correction = CorrectionSettings(), OffPolicyCorrection()
    for name in ("kind", "cap", "low", "high", "sequence_ratio"):
        assert getattr(settings, name) == getattr(correction, name)
