"""Row statistics from sums without the label, against float64, wherever the label and the reference lie."""

from __future__ import annotations

import math

import pytest
import torch

from klear_kernels.label_split_rows import rows_from_sums


def sums_of(logits: torch.Tensor, label: int, reference: float) -> tuple[torch.Tensor, ...]:
    """Exact sums, rounded to float32."""
    others = torch.cat([logits[:label], logits[label + 1 :]]) - reference
    exponentials = others.exp()
    values = (torch.tensor(reference), exponentials.sum(), logits[label] - reference, (exponentials * others).sum())
    return tuple(value.float().reshape(1) for value in values)


@pytest.mark.parametrize("offset", [-25.0, 0.0, 3.0, 25.0])
@pytest.mark.parametrize("label_logit", [-40.0, -3.0, 0.0, 2.0, 20.0, 60.0])
def test_against_float64(label_logit: float, offset: float) -> None:
    logits = torch.linspace(-4.0, 4.0, 50, dtype=torch.float64)
    logits[11] = label_logit
    lse = float(torch.logsumexp(logits, 0))
    rows = rows_from_sums(*sums_of(logits, 11, lse + offset))
    exact = torch.log_softmax(logits, 0)
    # The others' sum over the label's exponential: nothing is subtracted, unlike in torch's own softmax.
    odds = float((torch.cat([logits[:11], logits[12:]]) - label_logit).exp().sum())
    size = abs(offset) + 1.0
    assert float(rows.logsumexp) == pytest.approx(lse, rel=1e-6, abs=1e-6 * size)
    assert float(rows.logprobs) == pytest.approx(-math.log1p(odds), rel=1e-5 * size, abs=0.0)
    assert float(rows.label_complement) == pytest.approx(odds / (1.0 + odds), rel=1e-5 * size, abs=0.0)
    assert rows.entropy is not None
    assert float(rows.entropy) == pytest.approx(float(-(exact.exp() * exact).sum()), abs=2e-6 * size)


def test_a_certain_label_and_nothing_but_a_label() -> None:
    # Two words 50 nats apart: log p = -exp(-50), far below what 1 - p could show in float32.
    rows = rows_from_sums(*(torch.tensor([value]) for value in (10.0, math.exp(-50.0), 0.0, -50.0 * math.exp(-50.0))))
    assert float(rows.logprobs) == pytest.approx(-math.exp(-50.0), rel=1e-5)
    assert float(rows.label_complement) == pytest.approx(math.exp(-50.0), rel=1e-5)
    assert rows.entropy is not None
    assert float(rows.entropy) == pytest.approx(51.0 * math.exp(-50.0), rel=1e-5)
    alone = rows_from_sums(*(torch.tensor([value]) for value in (10.0, 0.0, 0.0, 0.0)))
    assert [float(column) for column in alone.tensors() if column is not None] == [10.0, 0.0, 0.0, 0.0, 0.0]


def test_no_entropy_unless_asked_for() -> None:
    assert rows_from_sums(torch.zeros(2), torch.ones(2), torch.zeros(2), None).entropy is None
