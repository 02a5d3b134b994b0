"""Scoring and updating on one process: what is reported, what is refused, and what is left alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import Architecture
from megatron_klear.conformance.reference import all_logprobs, reference_loss, reference_model
from megatron_klear.errors import DataError, TrainingError
from megatron_klear.model import hf_named_tensors
from megatron_klear.observe.flops import FlopCount, forward_flops, training_flops
from megatron_klear.records import TrainSequence
from megatron_klear.trainer import Trainer, sft_minibatch
from megatron_klear.trainer import trainer as trainer_file

OBJECTIVE = PolicyObjective(kind="gppo", epsilon_low=0.2, epsilon_high=0.28)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all weights by Hugging Face name."""
    stream = hf_named_tensors(trainer.trainable.model, trainer.arch, trainer.context)
    return {name: tensor.clone() for name, tensor in stream}


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("token_budget", [30, 500])
def test_logprobs_equal_transformers_in_the_order_asked(
    temperature: float,
    token_budget: int,
    make_trainer: Callable[..., Trainer],
    sequences: list[TrainSequence],
    arch: Architecture,
) -> None:
    found = make_trainer(token_budget=token_budget).token_logprobs(sequences, temperature=temperature)
    wanted = all_logprobs(reference_model(arch).double(), sequences, temperature)
    assert [values.shape for values in found] == [s.token_ids.shape for s in sequences]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
        assert one.dtype == np.float32
        assert one[0] == 0
        assert (one[1:] < 0).all()


def test_scoring_needs_no_weights_and_changes_nothing(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    bare = [
        replace(s, policy_weight=s.policy_weight * 0, lm_weight=s.lm_weight * 0, advantages=s.advantages * 0)
        for s in sequences
    ]
    for one, other in zip(trainer.token_logprobs(bare), trainer.token_logprobs(sequences), strict=True):
        np.testing.assert_array_equal(one, other)
    assert_same_bits(weights(trainer), before)


def test_updates_on_the_same_rows_lower_the_sft_loss(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    trainer = make_trainer(lr=5e-3)
    rows = sft_minibatch([(s.sequence_id, s.token_ids, s.lm_weight > 0) for s in sequences])
    losses = [trainer.update(rows, OBJECTIVE, step=step).loss for step in range(1, 7)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.85 * losses[0]


def test_one_report_by_hand(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence], arch: Architecture
) -> None:
    model = reference_model(arch).double()
    logprobs = all_logprobs(model, sequences, 1.0)
    report = make_trainer(lr=3e-4, token_budget=50).update(sequences, OBJECTIVE, step=1)
    loss, _ = reference_loss(model, sequences, OBJECTIVE, 1.0)
    lm_loss = -sum(float((s.lm_weight * values).sum()) for s, values in zip(sequences, logprobs, strict=True))
    assert report.loss == pytest.approx(float(loss), rel=1e-5)
    assert report.lm_loss == pytest.approx(lm_loss, rel=1e-5)
    assert report.policy_loss == pytest.approx(float(loss) - lm_loss, rel=1e-4)
    loss.backward()
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert report.grad_norm == pytest.approx(squares**0.5, rel=1e-5)
    assert report.lr == pytest.approx(3e-4)
    assert report.tokens == 92
    assert report.predicted_tokens == sum(int((s.policy_weight != 0).sum()) for s in sequences)
    assert report.microbatches == 2
    assert report.slots_used == pytest.approx(1.0)
    assert report.budget_used == pytest.approx(92 / (2 * 50)), "packs end where their tokens do, budgets do not"
    assert report.flops_max_over_mean == 1.0

    ratio = np.concatenate(
        [np.exp(v - s.old_logprobs)[s.policy_weight != 0] for s, v in zip(sequences, logprobs, strict=True)]
    )
    sign = np.concatenate([np.sign(s.advantages)[s.policy_weight != 0] for s in sequences])
    fractions = report.regions.fractions()
    for side, inside in (("low", ratio < 0.8), ("high", ratio > 1.28)):
        for name, positive in (("positive", sign > 0), ("negative", sign < 0)):
            assert fractions[f"tokens/{side}_{name}"] == pytest.approx(np.mean(inside & positive)), (side, name)

    entropies = []
    with torch.no_grad():
        for s in sequences:
            logits = reference_model(arch)(input_ids=torch.as_tensor(s.token_ids)[None]).logits[0, :-1]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy()[s.policy_weight[1:] != 0])
    assert report.entropy == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)


