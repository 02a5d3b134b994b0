"""Check on this machine that the numbers are right: every equation of the paper, and every way to spread the work.

    python -m megatron_klear.verify [--processes 1,2,4] [--device auto|cpu|cuda] [--equations-only | --layouts-only]
    python -m megatron_klear.verify --rewards CONFIG.yaml [section.field=value ...] [--probes FILE]

Arguments are judged before torch is imported.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Sequence

from megatron_klear.conformance.launch import Launch, LaunchResult, plan_launches, run_layouts
from megatron_klear.conformance.matrix import LAYOUTS, Comparison
from megatron_klear.conformance.table import (
    EquationRow,
    LayoutRow,
    equation_table,
    layout_table,
    summary,
)
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED
from megatron_klear.observe.console import make_console

_DESCRIPTION = """\
Check on this machine that the numbers are right, and print what was found as tables.

Equations: each one of the paper that is computed, against a transcription of it, in float64.
Layouts: the training loss, all gradients, all logprobs and the weights after an update, computed by several processes
in many layouts (tensor, sequence, pipeline, context and data parallel, packing, recomputation), against transformers
in one process in float64. Their errors are in units of what transformers loses in the same data type.

With --rewards, in place of these, the rewards of a run's settings: that its filter compares what it trains on, that
no worse response earns more, that a problem has the same tests wherever it occurs, that graders seldom fail, and that
answer keys, other answers and known probes come out as they are known."""

_EPILOG = "Exit status: 0 everything passed, 1 something did not, 2 wrong usage."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print the tables; returns the exit status."""
    began = time.monotonic()
    options = _parse(argv)
    if options.rewards is not None:
        # Megatron warns on import of every optional package that is not there.
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        from megatron_klear.session.reward_lint_command import lint_command

        return lint_command(
            options.rewards,
            options.overrides,
            make_console(sys.stdout),
            probes=options.probes,
            max_ungraded=options.max_ungraded,
            max_rows=options.max_rows,
        )
    import torch

    num_gpus = 0 if options.device == "cpu" else torch.cuda.device_count()
    processes = options.processes or [n for n in LAYOUTS if options.device != "cuda" or n <= max(num_gpus, 1)]
    if options.device == "cuda" and num_gpus < max(processes):
        print(
            f"verify: --device cuda needs one GPU per process; got {max(processes)} processes and {num_gpus} GPUs; "
            "use fewer --processes, or --device auto",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    torch.set_num_threads(1)
    equations: list[EquationRow] = []
    layouts: list[LayoutRow] = []
    failures: list[str] = []
    if not options.layouts_only:
        equations = check_equations([*["cpu"] * (options.device != "cuda"), *["cuda"] * (num_gpus > 0)])
    if not options.equations_only:
        plan = plan_launches(
            processes, options.device, num_gpus=num_gpus, transformer_engine=_transformer_engine(num_gpus)
        )
        for launch in plan:
            result = _run_showing_progress(launch, options.timeout)
            layouts += layout_rows(launch, result)
            if result.failure is not None:
                failures.append(f"Layouts on {_ranks_of(launch)}: {result.failure}")
    console = make_console(sys.stdout)
    plain = not console.is_terminal
    if equations:
        console.print(equation_table(equations, plain=plain))
    if layouts:
        console.print(layout_table(layouts, plain=plain))
    for failure in failures:
        console.print(failure, markup=False, highlight=False, soft_wrap=True)
    console.print(summary(equations, layouts, time.monotonic() - began), markup=False, highlight=False)
    good = not failures and all(row.passed for row in equations) and all(row.passed for row in layouts)
    return EXIT_DONE if good else EXIT_FAILED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_klear.verify",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--processes",
        type=_process_counts,
        metavar="N,N",
        help=f"sizes of the groups of processes to run layouts in, of {_listed(LAYOUTS)} "
        "(default: all; with --device cuda those that have GPUs enough)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: equations and one-process layouts on the CPU and on a GPU if there is one, other layouts on GPUs "
        "if there are enough and on the CPU otherwise (default)",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="for each group of processes; more on a busy or slow machine (default: 600)",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--equations-only", action="store_true", help="leave out the layouts")
    only.add_argument("--layouts-only", action="store_true", help="leave out the equations")
    rewards = parser.add_argument_group("rewards")
    rewards.add_argument("--rewards", metavar="CONFIG.yaml", help="judge the rewards of these settings of train_rl")
    rewards.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    rewards.add_argument(
        "--probes",
        metavar="FILE",
        help='further known answers, JSON lines {"domain", "response", "reference", "expected": outcome}',
    )
    rewards.add_argument(
        "--max-ungraded",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="largest share of problems whose answer key may be ungraded (default: 0.01)",
    )
    rewards.add_argument(
        "--max-rows",
        type=_count,
        default=1000,
        metavar="N",
        help="most problems to grade, evenly spaced (default: 1000)",
    )
    options = parser.parse_args(argv)
    if options.rewards is None and (options.overrides or options.probes):
        parser.error("settings and --probes need --rewards CONFIG.yaml")
    return options


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a number from 0 to 1")
    return share


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number of at least 1")
    return int(text)


def _process_counts(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) in LAYOUTS for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {_listed(LAYOUTS)}, separated by commas")
    return tuple(sorted({int(part) for part in parts}))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a number of seconds from 1 to 86400")
    return seconds


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _transformer_engine(num_gpus: int) -> bool:
    if not num_gpus:
        return False  # it cannot be imported without CUDA, and the attempt takes seconds
    from megatron_klear.model.layer_spec import transformer_engine_is_there

    return transformer_engine_is_there()


def check_equations(devices: Sequence[str]) -> list[EquationRow]:
    """Measure every equation check on each device."""
    import torch

    from megatron_klear.algorithm.equation_checks import equation_checks

    rows = []
    for device in devices:
        for check in equation_checks():
            error = check.measure(torch.device(device))
            rows.append(
                EquationRow(
                    name=check.name,
                    equation=check.equation,
                    device=device,
                    error=error,
                    tolerance=check.tolerance,
                    passed=check.passes(error),
                )
            )
    return rows


def layout_rows(launch: Launch, result: LaunchResult) -> list[LayoutRow]:
    """One row per layout of the launch, also for those that it did not come to."""
    found: list[Comparison | None] = [*result.rows]
    found += [None] * (len(launch.layouts) - len(found))
    return [
        LayoutRow(
            label=layout.label(launch.processes),
            processes=launch.processes,
            device=launch.device,
            comparison=comparison,
        )
        for layout, comparison in zip(launch.layouts, found, strict=True)
    ]


def _ranks_of(launch: Launch) -> str:
    return f"{launch.processes} process{'es' if launch.processes > 1 else ''} ({launch.device})"


def _run_showing_progress(launch: Launch, timeout_seconds: float) -> LaunchResult:
    """Run a launch; on a terminal with a count that goes up, elsewhere with one line on stderr."""
    console = make_console(sys.stderr)
    what = f"{len(launch.layouts)} layouts on {_ranks_of(launch)}"
    done = 0
    if not console.is_terminal:
        print(f"verify: {what} ...", file=sys.stderr, flush=True)
        return run_layouts(launch.layouts, launch.processes, device=launch.device, timeout_seconds=timeout_seconds)
    with console.status(f"{what}: starting") as status:

        def count(row: Comparison) -> None:
            nonlocal done
            done += 1
            status.update(f"{what}: {done} done")

        return run_layouts(
            launch.layouts, launch.processes, device=launch.device, timeout_seconds=timeout_seconds, on_row=count
        )


if __name__ == "__main__":
    sys.exit(main())
