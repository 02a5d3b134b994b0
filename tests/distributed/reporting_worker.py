"""A rank that checks what an update reports, then compares as always: `reporting_worker.py JOB`.

Ends with an assertion unless every rank reports the same, and that is what loops over transformers in float64 count.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.algorithm import REGION_NAMES
from megatron_klear.config import Architecture
from megatron_klear.conformance import compare, worker
from megatron_klear.conformance.matrix import Comparison, Layout
from megatron_klear.conformance.reference import reference_model
from megatron_klear.observe.flops import training_flops
from megatron_klear.packing import attention_share, plan_packs, sequence_multiple
from megatron_klear.trainer import Trainer, UpdateReport


def _mean_entropy(layout: Layout, sequences: list[Any]) -> float:
    """Over all tokens with a weight, from full logits."""
    model = reference_model(compare.architecture(layout.tied)).double()
    found = []
    with torch.no_grad():
        for s in sequences:
            logits = model(input_ids=torch.as_tensor(s.token_ids)[None]).logits[0, :-1] / layout.temperature
            trained = (s.policy_weight != 0) | (s.lm_weight != 0)
            found.append(torch.distributions.Categorical(logits=logits).entropy()[trained[1:]])
    return float(torch.cat(found).mean())


def _regions(sequences: list[Any], exact: list[np.ndarray]) -> dict[str, float]:
    """Shares of tokens and of |weight A F| in the regions, F by the cases of Eq. 12, token by token."""
    tokens, mass = dict.fromkeys((*REGION_NAMES, "all"), 0.0), dict.fromkeys((*REGION_NAMES, "all"), 0.0)
    for s, logprobs in zip(sequences, exact, strict=True):
        for t in np.flatnonzero(s.policy_weight):
            ratio, advantage = float(np.exp(logprobs[t] - s.old_logprobs[t])), float(s.advantages[t])
            scale = 0.8 if ratio < 0.8 and advantage < 0 else 1.28 if ratio > 1.28 and advantage > 0 else ratio
            side = "low" if ratio < 0.8 else "high" if ratio > 1.28 else None
            places = ["all"] + ([f"{side}_{'positive' if advantage > 0 else 'negative'}"] if side else [])
            for place in places:
                tokens[place] += 1
                mass[place] += abs(float(s.policy_weight[t]) * advantage * scale)
    shares = {f"tokens/{name}": tokens[name] / tokens["all"] for name in REGION_NAMES}
    return shares | {f"gradient/{name}": mass[name] / mass["all"] for name in REGION_NAMES}


def _check(
    report: UpdateReport, layout: Layout, reference: compare.Reference, processes: int, arch: Architecture
) -> None:
    sequences = reference.sequences
    assert report.tokens == sum(layout.lengths)
    weights = [(s.policy_weight != 0) | (s.lm_weight != 0) for s in sequences]
    assert report.predicted_tokens == sum(int(trained.sum()) for trained in weights)
    assert report.loss == report.policy_loss + report.lm_loss
    lm_loss = -sum(float((s.lm_weight * v).sum()) for s, v in zip(sequences, reference.exact.logprobs, strict=True))
    # Sums of some 200 float32 terms near 1e-2; and ratios of float32 logprobs, whose error is near 1e-6.
    np.testing.assert_allclose(report.lm_loss, lm_loss, rtol=1e-5)
    np.testing.assert_allclose(report.entropy, _mean_entropy(layout, sequences), rtol=1e-5)
    found, wanted = report.regions.fractions(), _regions(sequences, reference.exact.logprobs)
    assert found.keys() == wanted.keys()
    for name, share in wanted.items():
        np.testing.assert_allclose(found[name], share, rtol=1e-5, err_msg=name)
        assert share > 0, name
    plan = plan_packs(
        layout.lengths,
        token_budget=layout.token_budget,
        dp_size=layout.dp(processes),
        multiple=sequence_multiple(layout.cp),
        share=attention_share(arch),
    )
    assert report.microbatches == plan.num_microbatches
    assert 0.8 < report.slots_used <= 1.0
    budgets = layout.dp(processes) * plan.num_microbatches * layout.token_budget
    np.testing.assert_allclose(report.budget_used, sum(layout.lengths) / budgets, rtol=1e-12)
    work = []
    for rank in plan.microbatches:
        own = [index for pack in rank for index in pack]
        trained_tokens = sum(int(weights[index].sum()) for index in own)
        work.append(training_flops(arch, [layout.lengths[index] for index in own], trained_tokens).total)
    np.testing.assert_allclose(report.flops_max_over_mean, max(work) / np.mean(work), rtol=1e-12)
    assert report.lr == compare.OPTIMIZER.lr


def check_report_then_compare(
    layout: Layout, references: compare.References, *, device: str, timeout_seconds: float
) -> Comparison:
    """The report of one update in a layout, and the comparison of another from the same weights."""
    began = time.monotonic()
    sizes = compare.parallel_settings(layout, timeout_seconds)
    context = parallel.start(sizes, device=device)
    reference = references.get(layout)
    trainer: Trainer = compare.layout_trainer(layout, sizes, context, reference.weights)
    report = trainer.update(reference.sequences, compare.objective_of(layout), step=1, temperature=layout.temperature)
    lengths = [len(s.token_ids) for s in reference.sequences]
    counted, wanted = trainer.take_flops(), training_flops(trainer.arch, lengths, report.predicted_tokens)
    for part, flops in asdict(wanted).items():
        np.testing.assert_allclose(asdict(counted)[part], flops, rtol=1e-12, err_msg=part)
    told = asdict(report) | {"regions": report.regions.sums.tolist()}
    everyone: list[Any] = [None] * context.world.size
    dist.all_gather_object(everyone, told)
    assert all(other == told for other in everyone), everyone
    _check(report, layout, reference, context.world.size, trainer.arch)
    again = compare.layout_trainer(layout, sizes, context, reference.weights)
    comparison = compare._compare(layout, again, reference, began)
    del trainer, again, context
    parallel.reset_layout()
    return comparison


if __name__ == "__main__":
    worker.main(Path(sys.argv[1]), check_report_then_compare)
