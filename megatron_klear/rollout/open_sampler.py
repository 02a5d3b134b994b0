"""A sampler from its settings: tokenizer, engine, fingerprint of the model, and the file with its responses."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_klear.config.sampler import SamplerSettings
from megatron_klear.config.serving import SglangSettings
from megatron_klear.config.yarn import Yarn
from megatron_klear.data import ChatTokenizer, load_chat_tokenizer
from megatron_klear.errors import CheckpointError, ConfigError
from megatron_klear.records import Domain, Prompt
from megatron_klear.rollout.cached import CachedSampler, ResponseSource
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.response_cache import ResponseCache

if TYPE_CHECKING:
    import torch

    from megatron_klear.rollout.sglang import EngineFacts

log = logging.getLogger(__name__)

_SAMPLE_TEXTS = ("The quick brown fox, 12345.", "x^2 + y^2 = z^2\n")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A model to draw text from.

    Attributes:
        chat: its tokenizer.
        responses: draws, and remembers.
    """

    chat: ChatTokenizer
    responses: CachedSampler

    def prompt(self, prompt_id: str, domain: Domain, messages: Sequence[dict[str, str]]) -> Prompt:
        """A conversation that ends with a question, as the engine takes it.

        Raises:
            ConversationError: the chat template refuses it.
        """
        return Prompt(
            prompt_id=prompt_id, domain=domain, token_ids=self.chat.encode_prompt(list(messages)), reference=""
        )


@contextmanager
def open_sampler(
    settings: SamplerSettings,
    *,
    section: str,
    cache: Path,
    seed: int,
    config_changes: Mapping[str, Any] | None = None,
    servers_yarn: Yarn | Literal["any"] = "any",
) -> Iterator[Sampler]:
    """Load tokenizer and engine, and open the file with the responses; all is closed at the end.

    Args:
        settings: the model and how to draw from it.
        section: name of these settings, for messages.
        cache: file with the responses where the settings name none.
        seed: of all responses.
        config_changes: keys of the model's config.json that a local engine takes otherwise, such as `rope_parameters`.
        servers_yarn: what servers must compute with; `any` takes whatever they have.

    Raises:
        ConfigError, DataError, CheckpointError: the model's directory or a server is not what it must be.
        RolloutError: the engine cannot run the model, or the cache cannot be used.
    """
    assert settings.hf_dir is not None
    directory = Path(settings.hf_dir)
    chat = load_chat_tokenizer(directory, stop_tokens=settings.stop_tokens, model_dir=directory)
    sampling = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_response_tokens=settings.max_response_tokens,
        stop_token_ids=chat.stop_ids,
    )
    with (
        ResponseCache(settings.cache or cache, setting=f"{section}.cache") as stored,
        _engine(settings, section, chat, config_changes or {}, servers_yarn) as (engine, fingerprint),
    ):
        chunk = settings.chunk_responses
        responses = CachedSampler(
            engine, stored, model=fingerprint, sampling=sampling, seed=seed, chunk_responses=chunk
        )
        yield Sampler(chat=chat, responses=responses)


@contextmanager
def _engine(
    settings: SamplerSettings,
    section: str,
    chat: ChatTokenizer,
    config_changes: Mapping[str, Any],
    servers_yarn: Yarn | Literal["any"],
) -> Iterator[tuple[ResponseSource, str]]:
    """The engine, and the fingerprint of what it runs."""
    if settings.engine == "sglang":
        with _servers(settings, section, chat, servers_yarn) as found:
            yield found
        return
    import torch

    from megatron_klear.rollout.local import LocalEngine

    directory = Path(settings.hf_dir or "")
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    vocab_size = _vocab_size(directory, section)
    config = {**json.loads((directory / "config.json").read_text(encoding="utf-8")), **config_changes}
    if chat.num_tokens > vocab_size:
        raise ConfigError(
            [f"{section}.hf_dir: its tokenizer has {chat.num_tokens} tokens, its model {vocab_size} embeddings"]
        )
    engine = LocalEngine(
        config, device=device, dtype=getattr(torch, settings.dtype), batch_responses=settings.batch_responses
    )
    engine.update_weights(_weights(directory), version=0)
    try:
        changed = f" {json.dumps(config_changes, sort_keys=True)}" if config_changes else ""
        yield engine, directory_fingerprint(directory, dtype=settings.dtype) + changed
    finally:
        engine.close()


