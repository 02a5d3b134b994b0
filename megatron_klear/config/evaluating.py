"""Settings of an evaluation: the benchmarks, the model that answers, and how answers are graded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.checks import Problems, check_rewards
from megatron_klear.config.described import describe_schema
from megatron_klear.config.fields import SECTION, Positive, Unit
from megatron_klear.config.loading import load_schema
from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
from megatron_klear.config.sampler import SamplerSettings, sampler_problems
from megatron_klear.config.yarn import Yarn

_POSITIONS = "max_position_embeddings"
_PAPER = {"temperature": 0.6, "top_p": 0.95, "responses": 64, "max_prompt_tokens": 2048}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "32k": {"sampler": {**_PAPER, "max_response_tokens": 30720}},
    "64k": {"sampler": {**_PAPER, "max_response_tokens": 63488}, "yarn": {"factor": 2.5, "original_positions": 32768}},
}
"""Values of `run.preset`: what is set where the settings file and the command line say nothing (the paper, Table 1)."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EvaluationRunSettings:
    """The evaluation as a whole."""

    dir: Annotated[str, Field(min_length=1)]
    """Directory for responses, grades, results and the page; starting again on it draws only what is missing."""

    preset: Literal["none", "32k", "64k"] = "none"
    """Defaults of the paper's evaluation: temperature 0.6, top-p 0.95, 64 responses (set sampler.responses to 8 for
    code), prompt and response within 32K tokens, or 64K with YaRN of factor 2.5."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of responses and of the bootstrap."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class BenchmarkSettings:
    """What is asked: prompt rows, or AIME, HMMT and LiveCodeBench files as they are published."""

    files: tuple[str, ...] = ()
    """JSON lines or Parquet files; a benchmark has its file's name."""

    instruction: str = "Reason step by step, and put the final answer within \\boxed{}."
    """Follows a math problem that is published without messages."""

    problems: Annotated[int | None, Unit("problems"), Positive] = None
    """Most problems of each benchmark to ask, the first of the file; null asks all."""

    contests_from: str | None = None
    """First day (YEAR-MONTH-DAY) of contests whose LiveCodeBench problems are asked; null takes all before. The paper:
    V5 is 2024-08-01 to 2025-02-01, V6 is 2025-02-01 to 2025-05-01."""

    contests_until: str | None = None
    """Last day of these contests; null takes all after."""

    pass_at: tuple[int, ...] = ()
    """Values of k for pass@k, at most sampler.responses; none takes powers of two up to it."""

    require_complete: bool = False
    """Fail, all files written, where a figure does not cover all problems since graders failed."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EvaluationYarnSettings:
    """YaRN for a local engine; servers must be started with it, and are asked for the length they serve."""

    factor: Annotated[float | None, Field(gt=1)] = None
    """Positions grow by this (the paper: 2.5 for 64K after training at 32K); null takes what config.json says."""

    original_positions: Annotated[int | None, Unit("tokens"), Positive] = None
    """Positions that the model was trained on; null takes max_position_embeddings of its config.json."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EvaluationSettings:
    """All settings of an evaluation; run.dir, benchmarks.files and sampler.hf_dir must be given."""

    run: EvaluationRunSettings
    benchmarks: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    yarn: EvaluationYarnSettings = field(default_factory=EvaluationYarnSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    code_reward: CodeRewardSettings = field(default_factory=CodeRewardSettings)


EVALUATION = describe_schema(EvaluationSettings)


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluationSettings:
    """Read, override and check the settings of an evaluation.

    Raises:
        ConfigError: with every problem found, each starting with the dotted path of the setting.
    """

    def together(settings: EvaluationSettings, broken: frozenset[str]) -> list[str]:
        problems = Problems(broken=broken)
        for where, text in _problems(settings):
            problems.add(where, text)
        check_rewards(settings.reward, settings.code_reward, problems)
        return problems.texts

    return load_schema(EVALUATION, path, overrides, together, presets=PRESETS)


def load_grading(path: str | Path, overrides: Sequence[str] = ()) -> EvaluationSettings:
    """The settings of an evaluation whose responses are there: neither its model nor its servers are looked for.

    Raises:
        ConfigError: see `load_evaluation`.
    """

    def together(settings: EvaluationSettings, broken: frozenset[str]) -> list[str]:
        problems = Problems(broken=broken)
        for where, text in _day_problems(settings.benchmarks):
            problems.add(where, text)
        check_rewards(settings.reward, settings.code_reward, problems)
        return problems.texts

    return load_schema(EVALUATION, path, overrides, together, presets=PRESETS)


def repeated_names(files: Sequence[str], setting: str) -> list[str]:
    """What is wrong with benchmark files of one name: they could not be told apart in results.

    Args:
        files: paths; a benchmark has its file's name, without ending.
        setting: what lists them, to stand before each text; empty for none.
    """
    wrong = []
    seen: dict[str, str] = {}
    for file in files:
        name = Path(file).stem
        if name in seen:
            wrong.append(f"{seen[name]} and {file} would both be called {name!r}; rename one")
        seen[name] = file
    return [f"{setting}: {text}" if setting else text for text in wrong]


def _problems(settings: EvaluationSettings) -> Iterator[tuple[str, str]]:
    files, sampler = settings.benchmarks.files, settings.sampler
    if not files:
        yield "benchmarks.files", "lists no files; give at least one benchmark"
    for file in files:
        if not Path(file).is_file():
            yield "benchmarks.files", f"no file {file}"
    yield from (("benchmarks.files", text) for text in repeated_names(files, ""))
    yield from sampler_problems(sampler, "sampler")
    yield from _day_problems(settings.benchmarks)
    for k in settings.benchmarks.pass_at:
        if not 1 <= k <= sampler.responses:
            yield "benchmarks.pass_at", f"got {k}, must be from 1 to sampler.responses = {sampler.responses}"
    if sampler.temperature == 0 and sampler.responses > 1:
        yield "sampler.responses", f"is {sampler.responses}, but greedy responses (sampler.temperature 0) are all alike"
    longest, positions = sampler.max_prompt_tokens + sampler.max_response_tokens, _positions(settings)
    if positions is not None and longest > positions:
        yield (
            "sampler.max_response_tokens",
            f"prompt and response may take {longest} tokens, but the model has {positions} positions; lower it, or set "
            "yarn.factor",
        )


def _day_problems(settings: BenchmarkSettings) -> Iterator[tuple[str, str]]:
    first, last = settings.contests_from, settings.contests_until
    wrong = {name: text for name, text in (("contests_from", first), ("contests_until", last)) if not _is_day(text)}
    for name, text in wrong.items():
        yield f"benchmarks.{name}", f"got {text!r}, must be a day such as 2025-02-01"
    if first is not None and last is not None and not wrong and first > last:
        yield "benchmarks.contests_until", f"got {last}, which is before benchmarks.contests_from = {first}"


def as_day(text: str | None) -> date | None:
    """The day that a text such as 2025-02-01 names; None for none.

    Raises:
        ValueError: it names no day.
    """
    return None if text is None else datetime.strptime(text, "%Y-%m-%d").date()


def _is_day(text: str | None) -> bool:
    try:
        # 2025-2-1 is a day, too, but does not compare with others as a text.
        return text is None or str(as_day(text)) == text
    except ValueError:
        return False


def evaluation_yarn(settings: EvaluationSettings) -> Yarn | None:
    """The YaRN that is asked for beyond what the model's config.json says; None for servers, which have their own."""
    factor, original = settings.yarn.factor, settings.yarn.original_positions
    if factor is None or settings.sampler.engine != "local":
        return None
    if original is None:
        original = _config_positions(settings.sampler)
    return None if original is None else Yarn(factor=factor, original_positions=original)


def servers_yarn(settings: EvaluationSettings) -> Yarn | None:
    """The YaRN that servers must have been started with; None where `yarn.factor` asks for none in particular."""
    factor, original = settings.yarn.factor, settings.yarn.original_positions
    if factor is None or settings.sampler.engine != "sglang":
        return None
    original = original or _config_positions(settings.sampler)
    return None if original is None else Yarn(factor=factor, original_positions=original)


def _positions(settings: EvaluationSettings) -> int | None:
    """Positions that a local engine has; None where that is not known here, which the engine will tell."""
    if settings.sampler.engine != "local":
        return None
    yarn = evaluation_yarn(settings)
    return _config_positions(settings.sampler) if yarn is None else yarn.positions


def _config_positions(sampler: SamplerSettings) -> int | None:
    try:
        return int(json.loads((Path(sampler.hf_dir or "") / "config.json").read_text(encoding="utf-8"))[_POSITIONS])
    except (OSError, ValueError, KeyError, TypeError):
        return None
