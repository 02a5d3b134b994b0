"""The metric names: the contract between whoever logs a number and whoever reads or plots it.

`mismatch/*` and `kl/*` speak of the response tokens of the step's graded responses that are trained on; in a step that
trains on none, of up to 8 responses of the others, which `mismatch/left_out_mean_abs` always speaks of.

`METRICS` says of each name its unit and what it means; metrics.jsonl, TensorBoard and the report all use
these names as they stand. Names are grouped by the part before the first slash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_klear.records import Outcome

Phase = Literal["sft", "rl", "eval"]
"""What kind of work a line of metrics.jsonl speaks of."""

LOSS_TOTAL = "loss/total"
LOSS_POLICY = "loss/policy"
LOSS_LM = "loss/lm"
REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
ACCURACY_TRAIN = "accuracy/train"
ACCURACY_HELDOUT = "accuracy/heldout"
ACCURACY_HELDOUT_COUNT = "accuracy/heldout_count"
ACCURACY_HELDOUT_STDERR = "accuracy/heldout_stderr"
ENTROPY_MEAN = "entropy/mean"
KL_ROLLOUT_TRAINER = "kl/rollout_trainer"
KL_ROLLOUT_TRAINER_K1 = "kl/rollout_trainer_k1"
MISMATCH_MEAN_ABS = "mismatch/mean_abs"
MISMATCH_MAX_ABS = "mismatch/max_abs"
MISMATCH_SHARE_BEYOND = "mismatch/share_beyond"
MISMATCH_SHARE_STALE = "mismatch/share_stale"
MISMATCH_LEFT_OUT_MEAN_ABS = "mismatch/left_out_mean_abs"
CORRECTION_WEIGHT_MEAN = "correction/weight_mean"
CORRECTION_SHARE_CUT = "correction/share_cut"
CORRECTION_SAMPLE_SIZE = "correction/effective_sample_size"
CLIP_LOW_POSITIVE = "clip/low_positive"
CLIP_LOW_NEGATIVE = "clip/low_negative"
CLIP_HIGH_POSITIVE = "clip/high_positive"
CLIP_HIGH_NEGATIVE = "clip/high_negative"
CLIP_MASS_LOW_POSITIVE = "clip_mass/low_positive"
CLIP_MASS_LOW_NEGATIVE = "clip_mass/low_negative"
CLIP_MASS_HIGH_POSITIVE = "clip_mass/high_positive"
CLIP_MASS_HIGH_NEGATIVE = "clip_mass/high_negative"
RESPONSE_LENGTH_MEAN = "response/length_mean"
RESPONSE_LENGTH_MAX = "response/length_max"
RESPONSE_TRUNCATED_FRACTION = "response/truncated_fraction"
FILTER_GROUPS_KEPT = "filter/groups_kept"
FILTER_GROUPS_TOTAL = "filter/groups_total"
ENGINES_SERVING = "engines/serving"
ENGINES_BUSY = "engines/busy"
ENGINES_TOKENS_PER_SECOND = "engines/tokens_per_second"
ENGINES_LOST = "engines/lost"
ENGINES_REJOINED = "engines/rejoined"
REQUESTS_IN_FLIGHT = "requests/in_flight"
REQUESTS_SENT = "requests/sent"
REQUESTS_FAILED = "requests/failed"
REQUESTS_MALFORMED = "requests/malformed"
REQUESTS_ABANDONED = "requests/abandoned"
REQUESTS_MOVED = "requests/moved"
REQUESTS_INTERRUPTED = "requests/interrupted"
REQUESTS_GROUPS_REDRAWN = "requests/groups_redrawn"
OPTIMIZER_LR = "optimizer/lr"
OPTIMIZER_GRAD_NORM = "optimizer/grad_norm"
TOKENS_PER_SECOND = "throughput/tokens_per_second"
MODEL_TFLOPS = "throughput/model_tflops"
MFU = "throughput/mfu"
MFU_DATASHEET = "throughput/mfu_datasheet"
ATTENTION_SHARE = "throughput/attention_share"
SLOTS_USED = "packing/slots_used"
BUDGET_USED = "packing/budget_used"
FLOPS_MAX_OVER_MEAN = "packing/flops_max_over_mean"
MEMORY_PEAK_BYTES = "memory/peak_bytes"
MEMORY_HOST_PEAK_BYTES = "memory/host_peak_bytes"

Turn = Literal["trainer", "engines"]
"""Whose a GPU's memory is, where trainer and engines share GPUs."""

TURNS: tuple[Turn, ...] = get_args(Turn)

