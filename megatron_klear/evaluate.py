"""Evaluate a model on benchmarks, or grade responses that are there already.

python -m megatron_klear.evaluate CONFIG.yaml [section.field=value ...]
python -m megatron_klear.evaluate --grade GENERATIONS.jsonl --problems FILE [FILE ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klear.config.command_line import parse_tool_arguments
from megatron_klear.config.evaluating import EVALUATION, EvaluationSettings, load_evaluation, repeated_names
from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_RESUMABLE, DataError, KlearError

if TYPE_CHECKING:
    from megatron_klear.evaluation import Benchmark, Generation
    from megatron_klear.session.grading import Graders

_PURPOSE = """\
Ask a model the problems of benchmarks and grade its answers: avg@n (the accuracy of one response) and pass@k, each with
a 95 % interval by bootstrap over problems. Responses are kept in run.dir; started again, only missing ones are drawn.

run.preset=32k and run.preset=64k set what the paper's evaluation used. To grade responses that are there already, see
`python -m megatron_klear.evaluate --grade --help`."""
_ABOUT = """\
Grade a file of generations against the problems they answer, without any model. Figures are avg@n (the accuracy of one
response) and pass@k, each with a 95 % interval by bootstrap over problems."""
_FORMS = """\
generations, JSON lines:  {"problem_id", "response", "index"?, "benchmark"?, "finish_reason"?, "num_tokens"?}
                          or `responses`, a list, in place of `response`
problems, JSON lines or Parquet:
                          prompt rows {"id", "domain", "messages", "reference"}, or AIME, HMMT and LiveCodeBench rows
                          as they are published; a benchmark has its file's name

Writes DIR/grades.jsonl, results.json, evaluation.html (to read responses beside their grades) and, where rows could not
be used, rejects.jsonl.

Exit status: 0 done, 2 wrong input, 1 failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--grade" in arguments:
            return grade_file(_parser().parse_args(arguments))
        settings = parse_tool_arguments(
            arguments, module="evaluate", purpose=_PURPOSE, schema=EVALUATION, load=load_evaluation
        )
        return evaluate_model(settings)
    except KlearError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"{error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; start again to go on: responses that were complete are kept", file=sys.stderr)
        return EXIT_RESUMABLE


def evaluate_model(settings: EvaluationSettings) -> int:
    """Ask, draw what is missing, grade, write, show."""
    from megatron_klear.evaluation.asking import read_benchmarks
    from megatron_klear.session.grading import GraderSettings, require_sandbox
    from megatron_klear.session.run_lock import alone_in

    benchmarks = read_benchmarks(settings.benchmarks)
    if any(row.domain == "code" for benchmark in benchmarks for row in benchmark.rows):
        require_sandbox(GraderSettings(reward=settings.reward, code_reward=settings.code_reward))
    with alone_in(Path(settings.run.dir), "run.dir"):
        return _ask_and_grade(benchmarks, settings)


def _ask_and_grade(benchmarks: Sequence[Benchmark], settings: EvaluationSettings) -> int:
    from megatron_klear.evaluation.asking import facts_of, generations_of
    from megatron_klear.evaluation.generations import write_generations
    from megatron_klear.evaluation.writing import GENERATIONS_FILE
    from megatron_klear.session.grading import Graders, GraderSettings

    out = Path(settings.run.dir)
    made = generations_of(benchmarks, settings)
    write_generations(out / GENERATIONS_FILE, (item for items in made.values() for item in items))
    graders = Graders(GraderSettings(reward=settings.reward, code_reward=settings.code_reward))
    return _finish(
        out,
        benchmarks,
        made,
        graders,
        facts=facts_of(settings),
        seed=settings.run.seed,
        ks=settings.benchmarks.pass_at,
        require_complete=settings.benchmarks.require_complete,
    )


def grade_file(options: argparse.Namespace) -> int:
    """Grade a generations file: read, match, judge, write, show."""
    from megatron_klear.evaluation import Benchmark, Contests, benchmark_name, read_benchmark
    from megatron_klear.session.run_lock import alone_in

    wrong = repeated_names(options.problems, "--problems")
    if wrong:
        raise DataError(wrong)
    contests = Contests(first=options.contests_from, last=options.contests_until)
    out = options.out or options.grade.with_name(f"{options.grade.stem}-graded")
    benchmarks = [
        Benchmark(name=benchmark_name(path), rows=tuple(read_benchmark(path, setting="--problems", contests=contests)))
        for path in options.problems
    ]
    with alone_in(out, "--out"):
        return _match_and_grade(out, benchmarks, options)


