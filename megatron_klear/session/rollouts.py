"""The acting side of a run on this rank: an engine, graders, and the exchange of groups between ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear.config import EvaluationSettings
from megatron_klear.model import hf_config, hf_named_tensors
from megatron_klear.records import Grade, Prompt, RolloutGroup, ScoredGroup
from megatron_klear.reward import GradeRequest
from megatron_klear.rollout import LocalEngine, SamplingParams, merge_groups, shard_prompts
from megatron_klear.rollout.ledger import scored_group
from megatron_klear.session.grading import Graders
from megatron_klear.session.serving import ServedEngine
from megatron_klear.session.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of correct answers among the graded ones to held-out problems.

    Attributes:
        mean: over all answers; NaN when none was graded.
        stderr: standard error over problems.
        count: graded answers.
        groups: the answers, for people to read.
    """

    mean: float
    stderr: float
    count: int
    groups: tuple[ScoredGroup, ...]


class Rollouts:
    """Generates and grades on all ranks, each doing its share of the prompts; every rank gets all results.

    Args:
        session: the run.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        settings, context = session.settings, session.context
        dtype = torch.bfloat16 if settings.model.dtype == "bfloat16" else torch.float32
        self.engine: LocalEngine | ServedEngine
        if settings.rollout.engine == "sglang":
            self.engine = ServedEngine(session)
        else:
            self.engine = LocalEngine(
                hf_config(session.arch, dtype=settings.model.dtype),
                device=context.device,
                dtype=dtype,
                batch_responses=settings.rollout.batch_responses,
            )
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.graders = Graders(settings, ranks_per_machine=local_ranks)
        self.stop_token_ids = session.chat.stop_ids

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.graders.close()
        self.engine.close()

    @property
    def attested(self) -> bool:
        """Whether the engine is known to have the weights of its version.

        The one in this process is handed the tensors themselves, and no publish to servers ends without a proof.
        """
        return True

    def publish(self, version: int) -> None:
        """Send the trainer's weights to every rank's engine under a new version (a collective)."""
        session = self.session
        with session.phase("publish"):
            stream = hf_named_tensors(session.model, session.arch, session.context)
            self.engine.update_weights(stream, version=version)

    def generate(self, prompts: Sequence[Prompt], *, step: int) -> list[RolloutGroup]:
        """This rank's share of the step's groups: M responses to each prompt at the training temperature."""
        rollout = self.session.settings.rollout
        sampling = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
        )
        return self._generate(prompts, sampling, rollout.responses_per_prompt, seed=_seed(self.session, step, 0))

    def score(self, prompts: Sequence[Prompt], mine: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Grade this rank's groups and gather everyone's, in the order of `prompts`, with their advantages (Eq. 4)."""
        with self.session.phase("grade"):
            graded = {group.prompt.prompt_id: grades for group, grades in zip(mine, self.grade(mine), strict=True)}
        with self.session.phase("gather"):
            groups, grades = self._gather(prompts, mine, graded)
        std = self.session.settings.algorithm.advantage_std
        return [scored_group(group, grades[group.prompt.prompt_id], normalize_std=std) for group in groups]

    def evaluate(self, prompts: Sequence[Prompt], settings: EvaluationSettings, *, step: int) -> Accuracy:
        """Accuracy on held-out problems, avg@n (greedy when the temperature is 0)."""
        prompts = prompts[: settings.prompts]
        sampling = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_response_tokens=settings.max_response_tokens or self.session.settings.rollout.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
        )
        mine = self._generate(prompts, sampling, settings.samples_per_prompt, seed=_seed(self.session, step, 1))
        groups = self.score(prompts, mine)
        per_problem = np.array([g.is_correct[g.graded].mean() for g in groups if g.graded.any()])
        count = int(sum(g.graded.sum() for g in groups))
        correct = int(sum(g.is_correct.sum() for g in groups))
        spread = float(per_problem.std(ddof=1)) if len(per_problem) > 1 else 0.0
        return Accuracy(
            mean=correct / count if count else math.nan,
            stderr=spread / max(len(per_problem), 1) ** 0.5,
            count=count,
            groups=tuple(groups),
        )

    def examples(self, groups: Sequence[ScoredGroup], step: int) -> list[dict[str, Any]]:
        """Some right and some wrong responses as rows for the report."""
        wanted = self.session.settings.observe.example_rollouts
        answers = [(g, j) for g in groups for j in range(len(g.grades))]
        right = [pair for pair in answers if pair[0].is_correct[pair[1]]]
        wrong = [pair for pair in answers if not pair[0].is_correct[pair[1]]]
        some = right[: (wanted + 1) // 2]
        chosen = some + wrong[: wanted - len(some)]
        return [self._example(group, j, step) for group, j in chosen]

    def _example(self, group: ScoredGroup, j: int, step: int) -> dict[str, Any]:
        prompt, rollout, grade = group.group.prompt, group.group.rollouts[j], group.grades[j]
        return {
            "step": step,
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.text,
            "reference": prompt.reference,
            "response": self.session.chat.decode(rollout.response_ids),
            "outcome": grade.outcome,
            "reward": float(grade.reward),
            "reason": grade.reason,
            "finish_reason": rollout.finish_reason,
        }

    def _generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, num_responses: int, *, seed: int
    ) -> list[RolloutGroup]:
        world = self.session.context.world
        # Servers take all prompts at once and balance them; an engine inside this process takes this rank's share.
        served = isinstance(self.engine, ServedEngine)
        mine = list(prompts) if served else shard_prompts(prompts, world.rank, world.size)
        with self.session.phase("generate", len(mine) * num_responses) as advance:
            done = 0

            def show(progress: Any) -> None:
                nonlocal done
                advance(progress.finished_responses - done)
                done = progress.finished_responses

            groups = self.engine.generate(
                mine, num_responses=num_responses, sampling=sampling, seed=seed, on_progress=show
            )
        if not served:
            return groups
        share = {prompt.prompt_id for prompt in shard_prompts(prompts, world.rank, world.size)}
        return [group for group in groups if group.prompt.prompt_id in share]

    def grade(self, groups: Sequence[RolloutGroup]) -> list[tuple[Grade, ...]]:
        """Grades of each group's responses, which are decoded without the end-of-turn token that closes them."""
        requests = [
            GradeRequest(
                f"{i}: {group.prompt.prompt_id}#{j}",
                self._answer_text(rollout.response_ids),
                group.prompt.reference,
                rollout.finish_reason,
            )
            for i, group in enumerate(groups)
            for j, rollout in enumerate(group.rollouts)
        ]
        domains = [group.prompt.domain for group in groups for _ in group.rollouts]
        grades = iter(self.graders.grade(domains, requests))
        return [tuple(next(grades) for _ in group.rollouts) for group in groups]

    def _answer_text(self, response_ids: np.ndarray) -> str:
        ended = len(response_ids) > 0 and int(response_ids[-1]) in self.stop_token_ids
        return self.session.chat.decode(response_ids[:-1] if ended else response_ids)

    def _gather(
        self,
        prompts: Sequence[Prompt],
        mine: Sequence[RolloutGroup],
        graded: dict[str, tuple[Grade, ...]],
    ) -> tuple[list[RolloutGroup], dict[str, tuple[Grade, ...]]]:
        parts: list[Any] = [None] * self.session.context.world.size
        dist.all_gather_object(parts, (list(mine), graded))
        merged = {name: grades for _, part in parts for name, grades in part.items()}
        return merge_groups(prompts, [groups for groups, _ in parts]), merged


def _seed(session: Session, step: int, use: int) -> int:
    """A seed of its own for every step and use (0 training, 1 evaluation), the same after a resume."""
    return int(np.random.SeedSequence([session.settings.run.seed, step, use]).generate_state(1, np.uint64)[0] >> 1)
