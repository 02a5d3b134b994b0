"""The acting side of a run on this rank: an engine, graders, and the exchange of groups between ranks."""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear.config import EvaluationSettings
from megatron_klear.model import HfWeights, hf_config
from megatron_klear.parallel import AllRanks, Machines
from megatron_klear.records import Grade, Prompt, RolloutGroup, ScoredGroup
from megatron_klear.rollout import LocalEngine, RolloutCallback, SamplingParams, merge_groups, shard_prompts
from megatron_klear.rollout.ledger import scored_group
from megatron_klear.session.closing import STOPPED_SECONDS, closed_within
from megatron_klear.session.examples import example_rows
from megatron_klear.session.grading import Graders, grade_requests
from megatron_klear.session.machine_graders import GraderPool, MachineGraders
from megatron_klear.session.off_policy import WeightProof
from megatron_klear.session.server_start import AskedToStop
from megatron_klear.session.serving import ServedEngine
from megatron_klear.session.session import Session

_WAKE_SECONDS = 0.5


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
    """Generates and grades; every rank gets all results.

    With the engine inside the training processes each rank does its share of the prompts. With servers the first rank
    has them generate, and all machines' graders grade.

    Args:
        session: the run.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        settings, context = session.settings, session.context
        dtype = torch.bfloat16 if settings.model.dtype == "bfloat16" else torch.float32
        self.engine: LocalEngine | ServedEngine
        self.graders: GraderPool
        self._machines: Machines | None = None
        # Of an engine in every rank: how long each takes for its share differs by more than an exchange waits.
        silence_seconds = settings.parallel.timeout_seconds
        self._all_ranks = AllRanks(context, silence_seconds=silence_seconds, beat=self._beat)
        # Without meetings: a rank that has done its share and waits for the others tells them of a stop, too.
        self._stopping = AllRanks(context, silence_seconds=silence_seconds)
        if settings.rollout.engine == "sglang":
            self._machines = Machines(context)
            # First, so that machines grade as soon as there is something to grade.
            pool = Graders(settings) if self._machines.is_leader else None
            workers = max(settings.reward.workers, settings.code_reward.workers)
            self.graders = MachineGraders(
                self._machines, pool, workers=workers, limit_seconds=settings.reward.machine_seconds
            )
            self.engine = ServedEngine(session, self._machines)
        else:
            self.engine = LocalEngine(
                hf_config(session.arch, dtype=settings.model.dtype, yarn=settings.yarn.in_training(session.arch)),
                device=context.device,
                dtype=dtype,
                batch_responses=settings.rollout.batch_responses,
            )
            self.graders = Graders(settings, ranks_per_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.stop_token_ids = session.chat.stop_ids

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._machines is not None:
            self._machines.close()
        if kind is not None:
            closed_within(STOPPED_SECONDS, graders=self.graders.close, engines=self.engine.close)
            return
        self.graders.close()
        self.engine.close()

    @property
    def proof(self) -> WeightProof:
        """How it is known that the engine has the published weights; the same on every rank."""
        return self.engine.proof if isinstance(self.engine, ServedEngine) else "same tensors"

    def publish(self, version: int) -> None:
        """Send the trainer's weights to every rank's engine under a new version (a collective)."""
        session = self.session
        with session.phase("publish"):
            is_trained = not session.settings.scheduling.rollout_only
            if not is_trained and isinstance(self.engine, ServedEngine) and self.engine.holds_weights:
                self.engine.keep_weights(version=version)
                return
            weights = HfWeights(model=session.model, arch=session.arch, context=session.context)
            self.engine.update_weights(weights, version=version)

    def hand_to_trainer(self) -> None:
        """Before the ranks compute: where engines use their GPUs, these give up their memory until the next publish."""
        if isinstance(self.engine, ServedEngine):
            with self.session.phase("hand over"):
                self.engine.hand_to_trainer()

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, on_rollout: RolloutCallback | None = None
    ) -> list[RolloutGroup] | None:
        """M responses to each of a step's prompts at the training temperature; of a local engine this rank's share.

        None where the run is asked to stop while they are drawn; with a local engine perhaps on some ranks only, whom
        `score` lets the others know of.

        Args:
            prompts: of the step.
            step: to train; decides the seed.
            on_rollout: called with every response that this rank gets, soon after it is complete.
        """
        rollout = self.session.settings.rollout
        sampling = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
        )
        made = self._generate(
            prompts, sampling, rollout.responses_per_prompt, seed=_seed(self.session, step, 0), on_rollout=on_rollout
        )
        self.session.noted |= self.failed_requests()
        return made

    def failed_requests(self) -> dict[str, float]:
        """On the first rank: requests to servers without a sound answer since this was last asked, as metrics."""
        return self.engine.failed_requests() if isinstance(self.engine, ServedEngine) else {}

    def score(self, prompts: Sequence[Prompt], mine: Sequence[RolloutGroup] | None) -> list[ScoredGroup] | None:
        """Grade what `generate` gave; all groups in the order of `prompts`, with their advantages (Eq. 4).

        None on every rank where `mine` is on any: the run is asked to stop.
        """
        std = self.session.settings.algorithm.advantage_std
        if isinstance(self.engine, ServedEngine):
            if mine is None:
                return None
            alive = self.engine.alive
            with self.session.phase("grade"):
                told = self.engine.for_all("grade", lambda: self._graded_meanwhile(mine, alive))
            return [scored_group(group, grades, normalize_std=std) for group, grades in zip(mine, told, strict=True)]
        with self.session.phase("grade"):
            found = self._graded_meanwhile(mine or [], self._all_ranks.alive)
            graded = {group.prompt.prompt_id: grades for group, grades in zip(mine or [], found, strict=True)}
        with self.session.phase("gather"):
            self._all_ranks.meet("generate and grade its share")
            gathered = self._gather(prompts, mine, graded)
        if gathered is None:
            return None
        groups, grades = gathered
        return [scored_group(group, grades[group.prompt.prompt_id], normalize_std=std) for group in groups]

    def score_stored(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Grade whole groups that every rank has, each rank its share; in their order, with advantages."""
        prompts, world = [group.prompt for group in groups], self.session.context.world
        served = isinstance(self.engine, ServedEngine)
        scored = self.score(prompts, groups if served else groups[world.rank :: world.size])
        assert scored is not None
        return scored

    def evaluate(self, prompts: Sequence[Prompt], settings: EvaluationSettings, *, step: int) -> Accuracy | None:
        """Accuracy on held-out problems, avg@n (greedy when the temperature is 0).

        None where the run is asked to stop while responses are drawn: the next life evaluates.
        """
        prompts = prompts[: settings.prompts]
        sampling = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_response_tokens=settings.max_response_tokens or self.session.settings.rollout.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
        )
        with self._positions_of_evaluation():
            mine = self._generate(prompts, sampling, settings.samples_per_prompt, seed=_seed(self.session, step, 1))
        groups = self.score(prompts, mine)
        if groups is None:
            return None
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

    def _beat(self) -> None:
        """Of a rank that works or waits."""
        self.session.heartbeat.renew()
        if self.session.stop.received:
            self._stopping.is_any_asked_to_stop(asked=True)

    def _positions_of_evaluation(self) -> AbstractContextManager[None]:
        """With `yarn.apply_to=evaluation` the engine computes with YaRN for the while; servers do so all the time."""
        session, yarn = self.session, self.session.settings.yarn
        scaling = yarn.scaling(session.arch)
        if scaling is None or yarn.apply_to == "everything" or isinstance(self.engine, ServedEngine):
            return nullcontext()
        return self.engine.other_positions(hf_config(session.arch, dtype=session.settings.model.dtype, yarn=scaling))

    def examples(self, groups: Sequence[ScoredGroup], step: int) -> list[dict[str, Any]]:
        """Some right and some wrong responses as rows for the report."""
        return example_rows(self.session, groups, step)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        num_responses: int,
        *,
        seed: int,
        on_rollout: RolloutCallback | None = None,
    ) -> list[RolloutGroup] | None:
        """Responses; None where they give way to a request to stop: servers' on every rank, else this rank's."""
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
                self._all_ranks.alive()
                if not served and self._stopping.is_any_asked_to_stop(asked=self.session.stop.received):
                    raise AskedToStop

            try:
                return self.engine.generate(
                    mine, num_responses=num_responses, sampling=sampling, seed=seed, on_progress=show,
                    on_rollout=on_rollout,
                )  # fmt: skip
            except AskedToStop:
                return None

    def grade(self, groups: Sequence[RolloutGroup]) -> list[tuple[Grade, ...]]:
        """Grades of each group's responses."""
        grades = iter(self.graders.grade_many(grade_requests(self.session.chat, groups)))
        return [tuple(next(grades) for _ in group.rollouts) for group in groups]

    def _graded_meanwhile(self, groups: Sequence[RolloutGroup], alive: Callable[[], None]) -> list[tuple[Grade, ...]]:
        """As `grade`, showing the other ranks that this one lives."""
        with ThreadPoolExecutor(1, thread_name_prefix="grade") as thread:
            grading = thread.submit(self.grade, groups)
            while not concurrent.futures.wait([grading], timeout=_WAKE_SECONDS).done:
                alive()
            return grading.result()

    def _gather(
        self,
        prompts: Sequence[Prompt],
        mine: Sequence[RolloutGroup] | None,
        graded: dict[str, tuple[Grade, ...]],
    ) -> tuple[list[RolloutGroup], dict[str, tuple[Grade, ...]]] | None:
        """All ranks' groups and grades; None where a rank has none to give."""
        parts: list[Any] = [None] * self.session.context.world.size
        dist.all_gather_object(parts, None if mine is None else (list(mine), graded))
        if None in parts:
            return None
        merged = {name: grades for _, part in parts for name, grades in part.items()}
        return merge_groups(prompts, [groups for groups, _ in parts]), merged


def _seed(session: Session, step: int, use: int) -> int:
    """A seed of its own for every step and use (0 training, 1 evaluation), the same after a resume."""
    return int(np.random.SeedSequence([session.settings.run.seed, step, use]).generate_state(1, np.uint64)[0] >> 1)
