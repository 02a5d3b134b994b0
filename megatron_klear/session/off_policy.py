"""The engine's policy against the trainer's old one: weights that correct for it, metrics, and when it is too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_klear.algorithm import OffPolicyCorrection, OffPolicyStats, off_policy_weights
from megatron_klear.config import CorrectionSettings
from megatron_klear.errors import MismatchError
from megatron_klear.observe import names
from megatron_klear.records import FloatArray, ScoredGroup
from megatron_klear.session.agreement import Agreement
from megatron_klear.session.session import Session
from megatron_klear.trainer import rollout_logprobs

WeightProof = Literal["same tensors", "checksum", "logprobs", "recorded"]
"""How it is known that an engine's weights of a version are the trainer's: it is handed the tensors themselves; each
tensor's checksum; only the log-probabilities of a probe; or not at all, for another run's tokens that are replayed."""


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """The tokens of some sequences end to end, prompts included.

    Attributes:
        names: [N] of the sequences.
        lengths: [N] tokens of each.
        old_logprobs, rollout_logprobs: [T], nats.
        sampled: bool [T], true for tokens of responses.
        versions: int64 [T], the weights that sampled each token; -1 at prompts.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    sampled: torch.Tensor
    versions: torch.Tensor

    def weigh(
        self, settings: CorrectionSettings, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, OffPolicyStats]:
        """Weights and statistics of the sampled tokens, or of those in a mask."""
        correction = OffPolicyCorrection(
            kind=settings.kind,
            cap=settings.cap,
            low=settings.low,
            high=settings.high,
            sequence_ratio=settings.sequence_ratio,
        )
        sequence_of = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        mask = self.sampled if mask is None else mask
        return off_policy_weights(
            self.old_logprobs, self.rollout_logprobs, mask, sequence_of, correction, bound=settings.bound
        )


def sampled_tokens(groups: Sequence[ScoredGroup], old: Mapping[str, FloatArray]) -> SampledTokens:
    """Lay the scored sequences of a step end to end.

    Args:
        groups: the step's groups.
        old: the trainer's logprobs by sequence name, float32 [L].
    """
    engine = rollout_logprobs(groups)
    versions = {
        f"{g.group.prompt.prompt_id}#{j}": np.repeat(
            [-1, *(version for version, _ in rollout.policy_versions)],
            [len(g.group.prompt.token_ids), *(count for _, count in rollout.policy_versions)],
        )
        for g in groups
        for j, rollout in enumerate(g.group.rollouts)
    }
    of_tokens = torch.from_numpy(np.concatenate([versions[name] for name in old]))
    return SampledTokens(
        tuple(old),
        tuple(len(values) for values in old.values()),
        torch.from_numpy(np.concatenate(list(old.values()))),
        torch.from_numpy(np.concatenate([engine[name] for name in old])),
        of_tokens >= 0,
        of_tokens,
    )


def off_policy(
    session: Session,
    groups: Sequence[ScoredGroup],
    old: Mapping[str, FloatArray],
    *,
    published: int,
    proof: WeightProof,
) -> tuple[dict[str, FloatArray] | None, dict[str, float]]:
    """Compare the engine's logprobs with the trainer's; the same on every rank.

    Args:
        session: the run.
        groups: the step's groups.
        old: the trainer's logprobs by sequence name, float32 [L]; its sequences are compared.
        published: version of the weights that `old` is from.
        proof: how it is known that engines have the weights of the versions they report.

    Returns:
        Off-policy weights by sequence name, float32 [L], None with `correction.kind=none`; and metrics of the step.

    Raises:
        MismatchError: past `correction.stop_above_mean` or `correction.stop_above_share`.
    """
    if not old:
        return None, {}
    settings = session.settings.correction
    tokens = sampled_tokens(groups, old)
    weights, stats = tokens.weigh(settings)
    step = session.step + 1
    require_agreement(tokens, stats, settings, step=step, published=published, proof=proof, agreed=session.agreement)
    current = tokens.sampled & (tokens.versions >= published)
    if current.any():
        alike = tokens.weigh(settings, current)[1]
        agrees = not _exceeded(alike, settings)
        session.agreement = Agreement(step, int(current.sum()), alike.values()["mean_abs"]) if agrees else None
    values, metrics = stats.values(), _distance(tokens, stats, published)
    if settings.kind == "none":
        return None, metrics
    metrics[names.CORRECTION_WEIGHT_MEAN] = values["weight_mean"]
    metrics[names.CORRECTION_SHARE_CUT] = values["share_cut"]
    metrics[names.CORRECTION_SAMPLE_SIZE] = values["effective_sample_size"]
    parts = weights.to(torch.float32).split(tokens.lengths)
    return {name: part.numpy() for name, part in zip(tokens.names, parts, strict=True)}, metrics


