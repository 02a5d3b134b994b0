"""What an SGLang server must be started with to serve a run, whoever starts it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_klear.config.schema import Entry, Settings

ONLINE_FP8 = "flash_rl"
"""SGLang's load format (0.5.23, `model_loader/loader.py`) by which a server that quantises takes unquantised weights
again: with any other its weights have lost what loads them."""

CONTEXT_MARGIN = 8
"""Tokens of its context that SGLang does not fill: it refuses or cuts short what comes closer (6 in 0.5.23)."""


def longest_sequence(settings: Settings, entry: Entry) -> int:
    """Most tokens of a prompt and its response, in training and evaluations."""
    evaluated = settings.evaluation.max_response_tokens or settings.rollout.max_response_tokens
    trained = settings.rollout.max_response_tokens if entry == "rl" else 0
    return settings.data.max_prompt_tokens + max(evaluated if settings.data.heldout else 0, trained)


def server_options(settings: Settings, entry: Entry) -> list[str]:
    """Options of `sglang.launch_server` by which a server at `sglang.urls` fits the run.

    By default it has no more context than the model's positions, repeats all tokens of a response in every chunk of its
    stream, and takes data type and rotary embedding from its model's config.json. No option has a space in it.
    """
    sglang, arch = settings.sglang, settings.architecture
    options = [
        *("--context-length", str(longest_sequence(settings, entry) + CONTEXT_MARGIN)),
        "--incremental-streaming-output",
        *("--dtype", settings.model.dtype if sglang.dtype == "auto" else sglang.dtype),
        *("--max-running-requests", str(settings.rollout.batch_responses)),
    ]
    if sglang.deterministic:
        options.append("--enable-deterministic-inference")
    if sglang.quantization != "none":
        options += ["--quantization", sglang.quantization, "--load-format", ONLINE_FP8]
    yarn = settings.yarn.in_servers(arch, entry)
    if yarn is not None:
        laid_over = json.dumps({"rope_scaling": yarn.hf_scaling()}, separators=(",", ":"))
        options += ["--json-model-override-args", laid_over]
    return options