def _match_and_grade(out: Path, benchmarks: Sequence[Benchmark], options: argparse.Namespace) -> int:
    from megatron_klear.evaluation import Rejects, matched, read_generations
    from megatron_klear.evaluation.writing import REJECTS_FILE
    from megatron_klear.session.grading import Graders, GraderSettings, Tags, require_sandbox

    rejects = Rejects(f"the generations {options.grade}", out / REJECTS_FILE)
    made = matched(read_generations(options.grade, rejects), benchmarks, rejects)
    if options.prompt_opens_think:
        made = {
            name: [replace(item, response=options.think_start + item.response) for item in items]
            for name, items in made.items()
        }
    if not any(made.values()):
        rejects.raise_if_any()
        raise DataError([f"GENERATIONS: {options.grade} holds no responses"])
    grading = GraderSettings(
        reward=RewardSettings(
            require_think=options.require_think, timeout_seconds=options.timeout, workers=options.workers
        ),
        code_reward=CodeRewardSettings(workers=options.workers, sandbox=options.sandbox),
        tokenizer=Tags(think_start=options.think_start, think_end=options.think_end),
    )
    if any(row.domain == "code" for benchmark in benchmarks for row in benchmark.rows):
        require_sandbox(grading)
    notes = [f"{len(rejects)} generations could not be used; {rejects.path.name} says why"] if rejects else []
    facts = {"model": f"generations of {options.grade}", "thinking part required": options.require_think}
    return _finish(
        out,
        benchmarks,
        made,
        Graders(grading),
        facts=facts,
        seed=options.seed,
        ks=options.pass_at,
        notes=notes,
        require_complete=options.require_complete,
    )


def _finish(
    out: Path,
    benchmarks: Sequence[Benchmark],
    made: Mapping[str, Sequence[Generation]],
    graders: Graders,
    *,
    facts: Mapping[str, Any],
    seed: int,
    ks: Sequence[int],
    notes: Sequence[str] = (),
    require_complete: bool = False,
) -> int:
    """Grade, write all files, and print the table."""
    from megatron_klear.evaluation import judge, results_table, write_evaluation
    from megatron_klear.evaluation.results import coverage_lines
    from megatron_klear.evaluation.writing import PAGE_FILE
    from megatron_klear.observe.console import make_console
    from megatron_klear.observe.work_progress import WorkProgress

    judged = {}
    with closing(graders), WorkProgress("grading", sum(map(len, made.values())), noun="responses") as progress:
        for benchmark in benchmarks:
            judged[benchmark.name] = judge(benchmark, made[benchmark.name], graders, progress.advance)
    results = write_evaluation(out, benchmarks, judged, facts=facts, seed=seed, ks=ks, notes=notes)
    console = make_console(sys.stdout)
    console.print(results_table(results))
    for note in notes:
        console.print(note, highlight=False, markup=False)
    incomplete = coverage_lines(results)
    for line in incomplete:
        console.print(line, style="bold red", highlight=False, markup=False)
    console.print(f"responses beside their grades: {out / PAGE_FILE}", highlight=False, markup=False, soft_wrap=True)
    if require_complete and incomplete:
        raise DataError([*incomplete, "all files are written, but complete figures were asked for"])
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_klear.evaluate",
        description=_ABOUT,
        epilog=_FORMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--grade", type=Path, required=True, metavar="GENERATIONS", help="responses to grade")
    parser.add_argument("--problems", nargs="+", required=True, metavar="FILE", help="the problems they answer")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: GENERATIONS-graded, beside the file")
    parser.add_argument("--pass-at", type=_ks, default=(), metavar="K,K", help="default: powers of two up to n")
    for name, which in (("from", "first"), ("until", "last")):
        parser.add_argument(
            f"--contests-{name}", type=_day, metavar="DAY", help=f"{which} day of LiveCodeBench's contests to count"
        )
    parser.add_argument("--workers", type=_positive, default=4, metavar="N", help="grading processes (default: 4)")
    parser.add_argument("--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="per answer (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--think-start", default="<think>", metavar="TAG", help="opens the thinking part (default: <think>)"
    )
    parser.add_argument("--think-end", default="</think>", metavar="TAG", help="closes it (default: </think>)")
    parser.add_argument(
        "--sandbox", choices=("bubblewrap", "rlimits"), default="bubblewrap",
        help="what code runs in (default: bubblewrap; rlimits alone lets it read files)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-opens-think", action="store_true",
        help="the chat template ends prompts with the opening tag, so that responses begin inside the thinking part",
    )  # fmt: skip
    parser.add_argument(
        "--require-think", action="store_true",
        help="responses without a closed thinking part are malformed; default: the whole response is read then",
    )  # fmt: skip
    parser.add_argument(
        "--require-complete", action="store_true",
        help="fail with status 2, all files written, where a figure does not cover all problems",
    )  # fmt: skip
    return parser


def _ks(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number from 1")
    return int(text)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a day such as 2025-02-01") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a number of seconds above 0 and at most 86400")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