def test_operations_are_those_of_the_sequences_however_they_are_packed(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence], arch: Architecture
) -> None:
    trainer = make_trainer(token_budget=50)
    lengths = [len(s.token_ids) for s in sequences]
    trained = sum(int(((s.policy_weight != 0) | (s.lm_weight != 0)).sum()) for s in sequences)
    trainer.token_logprobs(sequences)
    trainer.update(sequences, OBJECTIVE, step=1)
    assert trainer.take_flops() == forward_flops(arch, lengths) + training_flops(arch, lengths, trained)
    assert trainer.take_flops() == FlopCount()


@pytest.mark.parametrize("distributed", [False, True])
def test_an_infinite_loss_is_refused_with_its_step_and_sequences_and_no_bit_changes(
    distributed: bool, make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    trainer = make_trainer(token_budget=30, distributed=distributed)
    before = weights(trainer)
    bad = replace(sequences[4], lm_weight=np.where(np.arange(30) == 20, np.inf, 0).astype(np.float32))
    assert len(bad.token_ids) == 30, "so that it fills a microbatch alone"
    with pytest.raises(TrainingError) as error:
        trainer.update([*sequences[:4], bad, sequences[5]], OBJECTIVE, step=17)
    message = str(error.value)
    assert message.startswith("step 17: the loss is not finite in microbatches with s4; no update was made.")
    assert "optimizer.lr" in message
    assert_same_bits(weights(trainer), before)
    assert_goes_on_as_if_nothing_had_been(trainer, make_trainer(token_budget=30, distributed=distributed), sequences)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_gradient_that_is_not_finite_is_refused_too(
    distributed: bool, make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    """Losses of 1e30 are finite numbers; the norm of their gradient is not, in float32."""
    trainer = make_trainer(distributed=distributed)
    before = weights(trainer)
    huge = [replace(s, lm_weight=s.lm_weight * np.float32(1e30)) for s in sequences]
    with pytest.raises(TrainingError) as error:
        trainer.update(huge, OBJECTIVE, step=3)
    message = str(error.value)
    assert message.startswith(
        "step 3: the gradient is not finite (norm inf) in the minibatch of s0, s1, s2, s3, s4, s5;"
    )
    assert "no update was made" in message
    assert_same_bits(weights(trainer), before)
    assert_goes_on_as_if_nothing_had_been(trainer, make_trainer(distributed=distributed), sequences)


def assert_goes_on_as_if_nothing_had_been(tried: Trainer, fresh: Trainer, sequences: list[TrainSequence]) -> None:
    """Neither optimizer state nor schedule nor a gradient is left of an update that was refused."""
    reports = [trainer.update(sequences, OBJECTIVE, step=18) for trainer in (tried, fresh)]
    assert reports[0].loss == reports[1].loss
    assert reports[0].lr == reports[1].lr
    assert_same_bits(weights(tried), weights(fresh))


def test_nan_in_a_weight_is_found(make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.trainable.model.decoder.final_layernorm.weight[3] = torch.nan
    with pytest.raises(TrainingError, match="step 5: the loss is not finite in microbatches with s0, s1, s2"):
        trainer.update(sequences, OBJECTIVE, step=5)


def test_many_names_are_shortened() -> None:
    names = [f"s{i}" for i in range(23)]
    text = trainer_file._shortened(names)
    assert text == ", ".join(names[:20]) + " and 3 more"
    assert trainer_file._shortened(names[:2]) == "s0, s1"


def test_a_sequence_over_the_budget_is_refused(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    with pytest.raises(DataError, match=re.escape("packing.token_budget")):
        make_trainer(token_budget=25).update(sequences, OBJECTIVE, step=1)


def test_updates_do_not_depend_on_microbatches_beyond_rounding(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    found = []
    for token_budget, count in ((30, 4), (500, 1)):
        trainer = make_trainer(token_budget=token_budget, adam_eps=1e-3)
        assert trainer.update(sequences, OBJECTIVE, step=1).microbatches == count
        found.append(weights(trainer))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_the_same_update_twice_gives_the_same_bits(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    found = []
    for _ in range(2):
        trainer = make_trainer()
        for step in (1, 2):
            trainer.update(sequences, OBJECTIVE, step=step)
        found.append(weights(trainer))
    assert_same_bits(found[1], found[0])
