"""SGLang's servers as the engine of a run: the first rank owns them, all ranks publish to them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear.errors import WeightSyncError
from megatron_klear.model import hf_config
from megatron_klear.parallel import FirstRank
from megatron_klear.records import FloatArray, IntArray, Prompt, RolloutGroup, TrainSequence
from megatron_klear.rollout import ProgressCallback, SamplingParams
from megatron_klear.rollout.sglang import Expected, ServerFleet, SglangEngine
from megatron_klear.session.session import Session
from megatron_klear.weight_sync import (
    DiskTransport,
    DistributedTransport,
    EngineGroup,
    EngineLayout,
    Publisher,
    TensorTransport,
    Transport,
    common_layout,
)

log = logging.getLogger(__name__)

_SAMPLE_TEXTS = ("The quick brown fox, 12345.", "x^2 + y^2 = z^2\n", "<think>\n\u00fcber\u00a0\u65e5\u672c</think>")
_PROBE_TOKENS = 64
_SHARED_MEMORY = Path("/dev/shm")


class ServedEngine:
    """Generates on SGLang's servers; every rank holds one, and its methods are collectives.

    Servers are started, or those at `sglang.urls` used; they end with this process at the latest.

    Args:
        session: the run.

    Raises:
        ConfigError: on every rank: servers cannot be started or reached, or do not serve our model.
        RolloutError: on every rank: a server failed while starting.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        settings = session.settings
        self._first_rank = FirstRank(
            session.context,
            silence_seconds=settings.parallel.timeout_seconds,
            beat=session.heartbeat.renew,
        )
        self._engine: SglangEngine | None = None
        self._resources = ExitStack()
        group: EngineGroup | None = None
        transport: Transport | None = None
        with session.phase("start engines"):
            layout = EngineLayout(**self._first_rank.run("start SGLang's servers", self._start))
        if self._engine is not None:
            callers = [engine.caller for engine in self._engine.engines]
            group = EngineGroup(callers, settings.weight_sync.timeout_seconds, waiting=self._first_rank.alive)
            transport = self._transport(group, layout)
        self._publisher = Publisher(
            group,
            transport,
            layout,
            head_dim=session.arch.head_dim,
            context=session.context,
            first_rank=self._first_rank,
            bucket_bytes=settings.weight_sync.bucket_bytes,
            pause_mode=settings.weight_sync.pause_mode,
            verify_mode=settings.weight_sync.verify,
            check_logprobs=self._check_logprobs,
        )

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first publish."""
        return self._publisher.version

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Publish a full set of weights.

        Raises:
            WeightSyncError: on every rank; see `Publisher.publish`.
        """
        report = self._publisher.publish(named_tensors, version=version)
        if self._engine is not None:
            self._engine.use_version(version)
            log.info(
                "published version %d: %.1f MB in %.2f s, proved by %s",
                report.version, report.num_bytes / 1e6, report.seconds, report.proof,
            )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        on_progress: ProgressCallback | None = None,
    ) -> list[RolloutGroup]:
        """Draw `num_responses` responses to each prompt; every rank gets all groups, in the order of `prompts`.

        Raises:
            RolloutError: on every rank; see `SglangEngine.generate`.
        """
        groups: list[list[RolloutGroup] | None] = [None]

        def generate() -> None:
            assert self._engine is not None
            groups[0] = self._engine.generate(
                prompts,
                num_responses=num_responses,
                sampling=sampling,
                seed=seed,
                on_progress=on_progress,
                waiting=self._first_rank.alive,
            )

        self._first_rank.run("generate", generate)
        dist.broadcast_object_list(groups, src=0)
        assert groups[0] is not None
        return groups[0]

    def close(self) -> None:
        """End the servers that were started; a second call does nothing."""
        self._publisher.close()
        self._resources.close()

    def _start(self) -> dict[str, Any]:
        """On the first rank: start or find the servers; returns how they hold weights."""
        settings, arch = self.session.settings, self.session.arch
        longest = self._longest_sequence()
        with ExitStack() as on_failure:
            urls: Sequence[str] = settings.sglang.urls
            if not urls:
                fleet = ServerFleet(
                    settings.sglang,
                    hf_config(arch, dtype=self._dtype()),
                    self.session.root,
                    dtype=settings.model.dtype,
                    on_cpu=self.session.context.device.type == "cpu",
                    batch_responses=settings.rollout.batch_responses,
                    longest_sequence=longest,
                )
                on_failure.callback(fleet.close)
                urls = fleet.start_all(self._first_rank.alive)
            encode = self.session.chat.hf
            samples = [(text, encode(text, add_special_tokens=False)["input_ids"]) for text in _SAMPLE_TEXTS]
            expected = Expected(vocab_size=arch.vocab_size, longest_sequence=longest, tokenizer_samples=samples)
            engine = SglangEngine(urls, settings.sglang, expected, in_flight=settings.rollout.batch_responses)
            on_failure.callback(engine.close)
            layouts = [
                EngineLayout(
                    tp=e.facts.tp,
                    device="cuda" if e.facts.device == "cuda" else "cpu",
                    dtype=settings.model.dtype if e.facts.dtype == "auto" else e.facts.dtype,
                    quantized=e.facts.quantization is not None,
                )
                for e in engine.engines
            ]
            layout = common_layout(layouts, [e.endpoint.name for e in engine.engines])
            self._engine, self._resources = engine, on_failure.pop_all()
        log.info("SGLang %s: %s", engine.engines[0].facts.version, ", ".join(urls))
        return asdict(layout)

    def _dtype(self) -> str:
        chosen = self.session.settings.sglang.dtype
        return self.session.settings.model.dtype if chosen == "auto" else chosen

    def _longest_sequence(self) -> int:
        settings = self.session.settings
        evaluated = settings.evaluation.max_response_tokens or settings.rollout.max_response_tokens
        trained = settings.rollout.max_response_tokens if self.session.entry == "rl" else 0
        return settings.data.max_prompt_tokens + max(evaluated if settings.data.heldout else 0, trained)

    def _transport(self, engines: EngineGroup, layout: EngineLayout) -> Transport:
        settings, arch = self.session.settings, self.session.arch
        kind = settings.weight_sync.transport
        near = all(_is_this_machine(caller.url) for caller in engines.callers)
        if kind == "auto":
            kind = "tensor" if near else "distributed"
        if kind == "disk":
            return DiskTransport(engines, self.session.root / "weights", hf_config(arch, dtype=layout.dtype))
        if kind == "distributed":
            return DistributedTransport(engines, tp=layout.tp, device=torch.device(layout.device))
        fits = near and _shared_memory_bytes() > 3 * settings.weight_sync.bucket_bytes
        return TensorTransport(engines, tp=layout.tp, by_value=not fits)

    def _check_logprobs(self) -> None:
        """Compare the engines' log-probabilities of a probe sequence with the trainer's (a collective)."""
        arch, limit = self.session.arch, self.session.settings.weight_sync.logprob_tolerance
        length = min(_PROBE_TOKENS, self._longest_sequence())
        rng = np.random.default_rng(self.session.settings.run.seed)
        tokens = rng.integers(0, arch.vocab_size, length)
        ours = self.session.trainer.token_logprobs([_to_score(tokens)], temperature=1.0)[0]

        def compare() -> None:
            assert self._engine is not None
            self._engine.use_version(self.policy_version)
            seconds = self.session.settings.weight_sync.timeout_seconds
            for name, theirs in self._engine.score(tokens, timeout_seconds=seconds).items():
                difference = float(np.abs(theirs - ours).max())
                if not difference <= limit:
                    raise WeightSyncError(
                        f"{name}: log-probabilities of a probe sequence differ from the trainer's by up to "
                        f"{difference:.3g} nats, more than weight_sync.logprob_tolerance = {limit}"
                    )

        self._first_rank.run("compare log-probabilities", compare)


def _to_score(tokens: IntArray) -> TrainSequence:
    zeros: FloatArray = np.zeros(len(tokens), dtype=np.float32)
    return TrainSequence(
        sequence_id="probe",
        token_ids=tokens,
        policy_weight=zeros,
        lm_weight=zeros,
        advantages=zeros,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
    )


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname())


def _shared_memory_bytes() -> int:
    try:
        free = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0
    return free.f_bavail * free.f_frsize
