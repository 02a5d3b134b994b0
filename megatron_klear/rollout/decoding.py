"""The decode loop: many responses at once, every forward row a live response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3ForCausalLM

from megatron_klear.errors import RolloutError
from megatron_klear.records import FinishReason, Prompt
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.sampling import response_uniforms, sample_tokens
from megatron_klear.rollout.slot_cache import SlotCache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinishedResponse:
    """A complete response.

    Attributes:
        prompt_index, response_index: which prompt of the call, which of its responses.
        token_ids: int64 [L].
        logprobs: float32 [L].
        finish_reason: `stop` or `length`.
    """

    prompt_index: int
    response_index: int
    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason


class _Rows:
    """What the host knows of each slot; entry i of every array speaks of slot i.

    `cached` counts tokens whose keys are stored, `generated` those sampled (the newest is not stored yet).
    """

    def __init__(self, num_slots: int, budget: int) -> None:
        self.prompt_index = np.zeros(num_slots, np.int64)
        self.response_index = np.zeros(num_slots, np.int64)
        self.cached = np.zeros(num_slots, np.int64)
        self.generated = np.zeros(num_slots, np.int64)
        self.newest = np.zeros(num_slots, np.int64)
        self.token_ids = np.zeros((num_slots, budget), np.int64)
        self.logprobs = np.zeros((num_slots, budget), np.float32)
        self.uniforms = np.zeros((num_slots, budget), np.float64)

    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy slots `sources` over slots `targets`."""
        for array in vars(self).values():
            array[targets] = array[sources]


