"""A rollout engine inside the training process: transformers' Qwen3 with a batched decode loop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megatron_klear.errors import RolloutError, WeightSyncError
from megatron_klear.records import Prompt, Rollout, RolloutGroup
from megatron_klear.rollout.decoding import ContinuousDecoder, FinishedResponse
from megatron_klear.rollout.engine import ProgressCallback, RolloutCallback, RolloutProgress, SamplingParams
from megatron_klear.rollout.sharding import require_unique_ids
from megatron_klear.rollout.slot_cache import ATTENTION_NAME
from megatron_klear.rollout.weights import load_weights

_STEPS_BETWEEN_PROGRESS = 32
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class LocalEngine:
    """Generates with transformers' Qwen3ForCausalLM; implements `RolloutEngine`.

    It holds no weights until the first `update_weights`, and refuses to generate before. Nothing here touches the
    global random generators.

    Args:
        hf_config: a Hugging Face config as a mapping, or a directory that holds a `config.json`.
        device: where model and cache live.
        dtype: of weights and cache; logits become float32 before anything is drawn.
        batch_responses: most responses generated at a time (setting rollout.batch_responses).
        prefill_tokens: most prompt tokens of one forward pass, padding included.

    Raises:
        RolloutError: a config that is unreadable, is not Qwen3's, or uses sliding windows or a batch-dependent RoPE.
    """

    def __init__(
        self,
        hf_config: Mapping[str, Any] | str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_responses: int = 64,
        prefill_tokens: int = 8192,
    ) -> None:
        if batch_responses < 1:
            raise RolloutError(f"rollout.batch_responses is {batch_responses}; it must be at least 1")
        self._batch_responses = batch_responses
        self._prefill_tokens = prefill_tokens
        self._model: Qwen3ForCausalLM | None = _empty_model(_read_config(hf_config), torch.device(device), dtype)
        self._policy_version = -1
        self._unusable = "it has received no weights yet (update_weights)"

    @property
    def policy_version(self) -> int:
        """Version of the last complete set of weights; -1 before the first."""
        return self._policy_version

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Take a full set of weights under their Hugging Face names.

        They are written as they arrive, without a second copy. If anything is wrong the engine keeps its version
        and refuses to generate until a complete set has arrived.

        Args:
            named_tensors: (name, tensor) for every parameter; any dtype and device.
            version: above the current one.

        Raises:
            WeightSyncError: missing, unknown, repeated, misshapen or non-finite tensors, all by name; or a version
                that does not go up (then the stream is not read and the engine stays as it was).
        """
        if self._model is None:
            raise WeightSyncError("the rollout engine was closed; it takes no more weights")
        if version <= self._policy_version:
            raise WeightSyncError(
                f"the rollout engine has weights of version {self._policy_version} and was sent version {version}; "
                "versions must go up"
            )
        self._unusable = f"its update to version {version} did not complete, so its weights are a mixture"
        load_weights(self._model, named_tensors)
        self._unusable = ""
        self._policy_version = version

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        on_progress: ProgressCallback | None = None,
        on_rollout: RolloutCallback | None = None,
    ) -> list[RolloutGroup]:
        """Draw `num_responses` responses to each prompt, in the order of `prompts`.

        The randomness of a token depends only on (seed, prompt_id, index of the response, index of the token): the
        same call gives the same result, and a different batch size or set of neighbours changes it only where
        floating-point rounding moves a probability across the drawn number.

        Args:
            num_responses: M, at least 1.
            sampling: temperature, nucleus, length and stop tokens.
            seed: any integer; give each step its own.
            on_progress: called from time to time and at the end.
            on_rollout: called with every response when it is complete.

        Raises:
            RolloutError: no usable weights, a request that does not fit the model, or weights that have diverged.
        """
        if self._model is None or self._unusable:
            raise RolloutError(f"the rollout engine cannot generate: {self._unusable}")
        _check_request(self._model.config, prompts, num_responses, sampling)
        if not prompts:
            return []
        decoder = ContinuousDecoder(
            self._model,
            prompts,
            num_responses=num_responses,
            sampling=sampling,
            seed=seed,
            num_slots=self._batch_responses,
            prefill_tokens=self._prefill_tokens,
        )
        finished: dict[tuple[int, int], FinishedResponse] = {}
        total = num_responses * len(prompts)
        for step, responses in enumerate(decoder.run()):
            finished.update({(r.prompt_index, r.response_index): r for r in responses})
            if on_rollout is not None:
                for response in responses:
                    on_rollout(prompts[response.prompt_index], response.response_index, self._rollout(response))
            if on_progress is not None and (responses or step % _STEPS_BETWEEN_PROGRESS == 0):
                on_progress(
                    RolloutProgress(
                        finished_responses=len(finished),
                        total_responses=total,
                        generated_tokens=decoder.generated_tokens,
                    )
                )
        return [
            RolloutGroup(
                prompt=prompt,
                rollouts=tuple(self._rollout(finished[index, response]) for response in range(num_responses)),
            )
            for index, prompt in enumerate(prompts)
        ]

    @contextmanager
    def other_positions(self, hf_config: Mapping[str, Any]) -> Iterator[None]:
        """Compute with the rotary embedding and the number of positions of another config for a while.

        Weights know nothing of positions, and no keys are kept between two calls of `generate`.

        Args:
            hf_config: a Hugging Face config of the same sizes.

        Raises:
            RolloutError: a config that cannot be used.
        """
        if self._model is None:
            raise RolloutError(f"the rollout engine cannot generate: {self._unusable}")
        other, before = _read_config(hf_config), self._model.config
        embedding = self._model.model.rotary_emb
        other._attn_implementation = before._attn_implementation
        self._model.model.rotary_emb = _rotary_embedding(other, self._model.lm_head.weight.device)
        self._model.config = other
        try:
            yield
        finally:
            if self._model is not None:
                self._model.config, self._model.model.rotary_emb = before, embedding

    def close(self) -> None:
        """Release the model; a second call does nothing."""
        self._model = None
        self._unusable = "it was closed"

    def _rollout(self, response: FinishedResponse) -> Rollout:
        return Rollout(
            response_ids=response.token_ids,
            rollout_logprobs=response.logprobs,
            finish_reason=response.finish_reason,
            policy_versions=((self._policy_version, len(response.token_ids)),),
        )