def _weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a directory of safetensors files; the engine says what is missing or does not fit.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (a safetensors handle, not a dict)
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a safetensors file, or cut short: {error}") from error


def directory_fingerprint(directory: Path, *, dtype: str) -> str:
    """A digest of a model's config and of all bytes of its weights, and the data type it is computed in.

    Reads every byte (16 GB of an 8B in well under a minute from a local disk), since weights of a later checkpoint
    have the same names, shapes and sizes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        digest.update(f"\0{file.name}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                digest.update(block)
    return f"local {dtype} {digest.hexdigest()}"


@contextmanager
def _servers(
    settings: SamplerSettings, section: str, chat: ChatTokenizer, yarn: Yarn | Literal["any"]
) -> Iterator[tuple[ResponseSource, str]]:
    from megatron_klear.rollout.sglang import Expected, SglangEngine

    directory = Path(settings.hf_dir or "")
    encode = chat.hf
    expected = Expected(
        vocab_size=_vocab_size(directory, section),
        longest_sequence=settings.max_prompt_tokens + settings.max_response_tokens,
        tokenizer_samples=[(text, encode(text, add_special_tokens=False)["input_ids"]) for text in _SAMPLE_TEXTS],
        architecture=None,
        yarn=yarn,
        stop_ids=chat.stop_ids,
    )
    client = SglangSettings(urls=settings.urls, idle_seconds=settings.idle_seconds, retries=settings.retries)
    try:
        engine = SglangEngine(settings.urls, client, expected, in_flight=settings.batch_responses)
    except ConfigError as error:
        raise ConfigError([_own_names(problem, section) for problem in error.problems]) from error
    try:
        yield engine, _servers_fingerprint([e.facts for e in engine.engines], settings, section)
    finally:
        engine.close()


def _servers_fingerprint(facts: Sequence[EngineFacts], settings: SamplerSettings, section: str) -> str:
    """What the servers say of their model, and a digest of its files where their folder can be read from here.

    Else other weights under the same path cannot be told from the old ones, and a line in the log says so.

    Raises:
        ConfigError: they do not say the same.
    """
    told = [
        [
            f.model_path,
            f.weight_version,
            f.dtype,
            str(f.quantization),
            f.overrides,
            str(f.context_length),
            settings.weights_name,
        ]
        for f in facts
    ]
    for url, mine in zip(settings.urls, told, strict=True):
        if mine != told[0]:
            raise ConfigError(
                [f"{section}.urls: {url} serves {mine[:6]}, but {settings.urls[0]} serves {told[0][:6]}; all must "
                 "serve the same weights"]
            )  # fmt: skip
    folder = Path(facts[0].model_path)
    files = ""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        files = directory_fingerprint(folder, dtype=facts[0].dtype)
    else:
        log.warning(
            "%s.urls: the servers' model %s cannot be read from here, so other weights under this name would "
            "not be noticed; change %s.weights_name whenever the servers get other weights, or kept "
            "responses pass for theirs",
            section, folder, section,
        )  # fmt: skip
    return "sglang " + json.dumps([*told[0], files])


def _vocab_size(directory: Path, section: str) -> int:
    try:
        return int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{section}.hf_dir: no vocab_size in {directory / 'config.json'}: {error}"]) from error


def _own_names(text: str, section: str) -> str:
    """A message of the shared client in the names of this sampler's settings."""
    named = {
        "sglang.": f"{section}.",
        "data.max_prompt_tokens": f"{section}.max_prompt_tokens",
        "rollout.max_response_tokens": f"{section}.max_response_tokens",
        "rollout.stop_tokens": f"{section}.stop_tokens",
        "model.vocab_size": f"{section}.hf_dir",
        "model.hf_dir": f"{section}.hf_dir",
        "tokenizer.dir": f"{section}.hf_dir",
    }
    for theirs, ours in named.items():
        text = text.replace(theirs, ours)
    return text