class ContinuousDecoder:
    """Generates all responses of one call, refilling slots as responses finish.

    Finished rows leave the batch at once: the last live rows take their places, so no step computes a row that is
    done. New responses are admitted in bulk when a quarter of the slots is free, and the responses of a prompt that
    enter together share one prefill.

    Args:
        model: in evaluation mode, with the slot attention.
        prompts: with ids that are unique and inside the vocabulary.
        num_responses: per prompt.
        sampling: temperature, nucleus, limits.
        seed: with prompt id and index, the whole source of randomness.
        num_slots: most rows at a time.
        prefill_tokens: most tokens of a prefill pass, padding included (one prompt may exceed it).
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        num_slots: int,
        prefill_tokens: int,
    ) -> None:
        self._model = model
        self._device = model.lm_head.weight.device
        self._prompts = prompts
        self._sampling = sampling
        self._seed = seed
        self._prefill_tokens = prefill_tokens
        self._num_responses = num_responses
        self._waiting = [(p, r) for p in range(len(prompts)) for r in range(num_responses)]
        self._next = 0
        self._num_slots = min(num_slots, len(self._waiting))
        self._num_active = 0
        self._rows = _Rows(self._num_slots, sampling.max_response_tokens)
        self._cache = SlotCache(
            model.config, num_slots=self._num_slots, dtype=model.lm_head.weight.dtype, device=self._device
        )
        self._is_stop = np.zeros(model.config.vocab_size, np.bool_)
        self._is_stop[list(sampling.stop_token_ids)] = True
        self.generated_tokens = 0

    def run(self) -> Iterator[list[FinishedResponse]]:
        """Decode to the end; yields after every step the responses that it finished, often none.

        Raises:
            RolloutError: the weights gave a probability that is not finite.
        """
        refill = max(1, self._num_slots // 4)
        while self._num_active or self._next < len(self._waiting):
            free = self._num_slots - self._num_active
            if self._next < len(self._waiting) and free >= refill:
                self._admit(free)
            else:
                self._decode()
            yield self._retire()

    def _admit(self, free: int) -> None:
        """Bring waiting responses into free slots; similar prompt lengths share a pass, which keeps padding small."""
        end = min(self._next + free, len(self._waiting))
        whole_groups = end - end % self._num_responses
        # A group cut in two is prefilled twice, so its head waits for its tail unless nothing else could enter.
        end = whole_groups if whole_groups > self._next else end
        entering, self._next = self._waiting[self._next : end], end
        by_prompt = [(p, [r for _, r in pairs]) for p, pairs in groupby(entering, key=lambda pair: pair[0])]
        by_prompt.sort(key=lambda item: len(self._prompts[item[0]].token_ids))
        chunk: list[tuple[int, list[int]]] = []
        for item in by_prompt:
            width = len(self._prompts[item[0]].token_ids)
            if chunk and (len(chunk) + 1) * width > self._prefill_tokens:
                self._prefill(chunk)
                chunk = []
            chunk.append(item)
        self._prefill(chunk)

    def _prefill(self, chunk: Sequence[tuple[int, list[int]]]) -> None:
        """Run each prompt of the chunk once and give all its entering responses their first token."""
        prompts = [self._prompts[p].token_ids for p, _ in chunk]
        lengths = np.array([len(ids) for ids in prompts])
        # Right padding needs no mask: causal attention keeps it from the prompt, decoding overwrites its columns.
        padded = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = ids
        source = np.repeat(np.arange(len(chunk)), [len(responses) for _, responses in chunk])
        start, stop = self._num_active, self._num_active + len(source)
        rows = self._rows
        rows.prompt_index[start:stop] = np.array([p for p, _ in chunk])[source]
        rows.response_index[start:stop] = [r for _, responses in chunk for r in responses]
        rows.cached[start:stop] = lengths[source]
        rows.generated[start:stop] = 0
        if self._sampling.temperature > 0.0:
            for row in range(start, stop):
                prompt_id = self._prompts[rows.prompt_index[row]].prompt_id
                rows.uniforms[row] = response_uniforms(
                    self._seed, prompt_id, int(rows.response_index[row]), self._sampling.max_response_tokens
                )
        source_rows = torch.from_numpy(source).to(self._device)
        self._cache.begin_prefill(start, source_rows, padded.shape[1])
        position_ids = torch.arange(padded.shape[1], device=self._device).unsqueeze(0)
        hidden = self._forward(padded, position_ids, mask=None)
        ends = torch.from_numpy(lengths - 1).to(self._device)
        last_hidden = hidden[torch.arange(len(prompts), device=self._device), ends]
        self._num_active = stop
        self._sample(start, stop, self._model.lm_head(last_hidden)[source_rows])

    def _decode(self) -> None:
        """One token for every active row."""
        count, rows = self._num_active, self._rows
        position_ids, mask = self._cache.begin_decode(rows.cached[:count])
        hidden = self._forward(rows.newest[:count, None], position_ids, mask)
        rows.cached[:count] += 1
        self._sample(0, count, self._model.lm_head(hidden[:, 0]))

    def _forward(
        self, token_ids: NDArray[np.int64], position_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Final hidden states [B, tokens, H]; a mask given per layer type keeps transformers from building its own."""
        output = self._model.model(
            input_ids=torch.from_numpy(token_ids).to(self._device),
            attention_mask={"full_attention": mask},
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _sample(self, start: int, stop: int, logits: torch.Tensor) -> None:
        """Draw the next token of slots start .. stop-1 from logits [stop - start, V] and note it."""
        rows, slots = self._rows, np.arange(start, stop)
        index = rows.generated[start:stop]
        uniforms = torch.from_numpy(rows.uniforms[slots, index]).to(self._device)
        tokens, logprobs = sample_tokens(
            logits, uniforms, temperature=self._sampling.temperature, top_p=self._sampling.top_p
        )
        rows.newest[start:stop] = tokens.cpu().numpy()
        rows.token_ids[slots, index] = rows.newest[start:stop]
        rows.logprobs[slots, index] = logprobs.cpu().numpy()
        broken = slots[~np.isfinite(rows.logprobs[slots, index])]
        if len(broken):
            names = sorted({self._prompts[p].prompt_id for p in rows.prompt_index[broken]})
            raise RolloutError(
                f"the policy gives probabilities that are not finite for {len(broken)} responses (prompts "
                f"{', '.join(names[:8])}); its weights have diverged: lower optimizer.lr or optimizer.clip_grad"
            )
        rows.generated[start:stop] += 1
        self.generated_tokens += stop - start

    def _retire(self) -> list[FinishedResponse]:
        """Take finished rows out and close the gaps with the last live rows."""
        count, rows = self._num_active, self._rows
        stopped = self._is_stop[rows.newest[:count]]
        done = stopped | (rows.generated[:count] >= self._sampling.max_response_tokens)
        if not done.any():
            return []
        finished = []
        for slot in np.flatnonzero(done):
            length = rows.generated[slot]
            finished.append(
                FinishedResponse(
                    prompt_index=int(rows.prompt_index[slot]),
                    response_index=int(rows.response_index[slot]),
                    token_ids=rows.token_ids[slot, :length].copy(),
                    logprobs=rows.logprobs[slot, :length].copy(),
                    finish_reason="stop" if stopped[slot] else "length",
                )
            )
        remaining = count - len(finished)
        targets = np.flatnonzero(done[:remaining])
        sources = remaining + np.flatnonzero(~done[remaining:])
        self._cache.move(sources, targets)
        rows.move(sources, targets)
        self._num_active = remaining
        return finished
