"""What every rollout engine offers: responses with their logprobs, new weights, the policy's version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_klear.errors import RolloutError
from megatron_klear.records import Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How responses are drawn.

    Attributes:
        temperature: divisor of the logits; 0 means greedy. Logprobs are reported at this temperature (greedy: at 1).
        top_p: probability mass of the nucleus, in (0, 1]; 1 samples from the whole vocabulary.
        max_response_tokens: longest response, in tokens, the end token included.
        stop_token_ids: a response ends with the first of these; empty means that only the length ends it.

    Raises:
        RolloutError: a value out of range, all of them in one message.
    """

    temperature: float
    top_p: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_response_tokens < 1:
            problems.append(f"max_response_tokens is {self.max_response_tokens}; it must be at least 1")
        if problems:
            raise RolloutError("sampling cannot work (settings rollout.*, evaluation.*): " + "; ".join(problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutProgress:
    """How far a `generate` call has come.

    Attributes:
        finished_responses: responses that are complete.
        total_responses: responses asked for.
        generated_tokens: tokens sampled so far, unfinished responses included.
    """

    finished_responses: int
    total_responses: int
    generated_tokens: int


ProgressCallback = Callable[[RolloutProgress], None]

RolloutCallback = Callable[[Prompt, int, Rollout], None]
"""Called with prompt, index of the response and the response as soon as that is complete."""


class RolloutEngine(Protocol):
    """Generates responses with the weights it was last given."""

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first `update_weights`."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        on_progress: ProgressCallback | None = None,
    ) -> list[RolloutGroup]:
        """Draw `num_responses` responses to each prompt; groups come back in the order of `prompts`.

        The randomness of a token depends only on (seed, prompt_id, index of the response, index of the token).

        Raises:
            RolloutError: a request that cannot be served, or an answer that cannot be trained on.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Take a full set of weights under their Hugging Face names and shapes, and the version they carry.

        Raises:
            WeightSyncError: missing, extra, repeated, misshapen or non-finite tensors, by name; or a version that
                does not go up.
        """
        ...

    def close(self) -> None:
        """Release memory and processes; the engine cannot be used afterwards, and a second call does nothing."""
        ...
