"""A real server gets weights back: its own words for files that it does not see, and what it may hold meanwhile."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_klear.config.serving import SglangSettings
from megatron_klear.conformance.compare import architecture
from megatron_klear.conformance.reference import reference_model
from megatron_klear.errors import RolloutError
from megatron_klear.model import hf_config
from megatron_klear.records import Prompt
from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.sglang import Expected, SglangEngine
from megatron_klear.weight_sync import EngineGroup, WeightFiles
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import Refusal
from megatron_klear.weight_sync.restoring import NOT_SEEN, restore
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


def test_a_real_server_that_was_left_paused_in_place_with_a_response_takes_weights(
    sglang_urls: dict[str, str], tmp_path: Path
) -> None:
    """It dropped out of a publish that leaves responses in place: what it held must not keep it from coming back."""
    arch = architecture(tied=False)
    files = WeightFiles(tmp_path, hf_config(arch, dtype="float32"), keep=1)
    files.begin(7)
    weights = {name: tensor.contiguous() for name, tensor in reference_model(arch, seed=7).state_dict().items()}
    files.write(Bucket(names=tuple(weights), tensors=tuple(weights.values())))
    directory = files.complete()
    expected = Expected(vocab_size=83, longest_sequence=64)
    engine = SglangEngine([sglang_urls["float32"]], SglangSettings(stream_interval=1), expected, in_flight=16)
    group = EngineGroup([engine.engines[0].caller], 60.0)
    prompt = Prompt(prompt_id="p", domain="math", token_ids=np.arange(4), reference="")
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=56, stop_token_ids=())
    begun = threading.Event()

    def draw() -> None:
        with suppress(RolloutError):  # some are of two versions, and nobody asks
            engine.generate(
                [prompt], num_responses=64, sampling=sampling, seed=1, on_progress=lambda progress: begun.set()
            )

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        assert begun.wait(60)
        group.call("/pause_generation", {"mode": "in_place"})
        with pytest.raises(Refusal, match="flush_cache"):  # it holds responses
            group.call("/flush_cache", {})
        scores = []

        def prove() -> None:
            scores.append(engine.score(engine.engines[0], np.arange(20), timeout_seconds=60.0))

        restore(group, directory, version=7, expected=None, prove=prove, sent_to_tp=1)
        assert engine.answering(7) == [0]
        with torch.inference_mode():
            logits = reference_model(arch, seed=7)(torch.arange(20)[None]).logits[0].double()
        theirs = torch.log_softmax(logits, -1)[:-1].gather(-1, torch.arange(1, 20)[:, None])[:, 0]
        np.testing.assert_allclose(scores[0][1:], theirs, atol=1e-4)
    finally:
        group.call("/continue_generation", {})
        drawing.join(120)
        engine.close()
    assert not drawing.is_alive()
