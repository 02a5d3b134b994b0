"""Whether a server serves our model: asked once, when it is connected, before anything depends on it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_klear.config.server_options import CONTEXT_MARGIN
from megatron_klear.config.yarn import Yarn
from megatron_klear.errors import ConfigError
from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang.connection import Connection, Refused
from megatron_klear.rollout.sglang.dtypes import served_dtype
from megatron_klear.rollout.sglang.ends import ends_problem
from megatron_klear.rollout.sglang.rotary import rotary_problem
from megatron_klear.rollout.sglang.sizes import sizes_problem
from megatron_klear.rollout.sglang.updatable import update_problems
from megatron_klear.rollout.sglang.vocabulary import vocab_size

MINIMUM_VERSION = (0, 5, 21)
"""First release with weight-update sessions and versions per token; tests/rollout/sglang passed on it and on 0.5.23."""

ARCHITECTURE = "Qwen3ForCausalLM"

_ASK_SECONDS = 60.0


class Unreachable(ConfigError):
    """A server gave no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a server must serve.

    Attributes:
        vocab_size: of the model.
        longest_sequence: prompt and response together, in tokens.
        deterministic: whether tokens must follow from seeds (sglang.deterministic).
        tokenizer_samples: texts and the token ids that our tokenizer makes of them, no special tokens added.
        architecture: class of the model; None takes any (a teacher of another family is only sampled from).
        sizes: config.json of the model whose sizes it must have; None takes any.
        yarn: of its rotary embedding, None for none; `any` takes whatever it has.
        stop_ids: the only ids that may end a response; None takes whatever it has.
        verify: setting `weight_sync.verify`, where weights are published to it; None where it is only sampled from.
        setting: names in messages where the servers come from.
    """

    vocab_size: int
    longest_sequence: int
    deterministic: bool = False
    tokenizer_samples: Sequence[tuple[str, Sequence[int]]] = field(default=())
    architecture: str | None = ARCHITECTURE
    sizes: Mapping[str, Any] | None = None
    yarn: Yarn | Literal["any"] | None = "any"
    stop_ids: Collection[int] | None = None
    verify: str | None = None
    setting: str = "sglang.urls"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a server says of itself.

    Attributes:
        version: SGLang's version.
        device: `cpu`, `cuda`, ...; decides how it computes checksums.
        tp: tensor parallel size.
        dtype: data type of its weights; `auto` where nothing tells.
        quantization: None, or the kind.
        incremental: whether its streams hold new tokens only.
        context_length: longest sequence, in tokens.
        most_running: requests that it generates for at a time; None when it does not tell.
        model_path, weight_version: what it was started with, and what was published to it since.
        overrides: what was laid over its config.json, as JSON; YaRN among it.
    """

    version: str
    device: str
    tp: int
    dtype: str
    quantization: str | None
    incremental: bool
    context_length: int
    most_running: int | None = None
    model_path: str = ""
    weight_version: str = ""
    overrides: str = ""


async def examine(connection: Connection, expected: Expected) -> EngineFacts:
    """Ask a server for what it is and compare that with what we need.

    Raises:
        ConfigError: it is no SGLang, is too old, or serves another model; all problems at once. Or what it tells of
            itself cannot be read.
        Unreachable: it gives no answer.
    """
    server = await _asked(connection, "/server_info", expected.setting)
    model = await _asked(connection, "/model_info", expected.setting)
    try:
        return await _judged(connection, expected, server, model)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        text = f"/server_info or /model_info cannot be read: {type(error).__name__}: {error}"
        raise ConfigError(
            [f"{expected.setting}: {connection.name}: {text}; it must be a running SGLang server"]
        ) from error


async def _judged(
    connection: Connection, expected: Expected, server: Mapping[str, Any], model: Mapping[str, Any]
) -> EngineFacts:
    """Compare what a server says of itself with what we need; values in it may be of any kind.

    Raises:
        ConfigError: as `examine`.
        ValueError, TypeError, AttributeError, LookupError: a value is of a kind that SGLang never tells.
    """
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
    tokens = await vocab_size(connection, server, model)
    if tokens is not None and tokens != expected.vocab_size:
        problems.append(f"its model has {tokens} tokens, ours has {expected.vocab_size} (model.vocab_size)")
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
    if expected.sizes is not None and ARCHITECTURE in architectures:
        problem = sizes_problem(connection.name, server, model, expected.sizes)
        problems += [] if problem is None else [problem]
    if expected.yarn != "any":
        problem = rotary_problem(connection.name, server, model, expected.yarn)
        problems += [] if problem is None else [problem]
    if expected.stop_ids is not None:
        problem = ends_problem(connection.name, server, model, expected.stop_ids)
        problems += [] if problem is None else [problem]
    if expected.verify is not None:
        problems += update_problems(server, expected.verify)
    if model.get("preferred_sampling_params"):
        problems.append(
            f"it adds {model['preferred_sampling_params']} to what requests ask for; start it without "
            "--preferred-sampling-params"
        )
    if not server.get("skip_tokenizer_init"):
        problems += await _tokenizer_problems(connection, expected)
    if problems:
        raise ConfigError([f"{expected.setting}: {connection.name}: {problem}" for problem in problems])
    return EngineFacts(
        version=version,
        device=str(server.get("device", "cuda")),
        tp=int(server.get("tp_size", 1)),
        dtype=served_dtype(server, model),
        quantization=server.get("quantization") or None,
        incremental=bool(server.get("incremental_streaming_output")),
        context_length=needed if context_length is None else context_length,
        most_running=_most_running(server),
        model_path=str(model.get("model_path", "")),
        weight_version=str(model.get("weight_version", "")),
        overrides=str(server.get("json_model_override_args") or ""),
    )


async def _asked(connection: Connection, path: str, setting: str) -> Mapping[str, Any]:
    try:
        answer = await connection.get(path, timeout_seconds=_ASK_SECONDS)
    except EndpointError as error:
        kind = ConfigError if error.malformed else Unreachable  # what answers something else never will be one
        raise kind([f"{setting}: {error}; it must be a running SGLang server"]) from error
    except Refused as error:
        text = f"{connection.name}: {path} answered {error}"
        raise ConfigError([f"{setting}: {text}; it must be a running SGLang server"]) from error
    if not isinstance(answer, Mapping):
        raise ConfigError([f"{setting}: {connection.name}: {path} answered no object; it must be an SGLang server"])
    return answer


def _most_running(server: Mapping[str, Any]) -> int | None:
    """Of all data-parallel parts of a server together; what it was asked for, where it does not tell what it does."""
    states = server.get("internal_states")
    told = [s.get("effective_max_running_requests_per_dp") for s in states or () if isinstance(s, Mapping)]
    counts = [count for count in told or [server.get("max_running_requests")] if isinstance(count, int) and count > 0]
    return sum(counts) or None


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 5, 23) of `0.5.23.post1`; of anything unreadable nothing, which is below every version."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(int(number) for number in found.groups()) if found else ()


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
            theirs = list((await connection.post("/tokenize", body, timeout_seconds=_ASK_SECONDS))["tokens"])
        except (Refused, EndpointError, KeyError, TypeError):
            return []
        if theirs != list(ours):
            return [f"its tokenizer makes {theirs} of {text!r}, ours makes {list(ours)} (tokenizer.dir)"]
    return []
