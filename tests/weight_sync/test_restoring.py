"""How SGLang's own words tell files that it does not see from files that it does not load."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.rollout.sglang import Expected, SglangEngine
from megatron_klear.weight_sync import EngineGroup
from megatron_klear.weight_sync.engines import Refusal
from megatron_klear.weight_sync.restoring import NOT_SEEN
from megatron_klear.weight_sync.transport import load_from_disk


def test_a_real_server_says_that_it_does_not_see_the_files(sglang_urls: dict[str, str], tmp_path: Path) -> None:
    expected = Expected(vocab_size=83, longest_sequence=64)
    engine = SglangEngine([sglang_urls["float32"]], SglangSettings(), expected, in_flight=1)
    try:
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(Refusal, match=NOT_SEEN):
                load_from_disk(EngineGroup([engine.engines[0].caller], 60.0), folder)
    finally:
        engine.close()
