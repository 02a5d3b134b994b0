"""Which curves a report shows, as plain data: nothing here draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_klear.observe import names
from megatron_klear.observe.series import PhaseLog, Series, add

Format = Literal["number", "percent", "quantity", "bytes", "seconds"]
PHASE_TITLES = {"sft": "SFT", "rl": "RL", "eval": "Evaluation"}

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = range(8)
"""Places in the palette of `theme`, which people with any colour vision can tell apart."""

OUTCOME_COLORS = {"correct": GREEN, "wrong": RED, "partial": YELLOW, "malformed": PURPLE, "ungraded": GREY}


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A curve, or a layer of a stack.

    Attributes:
        label: what it is, as in a legend.
        color: place in the palette.
        dashed: drawn dashed, the second way of telling curves apart.
        error: half the height of a band or an error bar at each step.
        points: every value is an event of its own (an evaluation): markers and error bars, no smoothing.
        smooth: with many steps, drawn as a moving average over the faint curve of every step.
    """

    label: str
    series: Series
    color: int
    dashed: bool = False
    error: Series | None = None
    points: bool = False
    smooth: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One pair of axes: the curves of one training phase."""

    phase: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chart:
    """One picture of the report.

    Attributes:
        key: short name for anchors and files.
        title: what is shown.
        y_label: the quantity with its unit.
        note: one sentence on how to read it.
        panels: one per training phase that has the numbers.
        values: how numbers on the axis are written.
        stacked: layers on one another instead of curves.
        from_zero: the axis starts at zero.
        share_y: all panels have the same axis.
        spiky: a few values may tower over the rest: smoothed by a median, on a logarithmic axis where needed.
    """

    key: str
    title: str
    y_label: str
    note: str
    panels: tuple[Panel, ...]
    values: Format = "number"
    stacked: bool = False
    from_zero: bool = False
    share_y: bool = False
    spiky: bool = False


def build_charts(logs: Sequence[PhaseLog]) -> list[Chart]:
    """The charts for which these phases have numbers, most important first."""
    charts = [_accuracy(logs), _loss(logs), *_rl_charts(logs), *_engine_charts(logs), *_optimizer_charts(logs)]
    return [chart for chart in charts if chart.panels]


def _accuracy(logs: Sequence[PhaseLog]) -> Chart:
    def lines(log: PhaseLog) -> list[Line]:
        error = log.series(names.ACCURACY_HELDOUT_STDERR)
        return [
            Line("training problems", log.series(names.ACCURACY_TRAIN), GREY),
            Line("held-out problems", log.series(names.ACCURACY_HELDOUT), BLUE, error=error, points=True),
        ]

    return Chart(
        key="accuracy",
        title="Accuracy",
        y_label="share of answers correct",
        note="Bars are one standard error of the held-out accuracy.",
        panels=_panels(logs, lines),
        values="percent",
        from_zero=True,
        share_y=True,
    )


def _loss(logs: Sequence[PhaseLog]) -> Chart:
    def lines(log: PhaseLog) -> list[Line]:
        total = Line("total", log.series(names.LOSS_TOTAL), BLUE)
        parts = [
            Line("policy", log.series(names.LOSS_POLICY), ORANGE),
            Line("language model", log.series(names.LOSS_LM), GREEN, dashed=True),
        ]
        return [total] if log.phase == "sft" else [total, *parts]

    return Chart(
        key="loss",
        title="Loss",
        y_label="loss",
        note="In RL the loss says little by itself: the advantages change with every batch. Look at the reward.",
        panels=_panels(logs, lines),
    )


def _rl_charts(logs: Sequence[PhaseLog]) -> list[Chart]:
    def reward(log: PhaseLog) -> list[Line]:
        return [Line("mean", log.series(names.REWARD_MEAN), GREEN, error=log.series(names.REWARD_STD))]

    def length(log: PhaseLog) -> list[Line]:
        return [
            Line("longest", log.series(names.RESPONSE_LENGTH_MAX), SKY, dashed=True),
            Line("mean", log.series(names.RESPONSE_LENGTH_MEAN), BLUE),
        ]

    def groups(log: PhaseLog) -> list[Line]:
        return [
            Line("before the filter", log.series(names.FILTER_GROUPS_TOTAL), GREY, dashed=True),
            Line("kept", log.series(names.FILTER_GROUPS_KEPT), GREEN),
        ]

    def mismatch(log: PhaseLog) -> list[Line]:
        return [
            Line("largest", log.series(names.MISMATCH_MAX_ABS), ORANGE),
            Line("mean", log.series(names.MISMATCH_MEAN_ABS), BLUE, dashed=True),
            Line("mean of left-out groups", log.series(names.MISMATCH_LEFT_OUT_MEAN_ABS), GREY, dashed=True),
        ]

    def correction(log: PhaseLog) -> list[Line]:
        return [
            Line("effective sample size", log.series(names.CORRECTION_SAMPLE_SIZE), BLUE),
            Line("ratios truncated or masked", log.series(names.CORRECTION_SHARE_CUT), ORANGE, dashed=True),
        ]

    return [
        Chart(
            key="reward",
            title="Reward",
            y_label="reward per response",
            note="The band is one standard deviation of the responses of a step.",
            panels=_panels(logs, reward),
        ),
        Chart(
            key="length",
            title="Response length",
            y_label="tokens",
            note="Mean and longest response of each step.",
            panels=_panels(logs, length),
            values="quantity",
            from_zero=True,
        ),
        Chart(
            key="entropy",
            title="Entropy",
            y_label="nats per token",
            note="How undecided the policy is; a fall towards zero means that exploration has ended.",
            panels=_panels(logs, _one(names.ENTROPY_MEAN, "entropy", PURPLE)),
        ),
        _clip(logs, "clip", "Tokens outside the trust region", "share of tokens"),
        _clip(logs, "clip_mass", "Gradient mass outside the trust region", "share of gradient mass"),
        Chart(
            key="kl",
            title="KL of rollout and trainer policy",
            y_label="nats per token",
            note="The same weights in two programs: near zero is right, a rise means stale or wrong weights.",
            panels=_panels(logs, _one(names.KL_ROLLOUT_TRAINER, "KL", ORANGE)),
        ),
        Chart(
            key="mismatch",
            title="Log-probability mismatch",
            y_label="nats",
            note="Between engine and trainer: the worst single token of a step, and the mean.",
            panels=_panels(logs, mismatch),
        ),
        Chart(
            key="correction",
            title="Off-policy correction",
            y_label="share",
            note="A small effective sample size means that few samples carry the update.",
            panels=_panels(logs, correction),
            values="percent",
            from_zero=True,
        ),
        _grades(logs),
        Chart(
            key="truncated",
            title="Truncated responses",
            y_label="share of responses",
            note="Responses that ran into the token limit.",
            panels=_panels(logs, _one(names.RESPONSE_TRUNCATED_FRACTION, "truncated", RED)),
            values="percent",
            from_zero=True,
        ),
        Chart(
            key="filter",
            title="Zero-advantage filter",
            y_label="prompt groups",
            note="Groups whose responses all got the same reward teach nothing and are left out.",
            panels=_panels(logs, groups),
            from_zero=True,
        ),
    ]


def _engine_charts(logs: Sequence[PhaseLog]) -> list[Chart]:
    def engines(log: PhaseLog) -> list[Line]:
        return [
            Line("serving", log.series(names.ENGINES_SERVING), GREEN, smooth=False),
            Line("busy, on average", log.series(names.ENGINES_BUSY), SKY, smooth=False),
            Line("lost", log.series(names.ENGINES_LOST), RED, dashed=True, smooth=False),
            Line("back again", log.series(names.ENGINES_REJOINED), BLUE, dashed=True, smooth=False),
        ]

    def requests(log: PhaseLog) -> list[Line]:
        found = [
            Line("failed, malformed included", log.series(names.REQUESTS_FAILED), ORANGE, smooth=False),
            Line("malformed", log.series(names.REQUESTS_MALFORMED), PURPLE, dashed=True, smooth=False),
            Line("abandoned", log.series(names.REQUESTS_ABANDONED), RED, smooth=False),
            Line("moved", log.series(names.REQUESTS_MOVED), SKY, smooth=False),
            Line("groups drawn again", log.series(names.REQUESTS_GROUPS_REDRAWN), GREY, dashed=True, smooth=False),
        ]
        # In a run without trouble there is nothing to draw; the figures below say so.
        return [line for line in found if line.series.finite.values.any()]

    return [
        Chart(
            key="engines",
            title="Rollout engines",
            y_label="engines",
            note="Engines that serve after a step's publish; busy, lost and back again since the step before.",
            panels=_panels(logs, engines),
            from_zero=True,
        ),
        Chart(
            key="requests",
            title="Requests in trouble",
            y_label="requests per step",
            note="All were sent again. Malformed answers that go on mean an engine that samples something else.",
            panels=_panels(logs, requests),
            from_zero=True,
        ),
    ]


def _optimizer_charts(logs: Sequence[PhaseLog]) -> list[Chart]:
    return [
        Chart(
            key="grad_norm",
            title="Gradient norm",
            y_label="norm before clipping",
            note="Spikes are updates that clipping scaled down. The strong line is a moving median.",
            panels=_panels(logs, _one(names.OPTIMIZER_GRAD_NORM, "norm", BLUE)),
            spiky=True,
        ),
        Chart(
            key="lr",
            title="Learning rate",
            y_label="learning rate",
            note="After warm-up and schedule.",
            panels=_panels(logs, _one(names.OPTIMIZER_LR, "rate", GREY, smooth=False)),
            from_zero=True,
        ),
        Chart(
            key="speed",
            title="Throughput",
            y_label="tokens per second",
            note="Trained tokens of all ranks per second of the whole step, padding not counted.",
            panels=_panels(logs, _one(names.TOKENS_PER_SECOND, "tokens/s", GREEN)),
            values="quantity",
            from_zero=True,
        ),
        _utilization(logs),
        _packing(logs),
        Chart(
            key="balance",
            title="Balance of data parallel ranks",
            y_label="most over mean",
            note="Operations of the rank with the most over the mean; at 1.1, the others wait a tenth of their time.",
            panels=_panels(logs, _one(names.FLOPS_MAX_OVER_MEAN, "operations", ORANGE)),
        ),
        Chart(
            key="phases",
            title="Where the time goes",
            y_label="seconds per step",
            note="Seconds of each phase of a step.",
            panels=_panels(logs, _phase_layers(logs)),
            stacked=True,
            from_zero=True,
        ),
        Chart(
            key="memory",
            title="Peak memory",
            y_label="memory of one process",
            note="CUDA memory where there is a GPU, resident host memory elsewhere.",
            panels=_panels(logs, _one(names.MEMORY_PEAK_BYTES, "peak", GREY, smooth=False)),
            values="bytes",
            from_zero=True,
        ),
    ]


def _packing(logs: Sequence[PhaseLog]) -> Chart:
    def lines(log: PhaseLog) -> list[Line]:
        return [
            Line("of packed positions", log.series(names.SLOTS_USED), SKY),
            Line("of the token budget of all packs", log.series(names.BUDGET_USED), ORANGE, dashed=True),
        ]

    return Chart(
        key="packing",
        title="Packing",
        y_label="share that holds a token",
        note="The rest of the packed positions is padding, that of packing.token_budget also short and empty packs.",
        panels=_panels(logs, lines),
        values="percent",
    )


def _utilization(logs: Sequence[PhaseLog]) -> Chart:
    def lines(log: PhaseLog) -> list[Line]:
        return [
            Line("of the products measured on the device", log.series(names.MFU), BLUE),
            Line("of the data sheet's bfloat16 rate", log.series(names.MFU_DATASHEET), ORANGE, dashed=True),
        ]

    return Chart(
        key="mfu",
        title="Model FLOP utilization",
        y_label="share of the device's rate",
        note="Operations that the model needs per second of training it; recomputation and padding are not counted.",
        panels=_panels(logs, lines),
        values="percent",
        from_zero=True,
    )


def _clip(logs: Sequence[PhaseLog], group: str, title: str, y_label: str) -> Chart:
    def lines(log: PhaseLog) -> list[Line]:
        found = []
        for region in names.CLIP_REGIONS:
            side, sign = region.split("_")
            label = f"ratio {side}, advantage {'> 0' if sign == 'positive' else '< 0'}"
            series = log.series(f"{group}/{region}")
            found.append(Line(label, series, BLUE if side == "low" else ORANGE, dashed=sign == "negative"))
        return found

    note = "Clipping drops the gradient of (low, < 0) and (high, > 0); GPPO keeps it, bounded."
    return Chart(
        key=group,
        title=title,
        y_label=y_label,
        note=note,
        panels=_panels(logs, lines),
        values="percent",
        from_zero=True,
    )


def _grades(logs: Sequence[PhaseLog]) -> Chart:
    def layers(log: PhaseLog) -> list[Line]:
        found = [Line(o, log.series(names.grades(o)), OUTCOME_COLORS[o]) for o in names.OUTCOMES]
        # An outcome that never came up would only lengthen the legend.
        return [line for line in found if line.series.finite.values.any()]

    return Chart(
        key="grades",
        title="Grades",
        y_label="responses per step",
        note="What the grader said; ungraded responses are left out of training.",
        panels=_panels(logs, layers),
        stacked=True,
        from_zero=True,
    )


def _phase_layers(logs: Sequence[PhaseLog]) -> Callable[[PhaseLog], list[Line]]:
    """Layers of seconds, each phase of the step in the same colour in every panel, the smallest summed up."""
    palette = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED)
    totals: dict[str, float] = {}
    for log in logs:
        for name in log.names(names.PHASE_SECONDS_PREFIX):
            totals[name] = totals.get(name, 0.0) + float(log.series(name).finite.values.sum())
    colors = dict(zip(sorted(totals, key=lambda name: -totals[name]), palette, strict=False))

    def layers(log: PhaseLog) -> list[Line]:
        found = log.names(names.PHASE_SECONDS_PREFIX)
        lines = [
            Line(name.removeprefix(names.PHASE_SECONDS_PREFIX).replace("_", " "), log.series(name), colors[name])
            for name in found
            if name in colors
        ]
        rest = [log.series(name) for name in found if name not in colors]
        if rest:
            lines.append(Line("other", add(rest), GREY))
        return lines

    return layers


def _one(name: str, label: str, color: int, *, smooth: bool = True) -> Callable[[PhaseLog], list[Line]]:
    return lambda log: [Line(label, log.series(name), color, smooth=smooth)]


def _panels(logs: Sequence[PhaseLog], lines: Callable[[PhaseLog], list[Line]]) -> tuple[Panel, ...]:
    panels = []
    for log in logs:
        drawn = tuple(line for line in lines(log) if len(line.series))
        if drawn:
            panels.append(Panel(log.phase, drawn))
    return tuple(panels)
