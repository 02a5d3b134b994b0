"""What a run asks of the servers at `sglang.urls` before it begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klear import parallel
from megatron_klear.config import ParallelSettings, Settings
from megatron_klear.config.architecture import ModelSettings
from megatron_klear.config.schema import RunSettings, TokenizerSettings
from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError
from megatron_klear.model import hf_config
from megatron_klear.parallel import FirstRank
from megatron_klear.records import ParallelContext
from megatron_klear.session.server_start import ServerStart
from tests.rollout.sglang.conftest import VOCAB, StandIn, standing_in


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with standing_in() as made:
        made.answers["/v1/models"] = {"data": [{"max_model_len": 2**20}]}
        yield made


@pytest.fixture
def start(stand_in: StandIn, context: ParallelContext, tmp_path: Path) -> Iterator[ServerStart]:
    """Of a run whose model the stand-in serves."""
    settings = Settings(
        run=RunSettings(dir=str(tmp_path)),
        tokenizer=TokenizerSettings(dir=str(tmp_path)),
        model=ModelSettings(preset="qwen3-tiny", vocab_size=VOCAB),
        sglang=SglangSettings(urls=(stand_in.url,)),
    )
    chat = SimpleNamespace(hf=lambda text, **_: {"input_ids": [1]}, stop_ids=(3,))
    session: Any = SimpleNamespace(settings=settings, entry="rl", arch=settings.architecture, chat=chat)
    machines: Any = None  # asked for nothing where servers run already
    stand_in.answers["/model_info"] |= {"model_path": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(settings.architecture)))
    made = ServerStart(session, machines, FirstRank(context, silence_seconds=5.0))
    yield made
    made.close()


def test_a_server_of_our_model_is_taken(start: ServerStart) -> None:
    assert start.start(lambda count: None).dtype == "float32"


def test_a_server_of_another_size_is_refused_before_the_first_publish_would_end_it(
    start: ServerStart, stand_in: StandIn
) -> None:
    stand_in.answers["/server_info"] |= {"json_model_override_args": json.dumps({"num_hidden_layers": 5})}
    with pytest.raises(ConfigError, match=r"num_hidden_layers 5, ours 4 \(model.num_layers\)"):
        start.start(lambda count: None)