GRADES_PREFIX = "grades/"
PHASE_SECONDS_PREFIX = "phase_seconds/"

CLIP_REGIONS = ("low_positive", "low_negative", "high_positive", "high_negative")
"""The four regions outside the trust region: ratio below 1 - epsilon_low or above 1 + epsilon_high, by sign of A."""

OUTCOMES: tuple[str, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric measures.

    Attributes:
        unit: as written on an axis; empty for a pure number.
        meaning: one sentence for people.
    """

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    LOSS_TOTAL: Metric("nats", "what the optimizer minimised, mean over the updates of the step"),
    LOSS_POLICY: Metric("", "the policy part of loss/total"),
    LOSS_LM: Metric("nats", "the language-model part of loss/total, its weight alpha included"),
    REWARD_MEAN: Metric("", "mean reward of the graded responses of the step"),
    REWARD_STD: Metric("", "standard deviation of the rewards of the graded responses of the step"),
    ACCURACY_TRAIN: Metric("fraction", "correct responses among the graded ones of the step"),
    ACCURACY_HELDOUT: Metric("fraction", "correct answers among the graded ones to held-out problems"),
    ACCURACY_HELDOUT_COUNT: Metric("answers", "number of graded held-out answers behind accuracy/heldout"),
    ACCURACY_HELDOUT_STDERR: Metric("fraction", "standard error of accuracy/heldout"),
    ENTROPY_MEAN: Metric("nats/token", "mean entropy of the policy over the response tokens it was trained on"),
    KL_ROLLOUT_TRAINER: Metric("nats/token", "KL from the engine's policy at sampling to the trainer's old policy"),
    MISMATCH_MAX_ABS: Metric("nats", "largest absolute difference of a token's engine and trainer log-probability"),
    KL_ROLLOUT_TRAINER_K1: Metric("nats/token", "the same KL by the plain estimator, which may be below 0"),
    MISMATCH_MEAN_ABS: Metric("nats", "mean absolute difference of engine and trainer log-probabilities"),
    MISMATCH_SHARE_BEYOND: Metric("fraction of tokens", "tokens that differ by more than correction.bound"),
    MISMATCH_SHARE_STALE: Metric("fraction of tokens", "tokens sampled by older weights than the published ones"),
    MISMATCH_LEFT_OUT_MEAN_ABS: Metric("nats", "mismatch/mean_abs of up to 8 responses of groups not trained on"),
    CORRECTION_WEIGHT_MEAN: Metric("", "mean off-policy weight of the step's tokens, or sequences by sequence"),
    CORRECTION_SHARE_CUT: Metric("fraction", "off-policy ratios that were truncated or masked"),
    CORRECTION_SAMPLE_SIZE: Metric("fraction", "effective sample size of the off-policy weights"),
    CLIP_LOW_POSITIVE: Metric("fraction of tokens", "tokens with ratio below 1 - epsilon_low and advantage above 0"),
    CLIP_LOW_NEGATIVE: Metric("fraction of tokens", "tokens with ratio below 1 - epsilon_low and advantage below 0"),
    CLIP_HIGH_POSITIVE: Metric("fraction of tokens", "tokens with ratio above 1 + epsilon_high and advantage above 0"),
    CLIP_HIGH_NEGATIVE: Metric("fraction of tokens", "tokens with ratio above 1 + epsilon_high and advantage below 0"),
    CLIP_MASS_LOW_POSITIVE: Metric("fraction", "share of weight * |A| * F on the tokens of clip/low_positive"),
    CLIP_MASS_LOW_NEGATIVE: Metric("fraction", "share of weight * |A| * F on the tokens of clip/low_negative"),
    CLIP_MASS_HIGH_POSITIVE: Metric("fraction", "share of weight * |A| * F on the tokens of clip/high_positive"),
    CLIP_MASS_HIGH_NEGATIVE: Metric("fraction", "share of weight * |A| * F on the tokens of clip/high_negative"),
    RESPONSE_LENGTH_MEAN: Metric("tokens", "mean length of the responses of the step"),
    RESPONSE_LENGTH_MAX: Metric("tokens", "length of the longest response of the step"),
    RESPONSE_TRUNCATED_FRACTION: Metric("fraction", "responses that stopped at the token limit"),
    FILTER_GROUPS_KEPT: Metric("groups", "prompt groups left after the zero-advantage filter"),
    FILTER_GROUPS_TOTAL: Metric("groups", "prompt groups before the zero-advantage filter"),
    ENGINES_SERVING: Metric("engines", "engines that take requests at the end of the step's publish"),
    ENGINES_BUSY: Metric("engines", "engines with a request in flight, mean over the time since the step before"),
    ENGINES_TOKENS_PER_SECOND: Metric("tokens/s", "tokens that all engines brought, per second since the step before"),
    ENGINES_LOST: Metric("engines", "engines given up since the step before: dead, hung, or with other weights"),
    ENGINES_REJOINED: Metric("engines", "lost engines that serve again, since the step before"),
    REQUESTS_IN_FLIGHT: Metric("requests", "requests in flight, mean over the time since the step before"),
    REQUESTS_SENT: Metric("requests", "requests sent to engines since the step before, repeated ones counted again"),
    REQUESTS_FAILED: Metric("requests", "requests that brought no sound answer and were repeated, malformed included"),
    REQUESTS_MALFORMED: Metric("requests", "answers that cannot be right; the response is drawn again from there"),
    REQUESTS_ABANDONED: Metric("requests", "requests taken back from engines that were lost or lost them"),
    REQUESTS_MOVED: Metric("requests", "requests interrupted at a slow engine, to go on at another"),
    REQUESTS_INTERRUPTED: Metric("requests", "requests that ended before their response did, and were continued"),
    REQUESTS_GROUPS_REDRAWN: Metric("groups", "prompt groups drawn again because their tokens had become too old"),
    OPTIMIZER_LR: Metric("", "learning rate of the step's last update"),
    OPTIMIZER_GRAD_NORM: Metric("", "gradient norm before clipping, mean over the step's updates"),
    TOKENS_PER_SECOND: Metric("tokens/s", "trained tokens of all ranks, without padding, per second of the step"),
    MODEL_TFLOPS: Metric("TFLOP/s", "operations that the model needs, per second of training it, per device"),
    MFU: Metric("fraction", "throughput/model_tflops as a share of the matrix products measured on the device"),
    MFU_DATASHEET: Metric("fraction", "throughput/model_tflops as a share of the data sheet's bfloat16 rate"),
    ATTENTION_SHARE: Metric("fraction", "causal attention's part of the model's operations"),
    SLOTS_USED: Metric("fraction", "packed positions that hold a token, not padding"),
    BUDGET_USED: Metric("fraction", "packing.token_budget of all packs that holds a token; short packs lower it"),
    FLOPS_MAX_OVER_MEAN: Metric("", "model operations of the data parallel rank with the most, over their mean"),
    MEMORY_PEAK_BYTES: Metric("bytes", "peak of one process: allocated CUDA memory, or host memory without CUDA"),
    MEMORY_HOST_PEAK_BYTES: Metric("bytes", "peak resident host memory of one process"),
}
_AT_TURN = {
    "device_free_bytes": "free memory of the fullest GPU (of the host without CUDA)",
    "device_used_bytes": "memory used on the fullest GPU (by one process without CUDA)",
    "host_free_bytes": "host memory that could still be had",
    "host_used_bytes": "host memory of the largest process",
    "trainer_bytes": "weights, optimizer state and gradients that one process has on its device",
}
METRICS |= {
    f"memory_at_turn/{turn}_{name}": Metric("bytes", f"{meaning}, after memory was handed to the {turn}")
    for turn in TURNS
    for name, meaning in _AT_TURN.items()
}
METRICS |= {f"{GRADES_PREFIX}{outcome}": Metric("responses", f"responses graded {outcome}") for outcome in OUTCOMES}


def grades(outcome: str) -> str:
    """Name of the number of responses with this outcome.

    Raises:
        ValueError: if `outcome` is none of `OUTCOMES`.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome is {outcome!r}, must be one of {', '.join(OUTCOMES)}")
    return GRADES_PREFIX + outcome


def at_turn(turn: Turn, name: str) -> str:
    """Name of an amount of memory measured after the GPUs' memory was handed over.

    Raises:
        ValueError: if `name` is none of the amounts.
    """
    if name not in _AT_TURN:
        raise ValueError(f"name is {name!r}, must be one of {', '.join(_AT_TURN)}")
    return f"memory_at_turn/{turn}_{name}"


def phase_seconds(name: str) -> str:
    """Name of the seconds that a step spent in the phase `name` (generate, grade, train, ...)."""
    return PHASE_SECONDS_PREFIX + name


def describe(name: str) -> Metric:
    """Unit and meaning of a metric; a name outside the contract gets no unit and itself as its meaning."""
    if name.startswith(PHASE_SECONDS_PREFIX):
        return Metric("s", f"seconds of the step spent in {name.removeprefix(PHASE_SECONDS_PREFIX)}")
    return METRICS.get(name, Metric("", name))
