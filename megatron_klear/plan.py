"""What a run would take, before any GPU is touched.

python -m megatron_klear.plan CONFIG.yaml [MORE.yaml ...] [section.field=value ...] --gpus N --gpu h100 [--search]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_klear.config import Entry, Settings
from megatron_klear.config.plan_settings import judge_plan
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError
from megatron_klear.planning import (
    DEVICES,
    Assumptions,
    best_layouts,
    make_plan,
    plan_as_json,
    print_layouts,
    print_plan,
)

_ABOUT = """\
Say whether a layout is possible, what memory it takes on every pipeline stage's worst rank, what it sends, how long a
step takes, and with --search which layouts would be faster. Nothing is started, and the files that the settings name
need not be there: a plan can be made on another machine (set model.preset, then, so that the sizes are known)."""

_EPILOG = "exit status: 0 the layout is possible and fits, 2 it is not or does not"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    options = _parse(argv)
    config, *overrides = options.settings
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        entry: Entry = options.entry or _entry_of(config, overrides, options.gpus)
        settings, problems = judge_plan(config, overrides, entry=entry, world_size=options.gpus)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    if settings.fp8.recipe != "none" and DEVICES[options.gpu].fp8_flops is None:
        title = DEVICES[options.gpu].title
        problems.append(f"fp8.recipe: got {settings.fp8.recipe}, and {title} has no FP8; set none, or another --gpu")
    assumed = Assumptions(efficiency=options.efficiency, mean_tokens=options.mean_tokens)
    if problems:
        print(ConfigError(problems), file=sys.stderr)
    shared = {"entry": entry, "gpus": options.gpus, "device_name": options.gpu, "assumptions": assumed}
    plan = None if problems else make_plan(settings, **shared)
    best = best_layouts(settings, **shared) if options.search else []
    if options.json:
        found = None if plan is None else plan_as_json(plan)
        layouts = [plan_as_json(candidate.plan) for candidate in best[: options.top]]
        print(json.dumps({"problems": problems, "plan": found, **({"layouts": layouts} if options.search else {})}))
    else:
        if plan is not None:
            print_plan(console, plan)
        if best:
            print_layouts(console, best, options.top, plan)
        elif options.search:
            print(_nothing_fits(settings, options.gpus, options.gpu))
    return EXIT_DONE if plan is not None and plan.fits else EXIT_BAD_INPUT


def _nothing_fits(settings: Settings, gpus: int, device_name: str) -> str:
    return (
        f"no layout fits on {gpus} x {DEVICES[device_name].title}: use more or larger devices (--gpus, --gpu), or "
        f"lower packing.token_budget, which is {settings.packing.token_budget}"
    )


def _entry_of(config: str, overrides: Sequence[str], gpus: int) -> Entry:
    """The entry that the data is for.

    Raises:
        ConfigError: unreadable settings, or data for both or neither.
    """
    settings, _ = judge_plan(config, overrides, entry="rl", world_size=gpus)
    sft, rl = bool(settings.data.sft), bool(settings.data.prompts)
    if sft == rl:
        names = "both data.sft and data.prompts name" if sft else "neither data.sft nor data.prompts names"
        raise ConfigError([f"--entry: {names} files; say sft or rl"])
    return "sft" if sft else "rl"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_klear.plan", description=_ABOUT, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "settings", nargs="+", metavar="CONFIG.yaml | section.field=value", help="as given to train_sft or train_rl"
    )
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="ranks of the trainer")
    parser.add_argument("--gpu", choices=sorted(DEVICES), required=True, help="what they run on")
    parser.add_argument("--entry", choices=["sft", "rl"], help="which entry will run (the one that data is given for)")
    parser.add_argument("--search", action="store_true", help="also rank the layouts that fit")
    parser.add_argument("--top", type=_count, default=10, metavar="N", help="layouts to show (10)")
    parser.add_argument("--json", action="store_true", help="print figures for programs, in bytes and seconds")
    parser.add_argument(
        "--mean-tokens", type=_positive, metavar="N",
        help="mean length of a sequence, prompt included (0.31 of the longest)",
    )  # fmt: skip
    parser.add_argument(
        "--efficiency", type=_share, default=Assumptions().efficiency, metavar="X",
        help="share of the data sheet's product rate that is reached (0.6)",
    )  # fmt: skip
    return parser.parse_intermixed_args(argv)


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    number = _number(text)
    if not (number >= 1 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"got {text}, expected a number of at least 1")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0 and at most 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    sys.exit(main())