def left_out_mismatch(
    session: Session,
    groups: Sequence[ScoredGroup],
    old: Mapping[str, FloatArray],
    *,
    published: int,
    proof: WeightProof,
) -> dict[str, float]:
    """As `off_policy` for the sample of groups that are not trained on: the same limits, no weights.

    Returns:
        The distance, for a step that trains on nothing, and its mean under a name of its own.

    Raises:
        MismatchError: past `correction.stop_above_mean` or `correction.stop_above_share`.
    """
    if not old:
        return {}
    settings = session.settings.correction
    tokens = sampled_tokens(groups, old)
    _, stats = tokens.weigh(settings)
    of = f" on {len(groups)} responses of groups that are not trained on"
    require_agreement(
        tokens, stats, settings, step=session.step + 1, published=published, proof=proof,
        agreed=session.agreement, of=of,
    )  # fmt: skip
    metrics = _distance(tokens, stats, published)
    return metrics | {names.MISMATCH_LEFT_OUT_MEAN_ABS: metrics[names.MISMATCH_MEAN_ABS]}


def _distance(tokens: SampledTokens, stats: OffPolicyStats, published: int) -> dict[str, float]:
    values = stats.values()
    stale = (tokens.sampled & (tokens.versions < published)).sum() / tokens.sampled.sum()
    return {
        names.KL_ROLLOUT_TRAINER: values["kl_k3"],
        names.KL_ROLLOUT_TRAINER_K1: values["kl_k1"],
        names.MISMATCH_MEAN_ABS: values["mean_abs"],
        names.MISMATCH_MAX_ABS: values["max_abs"],
        names.MISMATCH_SHARE_BEYOND: values["share_beyond"],
        names.MISMATCH_SHARE_STALE: float(stale),
    }


def require_agreement(
    tokens: SampledTokens,
    stats: OffPolicyStats,
    settings: CorrectionSettings,
    *,
    step: int,
    published: int,
    proof: WeightProof,
    agreed: Agreement | None = None,
    of: str = "",
) -> None:
    """Stop a run whose engine and trainer are too far apart, and say where the difference comes from.

    Three causes look alike in the mean. Tokens of the published version that differ are numerics, when the engine's
    weights are known to be the trainer's bit by bit; else they may be of other weights than the engine reports. Where
    only tokens of older versions differ it is their age. Where there are no others, those of an earlier step, `agreed`,
    may have shown that both compute alike; else nothing tells age from numerics.

    Raises:
        MismatchError: past a limit, or a log-probability is not a number.
    """
    if not _exceeded(stats, settings):
        return
    current, older = tokens.sampled & (tokens.versions >= published), tokens.sampled & (tokens.versions < published)
    passed = "; ".join(_exceeded(stats, settings))
    lines = [f"step {step}: engine and trainer disagree{of}: {passed}. No update was made."]
    found = {}
    for name, mask in ((f"version {published}, the published one", current), ("older versions", older)):
        if mask.any():
            found[name] = tokens.weigh(settings, mask)[1]
            values = found[name].values()
            lines.append(
                f"  tokens of {name}: {int(mask.sum())}, mean |difference| {values['mean_abs']:.3g} nats, "
                f"largest {values['max_abs']:.3g}, {values['share_beyond']:.2%} beyond {settings.bound:g}"
            )
    if current.any() and _exceeded(next(iter(found.values())), settings):
        lines.append(_AT_PUBLISHED_VERSION[proof].format(version=published))
    else:
        first, last = int(tokens.versions[older].min()), int(tokens.versions[older].max())
        if current.any():
            text = _STALENESS
        elif proof == "recorded":
            text = _RECORDED_EARLIER
        else:
            text = _ALL_ARE_OLD if agreed is None else _STALENESS + _AGREED_BEFORE
        lines.append(text.format(first=first, last=last, version=published, agreed=agreed, now=step))
    raise MismatchError("\n".join(lines))


