"""A trainer that is killed at any instant: the real manager and ledger, simulated engines, and weights made of text.

    python killed_trainer.py DIRECTORY STEPS MODE ORDER

Its weights are the list of all it was trained on, so that they show whatever was trained twice or never. They live
in `weights.json`, replaced whole every other step, like a checkpoint. Engines answer in real time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_klear.config import SchedulingSettings
from megatron_klear.records import Grade, Prompt, RolloutGroup
from megatron_klear.rollout.endpoint import GenerationRequest
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.ledger import Ledger, LedgerPosition, StoredGroup, Terms, position, reconcile
from megatron_klear.rollout.manager import RolloutManager, Sampling
from megatron_klear.rollout.simulation import SimulatedEngine

M, PER_STEP, NUM_PROMPTS, CHECKPOINT_EVERY = 2, 3, 7, 2
PROMPTS = {
    f"p{i}": Prompt(prompt_id=f"p{i}", domain="math", reference="1", token_ids=np.arange(3 + i, dtype=np.int64))
    for i in range(NUM_PROMPTS)
}


def remaining(request: GenerationRequest) -> int:
    digest = hashlib.blake2b(f"{request.seed}+{len(request.token_ids)}".encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % 40


def grade(groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
    return [[Grade(outcome="correct", reward=float(len(r.response_ids))) for r in g.rollouts] for g in groups]


def trained_on(step: int, groups: Sequence[StoredGroup]) -> list[list[object]]:
    """What the weights remember of a step."""
    rows: list[list[object]] = []
    for group in groups:
        tokens = b"".join(group.rollouts[i].response_ids.tobytes() for i in range(M))
        digest = hashlib.blake2b(tokens, digest_size=8).hexdigest()
        assert group.oldest_version is not None
        rows.append([step, group.epoch, group.prompt.prompt_id, digest, step - 1 - group.oldest_version])
    return rows


def main(directory: Path, steps: int, mode: str, order: str) -> None:
    checkpoint = directory / "weights.json"
    saved = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "weights": [], "ledger": None}
    weights, done = saved["weights"], saved["step"]
    stored = None if saved["ledger"] is None else LedgerPosition.from_json(saved["ledger"])
    ledger = Ledger(directory / "ledger.sqlite")
    reconcile(ledger, done, stored, identity="toy", prompts=PROMPTS, num_responses=M, terms=Terms())
    engines = [
        SimulatedEngine(f"engine {i}", remaining=remaining, slots=4, seconds_per_token=0.0005, report_seconds=0.05,
                        version=done)
        for i in range(2)
    ]  # fmt: skip
    settings = SchedulingSettings(mode=mode, order=order, max_staleness=2, in_flight=4)
    params = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=32, stop_token_ids=(7,))
    manager = RolloutManager(
        engines, ledger, settings=settings, sampling=Sampling(params=params, num_responses=M, seed=3, vocab_size=1000),
        groups_per_step=PER_STEP, grade=grade, version=done, next_step=done + 1,
    )  # fmt: skip
    submitted = done * PER_STEP  # the data cursor of the checkpoint
    with ledger, manager:
        for step in range(done + 1, steps + 1):
            while submitted < (step + manager.steps_ahead) * PER_STEP:
                walk = range(submitted, submitted + PER_STEP)
                manager.submit([(i // NUM_PROMPTS, PROMPTS[f"p{i % NUM_PROMPTS}"]) for i in walk])
                submitted += PER_STEP
            groups = None
            while groups is None:
                groups = manager.take(step, PER_STEP, timeout=0.5)
            weights += trained_on(step, groups)
            manager.trained(step, saved_step=step)
            manager.pause_for_publish()
            for engine in engines:
                engine.version = step
            manager.resume(step)
            if step % CHECKPOINT_EVERY == 0 or step == steps:
                state = {"step": step, "weights": weights, "ledger": position(ledger, step).to_json()}
                fresh = checkpoint.with_suffix(".new")
                fresh.write_text(json.dumps(state))
                os.replace(fresh, checkpoint)
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
