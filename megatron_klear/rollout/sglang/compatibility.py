"""Whether a server serves our model: asked once, when it is connected, before anything depends on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_klear.errors import ConfigError
from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang.command import CONTEXT_MARGIN
from megatron_klear.rollout.sglang.connection import Connection, Refused

MINIMUM_VERSION = (0, 5, 21)
"""First release with weight-update sessions and versions per token; tests/rollout/sglang passed on it and on 0.5.23."""

ARCHITECTURE = "Qwen3ForCausalLM"

_ASK_SECONDS = 60.0
_NO_TOKEN = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a server must serve.

    Attributes:
        vocab_size: of the model.
        longest_sequence: prompt and response together, in tokens.
        deterministic: whether tokens must follow from seeds (sglang.deterministic).
        tokenizer_samples: texts and the token ids that our tokenizer makes of them, no special tokens added.
        architecture: class of the model; None takes any (a teacher of another family is only sampled from).
    """

    vocab_size: int
    longest_sequence: int
    deterministic: bool = False
    tokenizer_samples: Sequence[tuple[str, Sequence[int]]] = field(default=())
    architecture: str | None = ARCHITECTURE


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a server says of itself.

    Attributes:
        version: SGLang's version.
        device: `cpu`, `cuda`, ...; decides how it computes checksums.
        tp: tensor parallel size.
        dtype: data type as it was asked for, `auto` included.
        quantization: None, or the kind.
        incremental: whether its streams hold new tokens only.
        context_length: longest sequence, in tokens.
        model_path, weight_version: what it was started with, and what was published to it since.
    """

    version: str
    device: str
    tp: int
    dtype: str
    quantization: str | None
    incremental: bool
    context_length: int
    model_path: str = ""
    weight_version: str = ""


async def examine(connection: Connection, expected: Expected) -> EngineFacts:
    """Ask a server for what it is and compare that with what we need.

    Raises:
        ConfigError: it cannot be reached, is no SGLang, is too old, or serves another model; all problems at once.
    """
    server = await _asked(connection, "/server_info")
    model = await _asked(connection, "/model_info")
    problems: list[str] = []
    version = str(server.get("version", "unknown"))
    if _numbers(version) < MINIMUM_VERSION:
        least = ".".join(map(str, MINIMUM_VERSION))
        problems.append(f"its SGLang is {version}, needs {least} at least; update it with tools/setup_sglang.sh")
    architectures = model.get("architectures") or []
    wanted = expected.architecture
    if (wanted is not None and wanted not in architectures) or not model.get("is_generation", True):
        needed_model = wanted or "one that generates text"
        problems.append(f"it serves {', '.join(architectures) or 'no known model'}, needs {needed_model}")
    vocab_size = await _vocab_size(connection)
    if vocab_size is not None and vocab_size != expected.vocab_size:
        problems.append(f"its model has {vocab_size} tokens, ours has {expected.vocab_size} (model.vocab_size)")
    context_length = await _context_length(connection)
    needed = expected.longest_sequence + CONTEXT_MARGIN
    if context_length is not None and context_length < needed:
        problems.append(
            f"its context is {context_length} tokens, and prompt and response together take up to {needed} with a "
            f"margin of {CONTEXT_MARGIN} (data.max_prompt_tokens, rollout.max_response_tokens)"
        )
    if expected.deterministic and not server.get("enable_deterministic_inference"):
        problems.append(
            "it draws by chance, and sglang.deterministic is set; start it with --enable-deterministic-inference"
        )
    if not server.get("skip_tokenizer_init"):
        problems += await _tokenizer_problems(connection, expected)
    if problems:
        raise ConfigError([f"sglang.urls: {connection.name}: {problem}" for problem in problems])
    return EngineFacts(
        version=version,
        device=str(server.get("device", "cuda")),
        tp=int(server.get("tp_size", 1)),
        dtype=str(server.get("dtype", "auto")),
        quantization=server.get("quantization") or None,
        incremental=bool(server.get("incremental_streaming_output")),
        context_length=needed if context_length is None else context_length,
        model_path=str(model.get("model_path", "")),
        weight_version=str(model.get("weight_version", "")),
    )


async def _asked(connection: Connection, path: str) -> Mapping[str, Any]:
    try:
        answer = await connection.get(path, timeout_seconds=_ASK_SECONDS)
    except (EndpointError, Refused) as error:
        text = str(error) if isinstance(error, EndpointError) else f"{connection.name}: {path} answered {error}"
        raise ConfigError([f"sglang.urls: {text}; it must be a running SGLang server"]) from error
    if not isinstance(answer, Mapping):
        raise ConfigError([f"sglang.urls: {connection.name}: {path} answered no object; it must be an SGLang server"])
    return answer


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 5, 23) of `0.5.23.post1`; of anything unreadable nothing, which is below every version."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(int(number) for number in found.groups()) if found else ()


async def _vocab_size(connection: Connection) -> int | None:
    """The model's vocabulary, which SGLang tells only when it refuses a request; None if it does not.

    A bias on a token that no vocabulary has is refused before anything is computed.
    """
    body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "logit_bias": {str(_NO_TOKEN): 0.0}}}
    try:
        await connection.post("/generate", body, timeout_seconds=_ASK_SECONDS)
    except Refused as refusal:
        found = re.search(r"\[0, (\d+)\]", refusal.text)
        return int(found[1]) + 1 if found else None
    except EndpointError:
        return None
    return None


async def _context_length(connection: Connection) -> int | None:
    try:
        answer = await connection.get("/v1/models", timeout_seconds=_ASK_SECONDS)
        return int(answer["data"][0]["max_model_len"])
    except (Refused, EndpointError, KeyError, IndexError, TypeError, ValueError):
        return None


async def _tokenizer_problems(connection: Connection, expected: Expected) -> list[str]:
    """Texts that the server's tokenizer takes apart differently; a server that does not say has none to show."""
    for text, ours in expected.tokenizer_samples:
        body = {"prompt": text, "add_special_tokens": False}
        try:
            theirs = (await connection.post("/tokenize", body, timeout_seconds=_ASK_SECONDS))["tokens"]
        except (Refused, EndpointError, KeyError, TypeError):
            return []
        if list(theirs) != list(ours):
            return [f"its tokenizer makes {theirs} of {text!r}, ours makes {list(ours)} (tokenizer.dir)"]
    return []