_NUMERICS = (
    "Cause: numerics. The engine has the trainer's weights and computes other numbers from them: compare data type, "
    "quantisation, attention, temperature and end tokens of both."
)
_UNKNOWN_WEIGHTS = (
    "Cause: stale weights, or numerics. The engine reports version {version}, which log-probabilities of a probe "
    "proved within weight_sync.logprob_tolerance and no checksum: set weight_sync.verify=checksum where the engine's "
    "weights are not quantised; if that passes it is numerics."
)
_RECORDED = (
    "Cause: other weights, or numerics. The tokens were recorded by the run in scheduling.replay_from as of its "
    "version {version}, and nothing tells whether this run's weights are the same: compare both runs' first weights "
    "and settings; if they are equal it is numerics."
)
_AT_PUBLISHED_VERSION: Mapping[WeightProof, str] = {
    "same tensors": _NUMERICS,
    "checksum": _NUMERICS,
    "logprobs": _UNKNOWN_WEIGHTS,
    "recorded": _RECORDED,
}
_STALENESS = (
    "Cause: staleness. These tokens were sampled by versions {first} to {last}, and version {version} is published: "
    "allow less staleness, or lower optimizer.lr; a correction.kind makes up for some of it, under a higher limit."
)
_AGREED_BEFORE = (
    " All tokens of this step are older than the published version; the newest that were not, {agreed.tokens} of step "
    "{agreed.step}, agreed: mean |difference| {agreed.mean_abs:.3g} nats. Where that says too little of step {now}, "
    "weight_sync.verify=logprobs compares engine and trainer with the same weights at every publish."
)
_RECORDED_EARLIER = (
    "Cause: other weights, staleness, or numerics. The tokens were recorded by the run in scheduling.replay_from as of "
    "its versions {first} to {last}, and nothing tells whether this run's weights are the ones that it had at version "
    "{version}: a replay that begins later needs its checkpoint of the step before (scheduling.replay_first_step). "
    "Where that run had scheduling.rollout_only, all its steps were recorded from the weights of step {first} alone, "
    "and each one that is trained makes the tokens of the next staler: lower optimizer.lr, or record fewer steps."
)
_ALL_ARE_OLD = (
    "Cause: staleness, or numerics. All tokens were sampled by versions {first} to {last}, and version {version} is "
    "published, so that none tells one from the other, and no step since this start of the run has. "
    "weight_sync.verify=logprobs compares engine and trainer with the same weights at every publish, and so does every "
    "step with scheduling.mode=sync: where these agree it is staleness, and less of it, a lower optimizer.lr, or a "
    "correction.kind under a higher limit helps."
)


def _exceeded(stats: OffPolicyStats, settings: CorrectionSettings) -> list[str]:
    """The limits that are passed, in words; a NaN passes every limit."""
    values, found = stats.values(), []
    mean, share = settings.stop_above_mean, settings.stop_above_share
    if mean is not None and not values["mean_abs"] <= mean:
        found.append(f"mean |difference| {values['mean_abs']:.3g} nats, correction.stop_above_mean = {mean:g}")
    if share is not None and not values["share_beyond"] <= share:
        found.append(
            f"{values['share_beyond']:.2%} of tokens beyond correction.bound = {settings.bound:g} nats, "
            f"correction.stop_above_share = {share:g}"
        )
    return found
