"""SGLang's own rotary embedding, made from the config that its servers are started with, against transformers'."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megatron_klear.config import PRESETS
from megatron_klear.config.serving import SglangSettings
from megatron_klear.config.yarn import Yarn
from megatron_klear.model import hf_config

EVERY = 997


def test_cosines_and_sines_up_to_80k_are_those_of_transformers(sglang_settings: SglangSettings, tmp_path: Path) -> None:
    yarn = Yarn(factor=2.5, original_positions=32768)
    config = hf_config(PRESETS["qwen3-8b"], yarn=yarn)
    (tmp_path / "config.json").write_text(json.dumps(config))
    python = Path(sglang_settings.venv) / "bin" / "python"
    probe = Path(__file__).with_name("rope_probe.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [python, probe, tmp_path, tmp_path / "theirs.pt", str(EVERY)],
        env=environment, check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    theirs = torch.load(tmp_path / "theirs.pt")
    positions = torch.arange(0, yarn.positions, EVERY)
    assert len(theirs) == len(positions)
    assert int(positions[-1]) > 80_000
    cos, sin = Qwen3RotaryEmbedding(Qwen3Config.from_dict(config))(torch.zeros(1), positions[None])
    # Angles of up to 80,000 in float32: one rounding of the product is 80,000 * 2^-24 of a radian.
    bound = {"rtol": 0.0, "atol": 2 * 80_000 * 2**-24}
    torch.testing.assert_close(theirs[:, :64], cos[0, :, :64], **bound)
    torch.testing.assert_close(theirs[:, 64:], sin[0, :, :64], **bound)
