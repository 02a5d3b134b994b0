"""Evaluate a model on benchmarks, or grade responses that are there already.

python -m megatron_klear.evaluate CONFIG.yaml [section.field=value ...]
python -m megatron_klear.evaluate --grade GENERATIONS.jsonl --problems FILE [FILE ...]
python -m megatron_klear.evaluate --grade GENERATIONS.jsonl --config CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klear.config.command_line import parse_tool_arguments
from megatron_klear.config.evaluating import (
    EVALUATION,
    EvaluationSettings,
    as_day,
    load_evaluation,
    load_grading,
    repeated_names,
)
from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_RESUMABLE, DataError, KlearError

if TYPE_CHECKING:
    from megatron_klear.evaluation import Benchmark, Generation
    from megatron_klear.session.grading import Graders, GraderSettings

_RULES = (
    *("timeout", "seed", "think_start", "think_end", "sandbox", "prompt_opens_think", "require_think"),
    *("contests_from", "contests_until"),
)
"""Options that say what the settings of an evaluation say, too."""

_PURPOSE = """\
Ask a model the problems of benchmarks and grade its answers: avg@n (the accuracy of one response) and pass@k, each with
a 95 % interval by bootstrap over problems. Responses are kept in run.dir; started again, only missing ones are drawn.

run.preset=32k and run.preset=64k set what the paper's evaluation used. To grade responses that are there already, see
`python -m megatron_klear.evaluate --grade --help`."""
_ABOUT = """\
Grade a file of generations against the problems they answer, without any model. Figures are avg@n (the accuracy of one
response) and pass@k, each with a 95 % interval by bootstrap over problems. With the settings of the evaluation that
made the generations (--config), they are graded by its rules, to its figures."""
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
            return grade_file(_options(arguments))
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
    from megatron_klear.evaluation import grading_rules
    from megatron_klear.evaluation.asking import facts_of, generations_of
    from megatron_klear.evaluation.generations import write_generations
    from megatron_klear.evaluation.writing import GENERATIONS_FILE
    from megatron_klear.session.grading import Graders, GraderSettings

    out = Path(settings.run.dir)
    made = generations_of(benchmarks, settings)
    write_generations(out / GENERATIONS_FILE, (item for items in made.values() for item in items))
    grading = GraderSettings(reward=settings.reward, code_reward=settings.code_reward)
    return _finish(
        out,
        benchmarks,
        made,
        Graders(grading),
        facts=facts_of(settings),
        rules=grading_rules(grading, benchmarks),
        seed=settings.run.seed,
        ks=settings.benchmarks.pass_at,
        require_complete=settings.benchmarks.require_complete,
    )


@dataclass(frozen=True, kw_only=True)
class _Grading:
    """How a generations file is graded.

    Attributes:
        problems: files of the benchmarks.
        setting: what names them.
        contests: days of LiveCodeBench's contests to count, first and last.
        most_problems: of each benchmark; None for all.
        settings: of the graders.
        opening: what the prompt ended with that belongs to the response.
    """

    problems: tuple[str, ...]
    setting: str
    contests: tuple[date | None, date | None]
    most_problems: int | None
    settings: GraderSettings
    opening: str
    seed: int
    ks: tuple[int, ...]
    require_complete: bool


def _grading_of(options: argparse.Namespace) -> _Grading:
    """The rules of an evaluation that `--config` names, or those of the options.

    Raises:
        DataError: both say something of the same.
        ConfigError: what is wrong with the settings of the evaluation.
    """
    from megatron_klear.session.grading import GraderSettings, Tags

    if options.config is None:
        start, end = options.think_start or "<think>", options.think_end or "</think>"
        workers, timeout = options.workers or 4, options.timeout or 5.0
        return _Grading(
            problems=tuple(options.problems),
            setting="--problems",
            contests=(options.contests_from, options.contests_until),
            most_problems=None,
            settings=GraderSettings(
                reward=RewardSettings(require_think=options.require_think, timeout_seconds=timeout, workers=workers),
                code_reward=CodeRewardSettings(workers=workers, sandbox=options.sandbox or "bubblewrap"),
                tokenizer=Tags(think_start=start, think_end=end),
            ),
            opening=start if options.prompt_opens_think else "",
            seed=options.seed or 0,
            ks=options.pass_at,
            require_complete=options.require_complete,
        )
    told = [
        f"--{name.replace('_', '-')}"
        for name in _RULES
        if getattr(options, name) is not None and getattr(options, name) is not False
    ]
    if told:
        raise DataError([f"{name}: is given beside --config, whose settings say it" for name in told])
    settings = load_grading(options.config[0], options.config[1:])
    reward, code, benchmarks = settings.reward, settings.code_reward, settings.benchmarks
    if options.workers:
        reward, code = replace(reward, workers=options.workers), replace(code, workers=options.workers)
    return _Grading(
        problems=tuple(options.problems or benchmarks.files),
        setting="--problems" if options.problems else "benchmarks.files",
        contests=(as_day(benchmarks.contests_from), as_day(benchmarks.contests_until)),
        most_problems=benchmarks.problems,
        settings=GraderSettings(reward=reward, code_reward=code),
        opening="",  # an evaluation writes it with the response
        seed=settings.run.seed,
        ks=options.pass_at or benchmarks.pass_at,
        require_complete=options.require_complete or benchmarks.require_complete,
    )


def grade_file(options: argparse.Namespace) -> int:
    """Grade a generations file: read, match, judge, write, show."""
    from megatron_klear.evaluation import Benchmark, Contests, benchmark_name, read_benchmark
    from megatron_klear.session.run_lock import alone_in

    how = _grading_of(options)
    wrong = repeated_names(how.problems, how.setting)
    if not how.problems:
        wrong = ["--problems: names no file, and neither does benchmarks.files of --config"]
    if wrong:
        raise DataError(wrong)
    contests = Contests(first=how.contests[0], last=how.contests[1])
    out = options.out or options.grade.with_name(f"{options.grade.stem}-graded")
    benchmarks = []
    for path in how.problems:
        rows = read_benchmark(path, setting=how.setting, contests=contests)
        benchmarks.append(Benchmark(name=benchmark_name(path), rows=tuple(rows[: how.most_problems])))
    with alone_in(out, "--out"):
        return _match_and_grade(out, benchmarks, options.grade, how)


def _match_and_grade(out: Path, benchmarks: Sequence[Benchmark], made_file: Path, how: _Grading) -> int:
    from megatron_klear.evaluation import Rejects, grading_rules, matched, read_generations
    from megatron_klear.evaluation.writing import REJECTS_FILE
    from megatron_klear.session.grading import Graders, require_sandbox

    rejects = Rejects(f"the generations {made_file}", out / REJECTS_FILE)
    made = matched(read_generations(made_file, rejects), benchmarks, rejects)
    if how.opening:
        made = {
            name: [replace(item, response=how.opening + item.response) for item in items]
            for name, items in made.items()
        }
    if not any(made.values()):
        rejects.raise_if_any()
        raise DataError([f"GENERATIONS: {made_file} holds no responses"])
    if any(row.domain == "code" for benchmark in benchmarks for row in benchmark.rows):
        require_sandbox(how.settings)
    notes = [f"{len(rejects)} generations could not be used; {rejects.path.name} says why"] if rejects else []
    facts = {"model": f"generations of {made_file}", "thinking part required": how.settings.reward.require_think}
    return _finish(
        out,
        benchmarks,
        made,
        Graders(how.settings),
        facts=facts,
        rules=grading_rules(how.settings, benchmarks),
        seed=how.seed,
        ks=how.ks,
        notes=notes,
        require_complete=how.require_complete,
    )


def _finish(
    out: Path,
    benchmarks: Sequence[Benchmark],
    made: Mapping[str, Sequence[Generation]],
    graders: Graders,
    *,
    facts: Mapping[str, Any],
    rules: Mapping[str, str],
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
    facts = {**facts, "grading rules": dict(rules)}
    results = write_evaluation(out, benchmarks, judged, facts=facts, seed=seed, ks=ks, notes=notes)
    console = make_console(sys.stdout)
    console.print(results_table(results, rules))
    for note in notes:
        console.print(note, highlight=False, markup=False)
    incomplete = coverage_lines(results)
    for line in incomplete:
        console.print(line, style="bold red", highlight=False, markup=False)
    console.print(f"responses beside their grades: {out / PAGE_FILE}", highlight=False, markup=False, soft_wrap=True)
    if require_complete and incomplete:
        raise DataError([*incomplete, "all files are written, but complete figures were asked for"])
    return EXIT_DONE


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.problems and not options.config:
        parser.error("one of these is needed: --problems FILE [FILE ...], --config CONFIG.yaml")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_klear.evaluate",
        description=_ABOUT,
        epilog=_FORMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--grade", type=Path, required=True, metavar="GENERATIONS", help="responses to grade")
    parser.add_argument("--problems", nargs="+", metavar="FILE", help="the problems they answer")
    parser.add_argument(
        "--config", nargs="+", metavar=("CONFIG.yaml", "section.field=value"),
        help="settings of an evaluation: problems, rules of grading (reward, code_reward), seed and pass@k are its",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: GENERATIONS-graded, beside the file")
    parser.add_argument("--pass-at", type=_ks, default=(), metavar="K,K", help="default: powers of two up to n")
    for name, which in (("from", "first"), ("until", "last")):
        parser.add_argument(
            f"--contests-{name}", type=_day, metavar="DAY", help=f"{which} day of LiveCodeBench's contests to count"
        )
    parser.add_argument("--workers", type=_positive, metavar="N", help="grading processes (default: 4)")
    parser.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="per answer (default: 5)")
    parser.add_argument("--seed", type=int, help="of the bootstrap (default: 0)")
    parser.add_argument("--think-start", metavar="TAG", help="opens the thinking part (default: <think>)")
    parser.add_argument("--think-end", metavar="TAG", help="closes it (default: </think>)")
    parser.add_argument(
        "--sandbox", choices=("bubblewrap", "rlimits"),
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
