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
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError, DataError
from megatron_klear.planning import (
    DEVICES,
    Assumptions,
    StoredLengths,
    best_layouts,
    device_problems,
    make_plan,
    plan_as_json,
    print_layouts,
    print_plan,
    settings_in_the_way,
    stored_lengths,
)

_ABOUT = """\
Say whether a layout is possible, what memory it takes on every pipeline stage's worst rank, what it sends, how long a
step takes, and with --search which layouts would be faster. Nothing is started, and the files that the settings name
need not be there: a plan can be made on another machine (set model.preset, then, so that the sizes are known). Where
data.sft is tokenized already and can be seen, its lengths are planned with, else assumed ones; the plan says which."""

_MOST_GPUS = 65_536
"""More than any cluster has; a plan counts rank by rank, and such a search is a matter of a minute."""

_EPILOG = "exit status: 0 the layout is possible and fits, 2 it is not or does not"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    options = _parse(argv)
    config, *overrides = options.settings
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        entry: Entry = options.entry or _entry_of(config, overrides, options.gpus)
        per_node = min(DEVICES[options.gpu].per_node, options.gpus)
        settings, problems = judge_plan(
            config, overrides, entry=entry, world_size=options.gpus, ranks_per_machine=per_node
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    problems += device_problems(settings, entry=entry, gpus=options.gpus, device_name=options.gpu)
    in_the_way: list[str] = []
    if problems and options.search:
        in_the_way = settings_in_the_way(settings, entry=entry, gpus=options.gpus, device_name=options.gpu)
    judged = len(problems)
    lengths = _lengths(settings, entry, options.mean_tokens, problems)
    if len(problems) > judged:
        in_the_way.append("data.sft")
    stored = lengths if isinstance(lengths, StoredLengths) else None
    assumed = Assumptions(
        efficiency=options.efficiency, fp8_efficiency=options.fp8_efficiency, mean_tokens=options.mean_tokens,
        why_assumed=lengths if isinstance(lengths, str) else "",
    )  # fmt: skip
    if problems:
        print(ConfigError(problems), file=sys.stderr)
    shared = {
        "entry": entry, "gpus": options.gpus, "device_name": options.gpu, "assumptions": assumed, "lengths": stored,
    }  # fmt: skip
    plan = None if problems else make_plan(settings, **shared)
    best = best_layouts(settings, **shared) if options.search and not in_the_way else []
    if options.json:
        found = None if plan is None else plan_as_json(plan)
        layouts = [plan_as_json(candidate.plan) for candidate in best[: options.top]]
        print(
            json.dumps(
                {
                    "problems": problems,
                    "plan": found,
                    **({"layouts": layouts, "not_searched_for": in_the_way} if options.search else {}),
                }
            )
        )
    else:
        if plan is not None:
            print_plan(console, plan)
        if best:
            print_layouts(console, best, options.top, plan)
        elif options.search and in_the_way:
            print(f"--search: no layout is searched for until the above is changed: {', '.join(in_the_way)}")
        elif options.search:
            print(_nothing_fits(settings, options.gpus, options.gpu))
    return EXIT_DONE if plan is not None and plan.fits else EXIT_BAD_INPUT


def _lengths(settings: Settings, entry: Entry, mean_tokens: float | None, problems: list[str]) -> StoredLengths | str:
    """Lengths by the index of `data.sft`, or why they are assumed; what a run would be refused for is a problem."""
    if mean_tokens is not None:
        return "--mean-tokens asks for that"
    if entry == "rl":
        return "responses are not known before"
    try:
        return stored_lengths(settings)
    except DataError as error:
        problems.append(str(error))
        return "the data have problems"


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
    parser.add_argument("--gpus", type=_gpus, required=True, metavar="N", help="ranks of the trainer")
    parser.add_argument("--gpu", choices=sorted(DEVICES), required=True, help="what they run on")
    parser.add_argument("--entry", choices=["sft", "rl"], help="which entry will run (the one that data is given for)")
    parser.add_argument("--search", action="store_true", help="also rank the layouts that fit")
    parser.add_argument("--top", type=_count, default=10, metavar="N", help="layouts to show (10)")
    parser.add_argument("--json", action="store_true", help="print figures for programs, in bytes and seconds")
    parser.add_argument(
        "--mean-tokens", type=_positive, metavar="N",
        help="mean length of a sequence, prompt included (as data.sft is tokenized, else 0.31 of the longest)",
    )  # fmt: skip
    parser.add_argument(
        "--efficiency", type=_share, default=Assumptions().efficiency, metavar="X",
        help="share of the data sheet's product rate that is reached (0.6)",
    )  # fmt: skip
    parser.add_argument(
        "--fp8-efficiency", type=_share, default=Assumptions().fp8_efficiency, metavar="X",
        help="the same for products in FP8, of the rate for them (0.5)",
    )  # fmt: skip
    return parser.parse_intermixed_args(argv)


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return int(text)


def _gpus(text: str) -> int:
    count = _count(text)
    if count > _MOST_GPUS:
        raise argparse.ArgumentTypeError(f"got {count:,}, expected at most {_MOST_GPUS:,}")
    return count


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
