"""Publishing: pause, send, verify, set the version, go on; all ranks of the trainer take part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_klear.errors import KlearError, WeightSyncError
from megatron_klear.parallel import FirstRank
from megatron_klear.records import ParallelContext
from megatron_klear.weight_sync.buckets import bucketed, converted
from megatron_klear.weight_sync.checksums import ExpectedChecksums, verify
from megatron_klear.weight_sync.engines import EngineGroup, EngineLayout
from megatron_klear.weight_sync.sharing import BucketSharing
from megatron_klear.weight_sync.transport import SetBrokenOff, Transport

log = logging.getLogger(__name__)

PauseMode = Literal["abort", "in_place", "retract"]
VerifyMode = Literal["checksum", "logprobs", "checksum_or_logprobs"]
LogprobCheck = Callable[[], None]
"""A collective on all ranks that compares engine and trainer on a probe; raises WeightSyncError when they differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What a publish did.

    Attributes:
        version: of the weights now in use.
        num_bytes: sent to each engine.
        seconds: from pausing the engines to letting them go on.
        proof: how it was verified.
    """

    version: int
    num_bytes: int
    seconds: float
    proof: Literal["checksum", "logprobs"]


class Publisher:
    """Sends the trainer's weights to all engines.

    A version is the number of steps that the weights have learned from, and goes up by one with every publish. A run
    that resumes begins with its checkpoint's: these are that version's weights, bit by bit, and what was sampled from
    them counts on. Versions above it, of weights that are gone, come again for other weights.

    Args:
        engines: on the first rank; None on the others.
        transport: on the first rank; None on the others.
        layout: how the engines hold weights.
        head_dim: channels of an attention head.
        context: the trainer's layout.
        first_rank: lets the other ranks wait without a collective.
        bucket_bytes: size of a bucket.
        pause_mode: what happens to unfinished responses.
        verify_mode: the proof that is asked for.
        check_logprobs: compares log-probabilities; needed where `verify_mode` may ask for it.
        sharing: has every rank offer its copy of a bucket before the transport sends it; None where the first rank's
            is enough.
        before_generation: called on all ranks when the engines have the new weights, before they go on.
    """

    def __init__(
        self,
        engines: EngineGroup | None,
        transport: Transport | None,
        layout: EngineLayout,
        *,
        head_dim: int,
        context: ParallelContext,
        first_rank: FirstRank,
        bucket_bytes: int,
        pause_mode: PauseMode,
        verify_mode: VerifyMode,
        check_logprobs: LogprobCheck | None = None,
        sharing: BucketSharing | None = None,
        before_generation: Callable[[], None] = lambda: None,
    ) -> None:
        self._engines, self._transport, self._layout = engines, transport, layout
        self._head_dim, self._context, self._first_rank = head_dim, context, first_rank
        self._bucket_bytes, self._pause_mode, self._verify_mode = bucket_bytes, pause_mode, verify_mode
        self._check_logprobs = check_logprobs
        self._sharing, self._before_generation = sharing, before_generation
        self._version = -1
        self._expected: list[dict[str, str]] | None = None

    @property
    def expected(self) -> list[dict[str, str]] | None:
        """The checksums that proved the last publish, as `verify` takes them; None when they did not."""
        return self._expected

    @property
    def version(self) -> int:
        """Of the last set of weights that was published and verified; -1 before the first."""
        return self._version

    def publish(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> PublishReport:
        """Bring a full set of weights to all engines (a collective).

        The engines stay paused when anything goes wrong: nothing is generated with weights of which is not known
        which they are.

        Args:
            named_tensors: the whole model under Hugging Face names, in forward order, the same on every rank. Iterated
                again, on every rank, when engines that are left need the set again.
            version: the one after the current one; any, for the first publish.

        Raises:
            WeightSyncError: on every rank: an engine failed, or its weights are not the trainer's (by name).
        """
        self._require_next(version)
        start = time.monotonic()
        checksums = ExpectedChecksums(self._layout, head_dim=self._head_dim, context=self._context)
        wants_checksums = self._verify_mode != "logprobs" and not self._layout.quantized
        self._first_rank.run("pause the engines", self._pause)
        stream: Iterator[tuple[str, torch.Tensor]] = self._converted(named_tensors)
        if wants_checksums:
            stream = checksums.watch(stream)
        num_bytes, is_whole = self._send(stream, version)
        expected = checksums.gather() if wants_checksums else None
        while not is_whole:  # each time with fewer engines
            num_bytes, is_whole = self._send(self._converted(named_tensors), version)
        if self._sharing is not None:
            self._sharing.release()
        proven = expected is not None and self._first_rank.run(
            "verify the engines' weights", lambda: self._verify(expected)
        )
        self._first_rank.run("set the engines' version", lambda: self._set_version(version))
        if not proven:
            self._require_logprobs()
        self._before_generation()
        self._first_rank.run("let the engines go on", self._continue)
        self._version, self._expected = version, expected if proven else None
        if not proven:
            # Only an engine that generates can show its log-probabilities, so that this proof comes after.
            assert self._check_logprobs is not None
            self._check_logprobs()
        seconds = time.monotonic() - start
        proof: Literal["checksum", "logprobs"] = "checksum" if proven else "logprobs"
        return PublishReport(version=version, num_bytes=num_bytes, seconds=seconds, proof=proof)

    def keep(self, version: int) -> None:
        """Give the weights that were published a new version, where nothing was trained since (a collective).

        Nothing is in flight meanwhile.

        Args:
            version: the one after the current one.

        Raises:
            WeightSyncError: on every rank: an engine failed, or the version is another one.
        """
        self._require_next(version)
        self._first_rank.run("set the engines' version", lambda: self._set_version(version))
        self._version = version

    def close(self) -> None:
        """Leave the engines; a second call does nothing."""
        if self._transport is not None:
            self._transport.close()

    def _require_next(self, version: int) -> None:
        if self._version >= 0 and version != self._version + 1:
            raise WeightSyncError(
                f"the engines have weights of version {self._version} and were sent version {version}; versions must "
                "go up by one"
            )

    def _pause(self) -> None:
        assert self._engines is not None
        if self._version < 0 and self._pause_mode == "abort":
            # What a trainer that was killed has left paused in place is never aborted; put back into the queue it is.
            self._engines.call("/pause_generation", {"mode": "retract"})
        self._engines.call("/pause_generation", {"mode": self._pause_mode})

    def _converted(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        return converted(named_tensors, getattr(torch, self._layout.dtype))

    def _send(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> tuple[int, bool]:
        """Send a set; returns its bytes, and whether the engines that are left have the whole of it (a collective).

        The stream is iterated to its end on every rank, whatever happens on the first: the others iterate it too.
        """
        self._first_rank.run("begin to send weights", lambda: self._begin(version))
        num_bytes = 0
        failure: KlearError | None = None
        for bucket in bucketed(stream, self._bucket_bytes):
            num_bytes += bucket.num_bytes
            if self._sharing is not None:
                self._sharing.offer(bucket)
            if self._transport is not None and failure is None:
                try:
                    self._transport.send(bucket)
                except KlearError as error:
                    failure = error
                except Exception as error:  # no memory, no thread: the others would wait in the stream's exchanges
                    failure = WeightSyncError(f"sending weights failed: {type(error).__name__}: {error}")
                    failure.__cause__ = error
            self._first_rank.alive()
        return num_bytes, self._first_rank.run("load weights into the engines", lambda: self._finish(failure))

    def _begin(self, version: int) -> None:
        assert self._transport is not None
        self._transport.begin(version)

    def _finish(self, failure: KlearError | None) -> bool:
        assert self._engines is not None
        assert self._transport is not None
        try:
            if failure is not None:
                raise failure
            self._transport.finish()
        except SetBrokenOff as broken:
            log.warning("%s", broken)
            return False
        if self._pause_mode != "in_place":
            # Prefixes that the old weights computed must not be taken for the new ones'. In place unfinished responses
            # hold on to them, and only requests that name another version are safe (see `SglangEndpoint`).
            self._engines.call("/flush_cache", {})
        return True

    def _verify(self, expected: list[dict[str, str]]) -> bool:
        assert self._engines is not None
        return verify(self._engines, expected)

    def _require_logprobs(self) -> None:
        """Refuse to go on without checksums, unless the settings allow to compare log-probabilities instead."""
        if self._verify_mode == "checksum":
            why = "their weights are quantised" if self._layout.quantized else "they know no /weights_checker"
            raise WeightSyncError(
                f"the engines cannot tell checksums of their weights ({why}), and weight_sync.verify asks for them; "
                "update SGLang, or set weight_sync.verify to logprobs or checksum_or_logprobs"
            )
        if self._pause_mode != "abort":
            raise WeightSyncError(
                "the engines cannot tell checksums of their weights, and log-probabilities prove them only once they "
                "generate: responses that they hold would go on before that; set weight_sync.pause_mode=abort"
            )
        if self._check_logprobs is None:
            raise WeightSyncError("weight_sync.verify asks for logprobs, and there is nothing to compute them with")

    def _set_version(self, version: int) -> None:
        assert self._engines is not None
        self._engines.call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def _continue(self) -> None:
        assert self._engines is not None
        self._engines.call("/continue_generation", {})


def common_layout(layouts: Sequence[EngineLayout], names: Sequence[str]) -> EngineLayout:
    """The one layout of all engines.

    Raises:
        WeightSyncError: they differ.
    """
    if len(set(layouts)) > 1:
        texts = [f"{name} {layout}" for name, layout in zip(names, layouts, strict=True)]
        raise WeightSyncError(
            "the engines must hold their weights alike (same tp, device, dtype and quantization, sglang.*); got "
            + "; ".join(texts)
        )
    return layouts[0]
