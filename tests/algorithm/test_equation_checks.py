"""The conformance list that users run: every row passes, and a wrong formula would make its row fail."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_klear.algorithm import equation_checks as checks
from megatron_klear.algorithm import gppo, ratio
from megatron_klear.algorithm.equation_checks import EquationCheck, equation_checks

CPU = torch.device("cpu")


@pytest.mark.parametrize("check", equation_checks(), ids=lambda check: f"{check.equation}: {check.name}")
def test_every_equation_holds(check: EquationCheck) -> None:
    error = check.measure(CPU)
    assert check.passes(error), f"{check.name} ({check.equation}): error {error} above {check.tolerance}"


def test_every_equation_of_the_paper_that_is_computed_has_a_row() -> None:
    text = " ".join(check.equation for check in equation_checks())
    for number in range(1, 19):
        assert any(word.strip(",") == str(number) for word in text.split()), f"no check names Eq. {number}"


def test_nan_does_not_pass() -> None:
    assert not equation_checks()[0].passes(math.nan)


def _failing() -> set[str]:
    return {check.equation for check in equation_checks() if not check.passes(check.measure(CPU))}


def test_swapped_signs_in_gppo_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gppo.gppo_scale_at_ratio
    monkeypatch.setattr(
        "megatron_klear.algorithm.objective.gppo_scale_at_ratio", lambda r, a, **kw: original(r, -a, **kw)
    )
    assert {"Eq. 11", "Eq. 12", "Eq. 17", "Eq. 18"} <= _failing()


def test_sample_deviation_in_the_advantages_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rewards: torch.Tensor, graded: torch.Tensor | None = None) -> torch.Tensor:
        return (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True, unbiased=True)

    monkeypatch.setattr(checks, "group_advantages", wrong)
    assert "Eq. 4" in _failing()


def test_a_missing_clamp_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclamped(logprobs: torch.Tensor, old: torch.Tensor, limit: float = 0.0) -> torch.Tensor:
        return torch.exp(logprobs.detach() - old.detach())

    monkeypatch.setattr("megatron_klear.algorithm.objective.importance_ratio", unclamped)
    assert "Eqs. 11, 15" in _failing()
    assert ratio.importance_ratio(torch.tensor(200.0), torch.tensor(0.0)).isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_every_equation_holds_on_the_gpu() -> None:
    for check in equation_checks():
        assert check.passes(check.measure(torch.device("cuda"))), check.name
