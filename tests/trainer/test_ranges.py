"""The order in which an update opens and closes the ranges of its microbatches and layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import Architecture
from megatron_klear.model import layer_ranges
from megatron_klear.model.layer_ranges import StageRanges
from megatron_klear.observe import ranges
from megatron_klear.records import TrainSequence
from megatron_klear.trainer import Trainer

FORWARD = ["+layer 1 forward", "-layer 1 forward", "+layer 2 forward", "-layer 2 forward"]
BACKWARD = ["+layer 2 backward", "-layer 2 backward", "+layer 1 backward", "-layer 1 backward"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []

    class Range:
        def __init__(self, name: str) -> None:
            self.name = name
            noted.append(f"+{name}")

        def close(self) -> None:
            noted.append(f"-{self.name}")

    monkeypatch.setattr(layer_ranges, "OpenRange", Range)
    monkeypatch.setattr(ranges, "OpenRange", Range)
    return noted


@pytest.fixture
def arch(arch: Architecture) -> Architecture:
    return dataclasses.replace(arch, num_layers=2)


def test_an_update_of_two_microbatches_and_a_scoring_pass(
    make_trainer: Callable[..., Trainer], sequences: list[TrainSequence], events: list[str]
) -> None:
    trainer = make_trainer(token_budget=50)
    trainer.trainable.model.ranges = StageRanges(trainer.trainable.model)
    for step in (1, 2):  # microbatches are counted from 0 in each
        events.clear()
        trainer.update(sequences, PolicyObjective(), step=step)
        wanted = []
        for number in (0, 1):
            forward, backward = f"microbatch {number} forward", f"microbatch {number} backward"
            wanted += [f"+{forward}", *FORWARD, f"-{forward}", f"+{backward}", *BACKWARD, f"-{backward}"]
        assert events == wanted
    events.clear()
    trainer.token_logprobs(sequences[:1])
    assert events == ["+microbatch 0 forward", *FORWARD, "-microbatch 0 forward"]


def test_without_a_profiler_layers_have_no_hooks(make_trainer: Callable[..., Trainer], events: list[str]) -> None:
    trainer = make_trainer()
    assert trainer.trainable.model.ranges is None
    assert not any(layer._forward_hooks for layer in trainer.trainable.model.decoder.layers)
