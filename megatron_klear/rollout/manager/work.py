"""What the manager holds in memory of groups, responses and requests."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_klear.records import Prompt, Rollout

if TYPE_CHECKING:
    from megatron_klear.rollout.manager.engines import Engine


@dataclass(slots=True, eq=False)
class ResponseWork:
    """One response that is being drawn.

    Attributes:
        group, index: which one.
        head: what an interruption left of it, to be continued; finished responses are in the ledger only.
        attempts: requests sent so far.
        failures: how many of them failed on engines that are well.
        avoid: the engine that failed it last.
    """

    group: GroupWork
    index: int
    head: Rollout | None = None
    attempts: int = 0
    failures: int = 0
    avoid: Engine | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens it has so far."""
        return 0 if self.head is None else len(self.head.response_ids)


@dataclass(slots=True, eq=False)
class GroupWork:
    """One group that is not trained yet.

    Attributes:
        group_id, epoch, prompt: as in the ledger.
        waiting: responses to send to an engine, last one first.
        open_responses: responses that are not finished.
        oldest_version: lower bound on the version of its tokens; None before any was asked for.
        is_graded: ready to be trained.
        ready_rank: counts graded groups in the order they became so.
        step: the step it is committed to.
        engine: where its responses went, for the prefix cache.
        is_queued: it is in the queue of groups with responses to send.
    """

    group_id: int
    epoch: int
    prompt: Prompt
    waiting: list[ResponseWork] = field(default_factory=list)
    open_responses: int = 0
    oldest_version: int | None = None
    is_graded: bool = False
    ready_rank: int = 0
    step: int | None = None
    engine: Engine | None = None
    is_queued: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One request at an engine.

    Attributes:
        request_id: unique over the life of the run.
        response, engine: what, where.
        sent_version: version in use when it was sent.
        tokens: that it has brought so far.
        last_progress: loop time of its newest token, or of its start.
        is_abandoned: given up; whatever it still answers is ignored.
        is_moving: interrupted to be continued on another engine.
        task: waits for the answer.
    """

    request_id: str
    response: ResponseWork
    engine: Engine
    sent_version: int
    last_progress: float
    tokens: int = 0
    is_abandoned: bool = False
    is_moving: bool = False
    task: asyncio.Task[None] | None = None


def response_seed(run_seed: int, epoch: int, prompt_id: str, index: int) -> int:
    """Seed of a response: the same for all of its requests, a retry and a continuation included, on whatever engine.

    Args:
        run_seed: run.seed.
        epoch, prompt_id, index: which response.

    Returns:
        63 bits, the positive half of what SGLang takes.
    """
    key = f"{run_seed}\n{epoch}\n{index}\n{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
