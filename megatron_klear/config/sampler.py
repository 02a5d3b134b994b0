"""Settings of a model that is only sampled from: a teacher, a judge of difficulty, a model under evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.fields import SECTION, NonNegative, NonNegativeFloat, Responses, Seconds, Tokens, Unit
from megatron_klear.config.server_url import is_server_url


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SamplerSettings:
    """A model and how responses are drawn from it; every response is kept on disk and never drawn again."""

    hf_dir: str | None = None
    """Hugging Face directory with config.json and the tokenizer, for a local engine also the weights (a Qwen3)."""

    engine: Literal["local", "sglang"] = "local"
    """A transformers model inside this process, or SGLang servers that run already."""

    urls: tuple[str, ...] = ()
    """Servers of the engine sglang, as http://HOST:PORT, all with the same weights; they may serve any model."""

    weights_name: str = ""
    """Part of what responses are found by; change it when servers get other weights under the same model path."""

    cache: str | None = None
    """File with the responses; null keeps them in the run's directory."""

    responses: Responses = 16
    """Responses per prompt (the paper: up to 16 of the teacher, 16 to judge a problem by)."""

    temperature: NonNegativeFloat = 0.6
    """Sampling temperature; 0 is greedy, and all responses to a prompt are then the same."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Probability mass that is sampled from."""

    max_prompt_tokens: Tokens = 2048
    """Longest prompt, chat template included; rows with longer ones are rejected."""

    max_response_tokens: Tokens = 30720
    """Longest response."""

    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response, by their text, besides those of the tokenizer and of the directory's eos_token_id."""

    batch_responses: Responses = 64
    """Responses that one engine generates at a time; each server is one engine."""

    chunk_responses: Responses = 1024
    """Missing responses that are asked for in one go; so many are in memory at once."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a local engine computes; auto takes a GPU when there is one."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of a local engine's weights and cache."""

    idle_seconds: Seconds = 600.0
    """How long a response from a server may go without a new token before it is given up."""

    retries: Annotated[int, Unit("retries"), NonNegative] = 3
    """How often a response is asked for again after a failure that may pass."""


def sampler_problems(settings: SamplerSettings, section: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) for everything that keeps a sampler from working.

    Args:
        settings: the section, valid field by field.
        section: its name.
    """
    if settings.hf_dir is None:
        yield f"{section}.hf_dir", "names no directory; give one with config.json and the tokenizer"
    elif not Path(settings.hf_dir).is_dir():
        yield f"{section}.hf_dir", f"no directory {settings.hf_dir}"
    else:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            if not (Path(settings.hf_dir) / name).is_file():
                yield f"{section}.hf_dir", f"no {name} in {settings.hf_dir}"
        if settings.engine == "local" and not any(Path(settings.hf_dir).glob("*.safetensors")):
            yield f"{section}.hf_dir", f"no *.safetensors in {settings.hf_dir}, which {section}.engine=local needs"
    if settings.engine == "sglang" and not settings.urls:
        yield f"{section}.urls", f"names no server, and {section}.engine is sglang"
    if settings.engine == "local" and settings.urls:
        yield f"{section}.urls", f"names servers, but {section}.engine is local; set it to sglang"
    for url in settings.urls:
        if not is_server_url(url):
            yield f"{section}.urls", f"got {url!r}, must be http://HOST:PORT"
    for url in sorted({url for url in settings.urls if settings.urls.count(url) > 1}):
        yield f"{section}.urls", f"{url} is named more than once"
