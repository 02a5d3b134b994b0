from __future__ import annotations

import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.rollout import SamplingParams


def test_edges_of_the_ranges_are_accepted() -> None:
    greedy = SamplingParams(temperature=0.0, top_p=1.0, max_response_tokens=1, stop_token_ids=())
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)
    assert SamplingParams(temperature=3.5, top_p=1e-6, max_response_tokens=9, stop_token_ids=(1, 2)).top_p == 1e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("max_response_tokens", 0),
    ],
)
def test_out_of_range_values_are_refused_by_name(name: str, value: float) -> None:
    good = {"temperature": 1.0, "top_p": 1.0, "max_response_tokens": 4, "stop_token_ids": ()}
    with pytest.raises(RolloutError, match=f"{name} is"):
        SamplingParams(**(good | {name: value}))


def test_all_problems_come_at_once() -> None:
    with pytest.raises(RolloutError) as caught:
        SamplingParams(temperature=-1.0, top_p=2.0, max_response_tokens=-3, stop_token_ids=())
    assert all(name in str(caught.value) for name in ("temperature", "top_p", "max_response_tokens"))
