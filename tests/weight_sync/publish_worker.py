"""A trainer's rank that publishes to a running server: `publish_worker.py JOB.json`, its place in RANK, WORLD_SIZE.

The job says the server, the layout and what to publish how. After every publish the server generates, and the trainer
scores what it generated. Rank 0 writes what happened to the job's `result`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.config import ParallelSettings
from megatron_klear.config.serving import SglangSettings
from megatron_klear.conformance.compare import architecture, layout_trainer
from megatron_klear.conformance.matrix import Layout
from megatron_klear.conformance.reference import reference_model
from megatron_klear.errors import KlearError
from megatron_klear.model import hf_config, hf_named_tensors, load_hf_weights
from megatron_klear.parallel import FirstRank
from megatron_klear.records import ParallelContext, Prompt, RolloutGroup, TrainSequence
from megatron_klear.rollout import ProgressCallback, SamplingParams
from megatron_klear.rollout.sglang import Expected, SglangEngine
from megatron_klear.trainer import Trainer
from megatron_klear.weight_sync import (
    BucketSharing,
    DiskTransport,
    DistributedTransport,
    EngineGroup,
    EngineLayout,
    Publisher,
    SharedTransport,
    TensorTransport,
    Transport,
    WeightFiles,
)
from megatron_klear.weight_sync.buckets import Bucket

LONGEST = 96


class Corrupting:
    """A transport that adds to one element of one tensor on its way: by its number in the tensor, the first or last."""

    def __init__(self, inner: Transport, name: str, element: int) -> None:
        self._inner, self._name, self._element = inner, name, element

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, bucket: Bucket) -> None:
        tensors = list(bucket.tensors)
        if self._name in bucket.names:
            place = bucket.names.index(self._name)
            tensors[place] = tensors[place].clone()
            tensors[place].view(-1)[self._element] += 0.5
        self._inner.send(Bucket(names=bucket.names, tensors=tuple(tensors)))


class CorruptingSharing(BucketSharing):
    """Has one rank offer something else than the others in the place of one tensor."""

    def __init__(self, context: ParallelContext, name: str, rank: int) -> None:
        super().__init__(context)
        self._name = name if context.world.rank == rank else None

    def offer(self, bucket: Bucket) -> None:
        tensors = [t + 0.5 if n == self._name else t for n, t in zip(bucket.names, bucket.tensors, strict=True)]
        super().offer(Bucket(names=bucket.names, tensors=tuple(tensors)))


class Rank:
    """One rank of the trainer, and on the first one the engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        sizes = ParallelSettings(tp=job["tp"], pp=job["pp"], timeout_seconds=300.0)
        self.context: ParallelContext = parallel.start(sizes)
        self.arch = architecture(tied=False)
        layout = Layout(tp=job["tp"], pp=job["pp"], dtype=job["dtype"])
        weights = reference_model(self.arch).state_dict()
        self.trainer: Trainer = layout_trainer(layout, sizes, self.context, weights)
        self.first_rank = FirstRank(self.context, silence_seconds=120.0)
        self.engine: SglangEngine | None = None
        if self.context.world.rank == 0:
            expected = Expected(vocab_size=self.arch.vocab_size, longest_sequence=LONGEST)
            self.engine = SglangEngine([job["url"]], SglangSettings(stream_interval=4), expected, in_flight=16)

    def publisher(self, action: dict[str, Any]) -> Publisher:
        group, transport, sharing = None, None, None
        if action["transport"] == "shared":
            sharing = BucketSharing(self.context)
            if "corrupt_rank" in action:
                sharing = CorruptingSharing(self.context, action["corrupt_name"], action["corrupt_rank"])
        if self.engine is not None:
            group = EngineGroup([e.caller for e in self.engine.engines], 240.0, waiting=self.first_rank.alive)
            transport = self.transport(action, group, sharing)
        return Publisher(
            group,
            transport,
            EngineLayout(tp=self.job["server_tp"], device="cpu", dtype=self.job["dtype"]),
            head_dim=self.arch.head_dim,
            context=self.context,
            first_rank=self.first_rank,
            bucket_bytes=action.get("bucket_bytes", 16_000),
            pause_mode=action.get("pause", "abort"),
            verify_mode="checksum",
            sharing=sharing,
        )

    def transport(self, action: dict[str, Any], group: EngineGroup, sharing: BucketSharing | None) -> Transport:
        kind, tp = action["transport"], self.job["server_tp"]
        made: Transport
        if sharing is not None:
            made = SharedTransport(group, sharing, lambda caller: action["ranks"])
        elif kind == "disk":
            made = DiskTransport(
                group, WeightFiles(Path(self.job["directory"]), hf_config(self.arch, dtype=self.job["dtype"]), keep=2)
            )
        elif kind == "distributed":
            made = DistributedTransport(group, tp=tp, device=torch.device("cpu"))
        else:
            made = TensorTransport(group, tp=tp, by_value=kind == "value")
        if "corrupt" not in action:
            return made
        return Corrupting(made, action["corrupt"], action.get("element", 0))  # type: ignore[return-value]

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        return hf_named_tensors(self.trainer.trainable.model, self.arch, self.context)

    def act(self, action: dict[str, Any]) -> dict[str, Any]:
        """Publish the weights of a seed, then generate and score."""
        weights = reference_model(self.arch, seed=action["version"]).state_dict()
        load_hf_weights(self.trainer.trainable.model, self.arch, self.context, weights.__getitem__)
        publisher = self.publisher(action)
        if "left_open" in action and self.engine is not None:  # as by a trainer that was killed in the middle of a set
            answer = httpx2.post(f"{self.job['url']}/begin_weight_update", json={"selector": "all"}, timeout=60)
            answer.raise_for_status()
        meanwhile = self.generate_meanwhile(action) if "during" in action else None
        try:
            report = publisher.publish(self.stream(), version=action["version"])
        except KlearError as error:
            return {"error": type(error).__name__, "text": str(error)}
        finally:
            publisher.close()
        if self.engine is not None:
            self.engine.use_version(action["version"])
        groups = self.share(lambda: self.generate(responses=4, tokens=24, seed=action["version"]))
        result = {"proof": report.proof, "num_bytes": report.num_bytes, "seconds": report.seconds}
        result |= self.compare(groups)
        if meanwhile is not None:
            result["interrupted"] = self.compare(self.share(meanwhile))
        return result

    def share(self, action: Any) -> Any:
        """What rank 0 makes, on every rank."""
        made = [None]
        if self.context.world.rank == 0:
            made = [action()]
        dist.broadcast_object_list(made, src=0)
        return made[0]

    def generate(
        self,
        *,
        responses: int,
        tokens: int,
        seed: int,
        stops: tuple[int, ...] = (),
        on_progress: ProgressCallback | None = None,
    ) -> list[RolloutGroup]:
        assert self.engine is not None
        rng = np.random.default_rng(seed)
        prompts = [
            Prompt(
                prompt_id=f"p{i}",
                domain="math",
                token_ids=rng.integers(0, self.arch.vocab_size, 5 + 3 * i),
                reference="",
            )
            for i in range(3)
        ]
        sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=tokens, stop_token_ids=stops)
        return self.engine.generate(
            prompts, num_responses=responses, sampling=sampling, seed=seed, on_progress=on_progress
        )

    def generate_meanwhile(self, action: dict[str, Any]) -> Any:
        """Start a long generation before the publish; returns what waits for its spans of versions.

        There are more responses than the server takes at once, and they end at any length: whenever the publish comes,
        some are on their way.
        """
        if self.engine is None:
            return lambda: None
        found: list[list[RolloutGroup]] = []
        begun = threading.Event()
        thread = threading.Thread(
            target=lambda: found.append(
                self.generate(
                    responses=action["during"],
                    tokens=80,
                    seed=99,
                    stops=(action["stop"],),
                    on_progress=lambda _: begun.set(),
                )
            )
        )
        thread.start()
        assert begun.wait(120.0)

        def wait() -> list[RolloutGroup]:
            thread.join()
            return found[0]

        return wait

    def compare(self, groups: list[RolloutGroup]) -> dict[str, Any]:
        """What the engine and the trainer say of each response's tokens, and the version that each came from."""
        sequences, sampled = [], []
        for group in groups:
            for index, rollout in enumerate(group.rollouts):
                ids = np.concatenate([group.prompt.token_ids, rollout.response_ids])
                zeros = np.zeros(len(ids), np.float32)
                sequences.append(
                    TrainSequence(
                        sequence_id=f"{group.prompt.prompt_id}#{index}",
                        token_ids=ids,
                        policy_weight=zeros,
                        lm_weight=zeros,
                        advantages=zeros,
                        old_logprobs=zeros,
                        rollout_logprobs=zeros,
                    )
                )
                sampled.append(rollout.rollout_logprobs)
        scored = self.trainer.token_logprobs(sequences, temperature=1.0)
        return {
            "tokens": [s.token_ids.tolist() for s in sequences],
            "versions": [np.repeat(*zip(*r.policy_versions, strict=True)).tolist() for g in groups for r in g.rollouts],
            "engine": [values.tolist() for values in sampled],
            "trainer": [values[-len(s) :].tolist() for values, s in zip(scored, sampled, strict=True)],
        }


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    rank = Rank(job)
    results = [rank.act(action) for action in job["actions"]]
    if rank.context.world.rank == 0:
        assert rank.engine is not None
        Path(job["result"]).write_text(json.dumps(results))
        rank.engine.close()
    dist.barrier()
    parallel.stop()


if __name__ == "__main__":
    main(sys.argv[1])