def _read_config(source: Mapping[str, Any] | str | Path) -> Qwen3Config:
    """The config as transformers' own class.

    Raises:
        RolloutError: see `LocalEngine`.
    """
    if isinstance(source, Mapping):
        fields = dict(source)
    else:
        try:
            fields = dict(json.loads((Path(source) / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RolloutError(f"no readable config.json in {source} (model.hf_dir): {error}") from error
    if fields.get("model_type", "qwen3") != "qwen3":
        raise RolloutError(f"model_type is {fields['model_type']!r} (model.hf_dir); the local engine runs 'qwen3'")
    try:
        config = Qwen3Config.from_dict(fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise RolloutError(f"not a Qwen3 config (model.hf_dir): {error}") from error
    if config.num_attention_heads % config.num_key_value_heads:
        raise RolloutError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads "
            f"{config.num_key_value_heads} (model.num_attention_heads, model.num_query_groups)"
        )
    if set(config.layer_types) != {"full_attention"}:
        raise RolloutError("the config asks for sliding windows (use_sliding_window); the local engine has none")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in _BATCH_DEPENDENT_ROPE:
        raise RolloutError(
            f"rope type {rope_type!r} changes with the longest sequence of a batch, so that a response would depend "
            "on its neighbours; the local engine takes a fixed one (default, linear, yarn)"
        )
    return config


def _empty_model(config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """A model whose memory is allocated and not filled: an 8B model need not be initialised to be overwritten."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    # The rotary frequencies are no parameter and arrive in no stream; they stay float32 in every dtype.
    model.model.rotary_emb = _rotary_embedding(config, device)
    model.config._attn_implementation = ATTENTION_NAME
    return model.eval().requires_grad_(False)


def _rotary_embedding(config: Qwen3Config, device: torch.device) -> Qwen3RotaryEmbedding:
    with torch.device(device):
        return Qwen3RotaryEmbedding(config=config)


def _check_request(
    config: Qwen3Config, prompts: Sequence[Prompt], num_responses: int, sampling: SamplingParams
) -> None:
    """Refuse what the model cannot serve, all problems at once.

    Raises:
        RolloutError: names the settings.
    """
    require_unique_ids(prompts)
    problems = []
    if num_responses < 1:
        problems.append(f"num_responses is {num_responses} (rollout.responses_per_prompt); it must be at least 1")
    outside = [token for token in sampling.stop_token_ids if not 0 <= token < config.vocab_size]
    if outside:
        problems.append(
            f"stop tokens {outside} are outside the vocabulary of {config.vocab_size} (rollout.stop_tokens, "
            "tokenizer.dir, model.vocab_size)"
        )
    longest = config.max_position_embeddings - sampling.max_response_tokens
    for prompt in prompts:
        ids = prompt.token_ids
        if len(ids) == 0:
            problems.append(f"prompt {prompt.prompt_id} has no tokens")
        elif ids.min() < 0 or ids.max() >= config.vocab_size:
            problems.append(
                f"prompt {prompt.prompt_id} holds token ids from {ids.min()} to {ids.max()}, outside the vocabulary "
                f"of {config.vocab_size} (tokenizer.dir, model.vocab_size)"
            )
        elif len(ids) > longest:
            problems.append(
                f"prompt {prompt.prompt_id} has {len(ids)} tokens; with rollout.max_response_tokens of "
                f"{sampling.max_response_tokens} it exceeds model.max_position_embeddings of "
                f"{config.max_position_embeddings} (lower rollout.max_response_tokens or data.max_prompt_tokens)"
            )
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise RolloutError("the rollout engine cannot serve this request:\n" + "\n".join(f"  - {p}" for p in shown))
