"""Learning rates by closed form, and which weights decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import Architecture
from megatron_klear.model import hf_named_tensors, qwen3
from megatron_klear.records import TrainSequence
from megatron_klear.trainer import Trainer

OBJECTIVE = PolicyObjective()


def rates(trainer: Trainer, sequences: list[TrainSequence], updates: int) -> list[float]:
    """Learning rates that so many updates ran at."""
    return [trainer.update(sequences[:1], OBJECTIVE, step=step).lr for step in range(1, updates + 1)]


def test_cosine_with_warm_up(make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]) -> None:
    peak, least, warm, total = 8e-5, 4e-5, 4, 12
    trainer = make_trainer(lr=peak, min_lr=least, schedule="cosine", warmup_steps=warm, total_updates=total)
    found = rates(trainer, sequences, total)
    for update, rate in enumerate(found, start=1):
        share = (update - warm) / (total - warm)
        cosine = least + (peak - least) * (1 + math.cos(math.pi * share)) / 2
        assert rate == pytest.approx(peak * update / warm if update <= warm else cosine, rel=1e-12)
    assert found[0] > 0
    assert found[warm - 1] == peak
    assert found[-1] == least, "exactly"


def test_after_the_last_planned_update_the_rate_stays(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    found = rates(make_trainer(lr=1e-3, min_lr=1e-4, schedule="cosine", total_updates=3), sequences, 5)
    assert found[2:] == [1e-4] * 3


def test_constant_ignores_the_smallest_rate(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    trainer = make_trainer(lr=1e-3, min_lr=1e-5, schedule="constant", warmup_steps=2, total_updates=5)
    assert rates(trainer, sequences, 5) == [5e-4, 1e-3, 1e-3, 1e-3, 1e-3]


def test_warm_up_longer_than_the_run(make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]) -> None:
    trainer = make_trainer(lr=1e-3, schedule="cosine", warmup_steps=10, total_updates=3)
    assert rates(trainer, sequences, 3) == pytest.approx([1e-4, 2e-4, 3e-4])


def test_updates_that_were_not_made_count_in_the_schedule(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    trainer = make_trainer(lr=1e-3, schedule="cosine", total_updates=8)
    rates(trainer, sequences, 1)
    trainer.advance_schedule_to(4)
    trainer.advance_schedule_to(2)  # never back
    (rate,) = rates(trainer, sequences, 1)
    assert rate == pytest.approx(1e-3 * (1 + math.cos(math.pi * 5 / 8)) / 2, rel=1e-12)


@pytest.mark.parametrize("distributed", [False, True])
def test_matrices_decay_and_norms_do_not(
    distributed: bool, make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]
) -> None:
    """Without a gradient the update is the decay alone: w (1 - lr * decay)."""
    lr, decay = 0.02, 0.3
    trainer = make_trainer(lr=lr, weight_decay=decay, distributed=distributed)
    model, arch, context = trainer.trainable.model, trainer.arch, trainer.context
    before = {name: tensor.clone() for name, tensor in hf_named_tensors(model, arch, context)}
    nothing = [replace(s, policy_weight=s.policy_weight * 0, lm_weight=s.lm_weight * 0) for s in sequences]
    report = trainer.update(nothing, OBJECTIVE, step=1)
    assert report.loss == report.grad_norm == 0.0
    kinds = set()
    for name, tensor in hf_named_tensors(model, arch, context):
        kinds.add(tensor.dim())
        kept = 1.0 if tensor.dim() == 1 else 1 - lr * decay
        torch.testing.assert_close(tensor, before[name] * kept, rtol=1e-6, atol=0)
    assert kinds == {1, 2}


def test_the_first_adam_step_by_hand(make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]) -> None:
    """Bias correction makes the first step lr * g / (|g| + eps), g being clipped."""
    lr, eps, clip = 1e-2, 1e-2, 0.05
    trainer = make_trainer(lr=lr, adam_eps=eps, clip_grad=clip)
    model = trainer.trainable.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = trainer.update(sequences, OBJECTIVE, step=1)
    assert report.grad_norm > 2 * clip
    norm = 0.0
    for name, parameter in model.named_parameters():
        gradient = parameter.main_grad  # clipped in place
        norm += float(gradient.square().sum())
        wanted = before[name] - lr * gradient / (gradient.abs() + eps)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-7)
    assert norm**0.5 == pytest.approx(clip, rel=1e-4)


def test_no_clipping_when_it_is_off(make_trainer: Callable[..., Trainer], sequences: list[TrainSequence]) -> None:
    trainer = make_trainer(clip_grad=0.0)
    report = trainer.update(sequences, OBJECTIVE, step=1)
    squares = sum(float(p.main_grad.square().sum()) for p in trainer.trainable.model.parameters())
    assert squares**0.5 == pytest.approx(report.grad_norm, rel=1e-5)


@pytest.mark.parametrize("arch", [False, True], indirect=True, ids=["untied", "tied"])
def test_the_head_adds_its_gradient_to_megatrons_buffer_once(
    arch: Architecture,
    make_trainer: Callable[..., Trainer],
    sequences: list[TrainSequence],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over several microbatches it must come to what autograd and Megatron's hook add up; tied, the embedding's too."""
    asked: list[bool] = []

    def gradients(takes: Callable[[torch.Tensor], bool]) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(qwen3, "_takes_gradients", lambda weight: asked.append(takes(weight)) or asked[-1])
        trainer = make_trainer(token_budget=32, clip_grad=0.0)
        trainer.update(sequences, OBJECTIVE, step=1)
        return {name: p.main_grad.clone() for name, p in trainer.trainable.model.named_parameters()}

    ours = gradients(qwen3._takes_gradients)
    assert len(asked) > 2
    assert all(asked)
    autograds = gradients(lambda weight: False)
    assert ours.keys() == autograds.keys()
    assert ("output_layer.weight" in ours) != arch.tie_embeddings
    for name, gradient in ours.items():
        assert float(gradient.norm()) > 0
        torch.testing.assert_close(gradient, autograds[name], rtol=1e-5, atol=1e-7)
