"""Two whole RL steps against loops over transformers in float64: scoring, filter, minibatches, denominators, AdamW.

The entry's own loop trains the real trainer; only what generates and grades is put in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_klear import parallel, train_rl
from megatron_klear.config import (
    AlgorithmSettings,
    Architecture,
    CorrectionSettings,
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RlSettings,
    RolloutSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.conformance.reference import reference_model, sequence_logprobs
from megatron_klear.errors import MismatchError
from megatron_klear.model import build_qwen3, hf_named_tensors, load_hf_weights
from megatron_klear.observe import names
from megatron_klear.records import ParallelContext, ScoredGroup
from megatron_klear.session import evaluation
from megatron_klear.session import groups as step_source
from megatron_klear.session.left_out import left_out_sample
from megatron_klear.trainer import Trainer, make_trainable

MakeGroup = Callable[..., ScoredGroup]

ARCH = Architecture(
    num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=1, head_dim=8,
    vocab_size=29, max_position_embeddings=64, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=False, init_std=0.02,
)  # fmt: skip
TEMPERATURE, ALPHA, LOW, HIGH, STEPS = 0.8, 0.3, 0.2, 0.28, 2
# A large epsilon keeps Adam's first steps smooth in the gradient, so that errors stay comparable; weights move far
# enough for ratios to leave their bounds after the first update of a step.
OPTIMIZER = OptimizerSettings(lr=3e-2, adam_eps=1e-3, clip_grad=0.5, weight_decay=0.1)

BATCHES: list[dict[str, list[float | None]]] = [
    {
        "right": [1, 1, 1],  # no advantage: filtered
        "a": [1, -1, -1, 1],
        "b": [1, None, -1],  # an ungraded response enters nothing
        "lost": [None, None],
        "c": [-1, 0.25, 0.5],  # nothing correct: no part in Eq. 13
        "d": [1, -1],
        "alone": [1, None],
        "e": [-1, 1, -1, -1],
    },
    {name: [1, 1] if i < 5 else [1, -1, 0.5] for i, name in enumerate("fghijklm")},
]
"""Five groups are left of the first batch, three of the second: with 4 per minibatch, updates of 3 + 2 and of 3."""

UPDATES = [[["a", "b", "c"], ["d", "e"]], [["k", "l", "m"]]]


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


def reference_weights(
    dtype: torch.dtype, groups: dict[str, ScoredGroup], normalizer: str, ratios: list[tuple[float, float]]
) -> dict[str, torch.Tensor]:
    """The weights after both steps by the printed equations, token by token; notes (ratio, advantage) as it goes."""
    model = reference_model(ARCH).to(dtype)
    named = dict(model.named_parameters())
    adam = torch.optim.AdamW(
        [{"params": [p for p in named.values() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
         {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0}],
        lr=OPTIMIZER.lr, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), eps=OPTIMIZER.adam_eps,
    )  # fmt: skip

    def response_logprobs(group: ScoredGroup, j: int) -> torch.Tensor:
        prompt = group.group.prompt.token_ids
        ids = np.concatenate([prompt, group.group.rollouts[j].response_ids])
        return sequence_logprobs(model, ids, TEMPERATURE)[len(prompt) :]

    for step in UPDATES:
        with torch.no_grad():
            old = {
                (name, j): response_logprobs(groups[name], j)
                for minibatch in step
                for name in minibatch
                for j in range(len(groups[name].rewards))
            }
        for minibatch in step:
            gppo, lm, lm_tokens = [], [], 0
            for name in minibatch:
                group = groups[name]
                graded = [j for j in range(len(group.rewards)) if group.graded[j]]
                rewards = [float(group.rewards[j]) for j in graded]
                mean = sum(rewards) / len(rewards)
                deviation = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
                per_response, tokens = [], 0
                for j, reward in zip(graded, rewards, strict=True):
                    logprobs, advantage = response_logprobs(group, j), (reward - mean) / deviation
                    delta = torch.exp(logprobs - old[name, j])
                    frozen = delta.detach()
                    bounded = torch.where(
                        frozen < 1 - LOW, (1 - LOW) / frozen * delta,
                        torch.where(frozen > 1 + HIGH, (1 + HIGH) / frozen * delta, delta),
                    )  # fmt: skip
                    per_response.append(torch.minimum(delta * advantage, bounded * advantage))
                    tokens += len(logprobs)
                    ratios.extend((float(r), advantage) for r in frozen)
                    if reward == 1:
                        lm.append(logprobs.sum())
                        lm_tokens += len(logprobs)
                if normalizer == "group":
                    gppo.append(torch.cat(per_response).sum() / tokens)
                else:
                    gppo.append(torch.stack([r.sum() / len(r) for r in per_response]).sum() / len(per_response))
            loss = -sum(gppo) / len(gppo) - ALPHA * sum(lm) / lm_tokens
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
            adam.step()
    return {name: p.detach().double() for name, p in named.items()}


class Run:
    """What `train_rl.train` is given, with the order of what it does noted."""

    def __init__(self, context: ParallelContext, groups: dict[str, ScoredGroup], normalizer: str) -> None:
        self.agreement = None
        sizes = ParallelSettings(distributed_optimizer=False)
        model_settings = ModelSettings(**asdict(ARCH), dtype="float32", layer_spec="local", vocab_multiple=16)
        self.settings = Settings(
            run=RunSettings(dir="unused"),
            tokenizer=TokenizerSettings(dir="unused"),
            model=model_settings,
            parallel=sizes,
            packing=PackingSettings(token_budget=40),
            optimizer=OPTIMIZER,
            rl=RlSettings(steps=STEPS, prompts_per_step=8, minibatch_prompts=4),
            rollout=RolloutSettings(temperature=TEMPERATURE),
            correction=CorrectionSettings(stop_above_mean=100.0),  # made-up responses are far from the policy
            algorithm=AlgorithmSettings(lm_loss_weight=ALPHA, normalizer=normalizer),
        )
        model = build_qwen3(ARCH, model_settings, sizes, context)
        load_hf_weights(model, ARCH, context, reference_model(ARCH).state_dict().__getitem__)
        self.updates_per_step = 2
        trainable = make_trainable(model, OPTIMIZER, sizes, total_updates=STEPS * self.updates_per_step)
        self.trainer = Trainer(trainable, ARCH, self.settings, context)
        self.scored, self.step, self.order, self.logged = groups, 0, [], {}
        # The engine and the graders, whose weights are known to be right.
        self.rollouts, self.proof = self, "same tensors"

    def weights(self) -> dict[str, torch.Tensor]:
        stream = hf_named_tensors(self.trainer.trainable.model, ARCH, self.trainer.context)
        return {name: tensor.double() for name, tensor in stream}

    # What `Session` does.
    def steps(self) -> Iterator[int]:
        for self.step in range(1, STEPS + 1):
            yield self.step

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        self.order.append(name)
        return contextlib.nullcontext()

    def keep_examples(self, rows: list[Any], step: int) -> None:
        self.order.append(f"examples {step}: {rows}")

    def finish_step(self, step: int, values: dict[str, float]) -> None:
        self.order.append(f"finish {step}")
        self.logged[step] = values | {"updates": self.trainer.trainable.schedule.num_steps}

    # What `Rollouts` does.
    def publish(self, version: int) -> None:
        self.order.append(f"publish {version}")

    def hand_to_trainer(self) -> None:
        self.order.append("hand to trainer")

    def examples(self, groups: list[ScoredGroup], step: int) -> list[str]:
        return [f"{len(groups)} groups"]

    # What `RunLedger` does.
    def groups(self, step: int, cursor: Any, rollouts: Run) -> list[ScoredGroup]:
        assert rollouts is self
        self.order.append(f"groups {step}")
        return [self.scored[name] for name in cursor.next_batch()]

    def publishing(self, version: int) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)

    def sharing_engines(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def trained(self, step: int) -> None:
        self.order.append(f"trained {step}")

    # What `Evaluation` does.
    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None: ...

    def at_start(self) -> None:
        self.order.append("evaluate at start")

    def when_due(self, step: int) -> None:
        self.order.append(f"evaluate after {step}")

    def at_end(self) -> None:
        self.order.append("evaluate at end")


@pytest.mark.parametrize("normalizer", ["group", "sequence"])
def test_two_steps_give_the_weights_of_the_printed_equations(
    normalizer: str, context: ParallelContext, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {name: make_group(name, rewards) for batch in BATCHES for name, rewards in batch.items()}
    run = Run(context, groups, normalizer)
    monkeypatch.setattr(evaluation, "Evaluation", lambda session, *_: run)
    monkeypatch.setattr(step_source, "step_groups", lambda session, prompts, rollouts: run)
    rows = iter([list(groups)[:8], list(groups)[8:]])
    train_rl.train(
        run,  # type: ignore[arg-type]
        SimpleNamespace(prompts=list(groups)),  # type: ignore[arg-type]
        SimpleNamespace(next_batch=lambda: next(rows)),  # type: ignore[arg-type]
        None,
    )

    ratios: list[tuple[float, float]] = []
    exact = reference_weights(torch.float64, groups, normalizer, ratios)
    plain = reference_weights(torch.float32, groups, normalizer, [])
    for name, found in run.weights().items():
        # As in the layouts' comparison: at most 8 times what float32 costs the same computation.
        unit = max(float((plain[name] - exact[name]).norm()), 2**-24 * float(exact[name].norm()))
        assert float((found - exact[name]).norm()) <= 8 * unit, name
    ratio, advantage = np.array(ratios).T
    for beyond in (ratio < 1 - LOW, ratio > 1 + HIGH):
        for sign in (advantage > 0, advantage < 0):
            assert np.any(beyond & sign), "a region of Eq. 16 that no token was in"

    step = ["groups {}", "hand to trainer", "old logprobs", "left out logprobs", "train", "trained {}", "publish {}",
            "evaluate after {}", "examples {}: ['8 groups']", "finish {}"]  # fmt: skip
    first, second = ([text.format(number) for text in step] for number in (1, 2))
    first.insert(4, "train")
    assert run.order == ["publish 0", "evaluate at start", *first, *second, "evaluate at end"]
    for number, kept in ((1, 5), (2, 3)):
        logged = run.logged[number]
        assert (logged[names.FILTER_GROUPS_KEPT], logged[names.FILTER_GROUPS_TOTAL]) == (kept, 8)
        assert logged["updates"] == 2 * number, "the schedule counts updates that the filter left out"
        assert logged[names.LOSS_TOTAL] == pytest.approx(logged[names.LOSS_POLICY] + logged[names.LOSS_LM])
        assert logged[names.KL_ROLLOUT_TRAINER] > 0
        assert logged[names.ENTROPY_MEAN] > 0


def test_a_batch_without_any_signal_makes_no_update(
    context: ParallelContext, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {name: make_group(name, [1, 1] if name < "i" else [None, None]) for name in "abcdefghijklmnop"}
    run = Run(context, groups, "group")
    before = run.weights()
    monkeypatch.setattr(evaluation, "Evaluation", lambda session, *_: run)
    monkeypatch.setattr(step_source, "step_groups", lambda session, prompts, rollouts: run)
    rows = iter([list(groups)[:8], list(groups)[8:]])
    train_rl.train(
        run,  # type: ignore[arg-type]
        SimpleNamespace(prompts=list(groups)),  # type: ignore[arg-type]
        SimpleNamespace(next_batch=lambda: next(rows)),  # type: ignore[arg-type]
        None,
    )
    for name, tensor in run.weights().items():
        assert torch.equal(tensor, before[name]), name
    assert not {"train", "old logprobs"} & set(run.order)
    assert run.logged[2]["updates"] == 4
    assert names.LOSS_TOTAL not in run.logged[2]
    assert run.logged[2][names.FILTER_GROUPS_KEPT] == 0
    # By transformers: one response of each of the eight groups; in the second step that of number 2 % 2.
    model, found = reference_model(ARCH).double(), []
    for name in "ijklmnop":
        prompt, rollout = groups[name].group.prompt.token_ids, groups[name].group.rollouts[0]
        ids = np.concatenate([prompt, rollout.response_ids])
        with torch.no_grad():
            ours = sequence_logprobs(model, ids, TEMPERATURE)[len(prompt) :].numpy()
        found.append(np.abs(ours - rollout.rollout_logprobs))
    expected = np.concatenate(found)
    assert run.logged[2][names.MISMATCH_MEAN_ABS] == pytest.approx(expected.mean(), rel=1e-5)
    assert run.logged[2][names.MISMATCH_LEFT_OUT_MEAN_ABS] == run.logged[2][names.MISMATCH_MEAN_ABS]
    assert run.logged[2][names.MISMATCH_MAX_ABS] == pytest.approx(expected.max(), rel=1e-5)


def test_an_engine_that_leaves_nothing_to_train_on_is_still_compared(
    context: ParallelContext, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers are wrong, so that the filter leaves no group, and the engine's log-probabilities are not ours."""
    groups = {name: make_group(name, [-1, -1]) for name in "abcdefgh"}
    run = Run(context, groups, "group")
    run.settings = replace(run.settings, correction=CorrectionSettings(stop_above_mean=0.5))
    monkeypatch.setattr(evaluation, "Evaluation", lambda session, *_: run)
    monkeypatch.setattr(step_source, "step_groups", lambda session, prompts, rollouts: run)
    with pytest.raises(MismatchError, match=r"disagree on 8 responses of groups that are not trained on: mean"):
        train_rl.train(
            run,  # type: ignore[arg-type]
            SimpleNamespace(prompts=list(groups)),  # type: ignore[arg-type]
            SimpleNamespace(next_batch=lambda: list(groups)),  # type: ignore[arg-type]
            None,
        )


def test_the_sample_of_left_out_groups_is_bounded_and_spread(make_group: MakeGroup) -> None:
    groups = [make_group(f"g{i}", [-1, -1, -1]) for i in range(40)]
    kept = groups[::2]
    names_of = [g.group.prompt.prompt_id for g in left_out_sample(groups, kept, step=4)]
    assert names_of == [f"g{i}" for i in (1, 5, 11, 15, 21, 25, 31, 35)]
    for one in left_out_sample(groups, kept, step=4):
        whole = next(g for g in groups if g.group.prompt.prompt_id == one.group.prompt.prompt_id)
        assert one.group.rollouts == whole.group.rollouts[1:2]
    assert len(left_out_sample(groups, groups[3:], step=1)) == 3
    assert left_out_sample(groups, groups, step=1) == []
