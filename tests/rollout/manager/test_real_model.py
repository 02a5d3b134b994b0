"""The manager over a real model: every token's logprob is that of the weights of the version it carries."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megatron_klear.config import SchedulingSettings
from megatron_klear.records import Grade, Prompt, RolloutGroup
from megatron_klear.rollout import LocalEngine
from megatron_klear.rollout.endpoint import GeneratedPart, GenerationRequest, Silence
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.ledger import Ledger, LedgerReader
from megatron_klear.rollout.manager import RolloutManager, Sampling
from megatron_klear.rollout.manager.work import response_seed

M, PER_STEP, STEPS, VOCAB, SEED = 2, 2, 5, 29, 11
PARAMS = SamplingParams(temperature=0.8, top_p=1.0, max_response_tokens=40, stop_token_ids=(3,))


class Gate:
    """Keeps the responses of some prompts behind their first tokens, until they are interrupted."""

    def __init__(self) -> None:
        self.held: set[int] = set()  # by their seeds
        self.reached = threading.Event()

    def hold(self, prompts: Sequence[Prompt]) -> None:
        self.reached.clear()
        self.held = {response_seed(SEED, 0, prompt.prompt_id, index) for prompt in prompts for index in range(M)}


class LocalEndpoint:
    """The in-process engine, a few tokens at a time, so that it can be interrupted between them."""

    def __init__(self, name: str, engine: LocalEngine, gate: Gate) -> None:
        self.name, self.engine, self.gate = name, engine, gate
        self._lock = asyncio.Lock()
        self._interruptions = 0

    async def generate(self, request: GenerationRequest, on_tokens=None) -> GeneratedPart:
        began = self._interruptions
        tokens, logprobs, versions, finish = np.empty(0, np.int64), np.empty(0, np.float32), {}, "abort"
        while finish == "abort" and self._interruptions == began:
            async with self._lock:  # the engine serves one call at a time
                rollout = await asyncio.to_thread(self._some, request, tokens)
            tokens = np.concatenate([tokens, rollout.response_ids])
            logprobs = np.concatenate([logprobs, rollout.rollout_logprobs])
            for version, count in rollout.policy_versions:
                versions[version] = versions.get(version, 0) + count
            if rollout.finish_reason == "stop" or len(tokens) == request.max_new_tokens:
                finish = rollout.finish_reason
            if on_tokens is not None:
                on_tokens(len(tokens))
            while request.seed in self.gate.held and finish == "abort" and self._interruptions == began:
                self.gate.reached.set()
                await asyncio.sleep(0.005)
        return GeneratedPart(
            token_ids=tokens, logprobs=logprobs, finish_reason=finish, policy_versions=tuple(versions.items())
        )

    def _some(self, request: GenerationRequest, so_far: np.ndarray):
        from dataclasses import replace

        prompt = Prompt(
            prompt_id=f"{request.seed}+{len(so_far)}", domain="math", reference="",
            token_ids=np.concatenate([request.token_ids, so_far]),
        )  # fmt: skip
        # One, where it is to be interrupted: of four the last may be the end.
        most = 1 if request.seed in self.gate.held else 4
        few = replace(request.sampling, max_response_tokens=min(most, request.max_new_tokens - len(so_far)))
        [group] = self.engine.generate([prompt], num_responses=1, sampling=few, seed=request.seed)
        return group.rollouts[0]

    async def abort(self, request_id: str | None) -> None:
        self._interruptions += 1  # of all requests: their rest is sent again

    async def check(self) -> int:
        return self.engine.policy_version

    def silence(self) -> Silence:
        return Silence(seconds=0.0, is_first=False)

    async def close(self) -> None:
        self.engine.close()


def grade(groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
    return [[Grade(outcome="correct", reward=1.0) for _ in group.rollouts] for group in groups]


def logprobs_of(model, ids: np.ndarray) -> np.ndarray:
    """Of each token but the first, at the sampling temperature, by a full forward pass without a cache."""
    logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double() / PARAMS.temperature
    return torch.log_softmax(logits, -1)[:-1].gather(-1, torch.from_numpy(ids)[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_logprobs_are_those_of_each_tokens_version(make_reference, make_engine, make_prompts, tmp_path, mode):
    weights = [make_reference(seed=version) for version in range(STEPS + 1)]  # of another seed each: far apart
    gate = Gate()
    endpoints = [LocalEndpoint(f"engine {i}", make_engine(weights[0], batch_responses=4), gate) for i in range(2)]
    prompts = make_prompts(5, 3, 9, 4, 7, 6, 8, 5, 3, 6, 4, 7, 5, 9, 3, 6, 4, 7)
    trained = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        settings = SchedulingSettings(mode=mode, max_staleness=2, in_flight=4)
        sampling = Sampling(params=PARAMS, num_responses=M, seed=SEED, vocab_size=VOCAB)
        with RolloutManager(
            endpoints, ledger, settings=settings, sampling=sampling, groups_per_step=PER_STEP, grade=grade, version=0,
            next_step=1,
        ) as manager:  # fmt: skip
            submitted = 0

            def submit(steps: int) -> None:
                nonlocal submitted
                manager.submit([(0, prompt) for prompt in prompts[submitted : steps * PER_STEP]])
                submitted = steps * PER_STEP

            for step in range(1, STEPS + 1):
                if mode == "async":  # however quick the engines are, the publish comes into some response
                    gate.hold(prompts[step * PER_STEP :])
                submit(step + manager.steps_ahead)
                groups = None
                while groups is None:
                    groups = manager.take(step, PER_STEP, timeout=0.2)
                trained += groups
                manager.trained(step, saved_step=step)
                if mode == "async":
                    assert gate.reached.wait(60.0)
                manager.pause_for_publish()
                for endpoint in endpoints:
                    endpoint.engine.update_weights(weights[step].named_parameters(), version=step)
                manager.resume(step)
        with LedgerReader(ledger.file) as reader:
            assert reader.trained_not_once() == []
    assert [g.prompt.prompt_id for g in trained] == [p.prompt_id for p in prompts[: STEPS * PER_STEP]]

    doubles = [make_reference(seed=version).double() for version in range(STEPS + 1)]
    error = plain_error = 0.0
    mixed = 0
    for rollout, prompt in ((r, g.prompt) for g in trained for r in g.rollouts.values()):
        ids, start = np.concatenate([prompt.token_ids, rollout.response_ids]), len(prompt.token_ids) - 1
        versions = np.repeat(*np.array(rollout.policy_versions).T)
        mixed += len(rollout.policy_versions) > 1
        for version in set(versions.tolist()):
            chosen = versions == version
            exact = logprobs_of(doubles[version], ids)[start:][chosen]
            plain_error = max(plain_error, np.abs(logprobs_of(weights[version], ids)[start:][chosen] - exact).max())
            error = max(error, np.abs(rollout.rollout_logprobs[chosen] - exact).max())
        assert len(rollout.response_ids) <= PARAMS.max_response_tokens
    # A cache and other batch sizes change the order of sums, not their number.
    assert error <= 4 * plain_error
    assert (mixed > 0) == (mode == "async")
