"""A server that splits the model over two tensor ranks: each gets every bucket, and holds its share of each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_klear.config.serving import SglangSettings
from megatron_klear.conformance.compare import architecture
from megatron_klear.model import hf_config
from megatron_klear.rollout.sglang import ServerFleet
from tests.conftest import SGLANG_LONGEST
from tests.weight_sync.test_publish import DAMAGED, check_equal

ACTIONS: list[dict[str, Any]] = [
    {"transport": "tensor", "version": 1},
    {"transport": "shared", "version": 2, "ranks": [0, 1]},
    {"transport": "distributed", "version": 3},
    {"transport": "disk", "version": 4},
    {"transport": "tensor", "version": 5, "corrupt": DAMAGED},
    {"transport": "tensor", "version": 6, "corrupt": DAMAGED, "element": -1},
    {"transport": "value", "version": 7},
]


def test_two_tensor_ranks_publish_to_a_server_of_two(
    publish: Any, sglang_settings: SglangSettings, tmp_path: Path
) -> None:
    settings = SglangSettings(venv=sglang_settings.venv, start_seconds=sglang_settings.start_seconds, server_tp=2)
    with ServerFleet(
        settings, hf_config(architecture(tied=False), dtype="float32"), tmp_path, dtype="float32", on_cpu=True,
        batch_responses=16, longest_sequence=SGLANG_LONGEST,
    ) as fleet:  # fmt: skip
        (url,) = fleet.start_all()
        results = publish(ACTIONS, tp=2, url=url, server_tp=2)
    for action, result in zip(ACTIONS, results, strict=True):
        if "corrupt" not in action:
            check_equal(result, action["version"])
    # The first element is in the first rank's share and the last in the second's, of what SGLang holds as one tensor.
    for rank, result in enumerate(results[4:6]):
        assert result["error"] == "WeightSyncError"
        whose = f"({url}), rank {rank}: 1 differ: model.layers.2.mlp.gate_up_proj.weight"
        assert result["text"].endswith(whose)
        assert result["text"].count("differ") == 1, "the other rank's share is whole"
