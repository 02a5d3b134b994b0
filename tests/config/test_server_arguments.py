"""What the program gives servers itself is not given by `sglang.extra_args`, too, which would overrule it."""

from __future__ import annotations

import pytest

from megatron_klear.config.server_arguments import own_arguments


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("--port", "set sglang.port"),
        ("--port=30000", "set sglang.port"),
        ("--tp", "set sglang.server_tp"),
        ("--tp=2", "set sglang.server_tp"),
        ("--tensor-parallel-size", "set sglang.server_tp"),
        ("--model", "servers start from model.*"),
        ("--model-path=/model", "servers start from model.*"),
        ("--mem-frac", "set sglang.memory_fraction"),
        ("--context-length", "it follows from data.max_prompt_tokens and rollout.max_response_tokens"),
    ],
)
def test_an_option_of_the_program_is_found_in_every_form(argument: str, instead: str) -> None:
    assert list(own_arguments(["--enable-metrics", argument, "3"])) == [(argument, instead)]


def test_other_options_and_values_are_left_alone() -> None:
    others = [
        "--model-loader-extra-config",
        "{}",
        "--attention-backend",
        "fa3",
        "--device-ids",
        "port",
        "-h",
        "--",
        "=3",
    ]
    assert list(own_arguments(others)) == []


def test_they_are_refused_with_the_settings(problems) -> None:
    given = "sglang.extra_args=[--enable-metrics,--port=3,--dtype,half]"
    found = problems("rollout.engine=sglang", given)
    assert [text for text in found if text.startswith("sglang.extra_args: ")] == [
        "sglang.extra_args: got --port=3, which the program gives each server itself; set sglang.port",
        "sglang.extra_args: got --dtype, which the program gives each server itself; set sglang.dtype",
    ]
    assert problems("rollout.engine=sglang", given, "sglang.urls=[http://a:1]") == [], "others start these servers"
