"""Settings of curation: which rows come in, which stages they go through, and by what rules they stay."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.checks import Problems, check_rewards
from megatron_klear.config.data import entry_problems, row_files
from megatron_klear.config.described import describe_schema
from megatron_klear.config.fields import SECTION, Positive, Prompts, Responses, Tokens, Unit
from megatron_klear.config.loading import load_schema
from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
from megatron_klear.config.sampler import SamplerSettings, sampler_problems

StageName = Literal[
    "dedup", "decontaminate", "sources", "select", "tests", "respond", "difficulty", "correctness", "solvable"
]
Share = Annotated[float, Unit("fraction"), Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CurationRunSettings:
    """The run as a whole: where it lives, what it makes, and on how many processes."""

    dir: Annotated[str, Field(min_length=1)]
    """Directory of the run; starting again on it resumes, and redoes only what other settings or input change."""

    task: Literal["sft", "rl"]
    """What the rows are for: fine-tuning on responses (sft), or prompts with a verifiable reference (rl)."""

    stages: tuple[StageName, ...] = ()
    """Stages in order; none takes those of the paper for `run.task` (sections 3.1 and 3.2.1)."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of sampled responses and of the first prompt that K-Center greedy selects."""

    format: Literal["parquet", "jsonl"] = "parquet"
    """File format of every stage's rows."""

    result_format: Literal["jsonl", "parquet"] = "jsonl"
    """File format of the result, in `result` below `run.dir`; prompts to reinforce on are read from JSON lines only."""

    rows_per_file: Annotated[int, Unit("rows"), Positive] = 10_000
    """Most rows of one file; a file is also what is redone after a kill, and what one process works on."""

    engine: Literal["local", "ray"] = "local"
    """Where stages that look at one row at a time run: processes of this machine, or a Ray cluster (Ray Data)."""

    workers: Annotated[int, Unit("processes"), Positive] = 1
    """Processes of those stages, or of a Ray cluster the most tasks at a time."""

    ray_address: str = ""
    """Address of a running Ray cluster (`auto` finds one); empty starts Ray on this machine."""

    progress: bool = True
    """Show a live display on a terminal; without a terminal, or when false, one line now and then."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CurationInputSettings:
    """Input rows {"id", "domain", "messages", "reference"?, "source"?, "responses"?, "pass_rate"?, "embedding"?}."""

    files: tuple[str, ...] = ()
    """JSON lines or Parquet files, directories of them, or patterns such as shards/*.parquet."""

    max_row_bytes: Annotated[int, Unit("bytes"), Field(ge=1024)] = 8 << 20
    """Longest line; longer ones are rejected without being held in memory."""

    max_reject_share: Share = 0.1
    """Largest share of rows that may be rejected before the run ends as failed; all are listed in rejects.jsonl."""

    check_references: bool = True
    """Reject math rows whose reference the grader does not find correct as an answer, and code rows with bad tests."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DedupSettings:
    """Exact duplicates of prompts; the first in the order of the files stays."""

    ignore_spelling: bool = True
    """Compare without regard to case, spacing and Unicode variants (NFKC); false compares characters."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DecontaminationSettings:
    """Prompts that share words with a benchmark problem, n in a row."""

    benchmarks: tuple[str, ...] = ()
    """JSON lines or Parquet files of problems to keep out; a benchmark is named by its file."""

    ngram: Annotated[int, Unit("words"), Field(ge=2)] = 9
    """Words in a row that make an overlap (the paper: 9)."""

    short_words: Annotated[int, Unit("words"), Field(ge=2)] = 4
    """A benchmark problem shorter than an n-gram, of so many words at least, is also found inside a prompt; shorter
    ones only as the whole prompt. A phrase that is a problem may stand in other prompts by chance: raise this, or use
    `decontamination.whitelist`. `decontamination.ngram` or more switches it off."""

    short_characters: Annotated[int, Unit("characters"), Field(ge=1)] = 20
    """Letters and digits that such a problem must have as well."""

    whitelist: tuple[str, ...] = ()
    """Texts whose n-grams make no overlap, such as boilerplate; one shorter than an n-gram excuses the short problem
    with exactly its words, and has `decontamination.short_words` at least."""

    whitelist_file: str | None = None
    """File with more such texts, one a line."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SourcesSettings:
    """Sources by quality (section 5.1.3: one or two of the best are better than many)."""

    math_ranking: tuple[str, ...] = ()
    """Sources of math rows, best first; none keeps all."""

    math_top: Annotated[int, Unit("sources"), Positive] = 2
    """How many of `sources.math_ranking` to keep."""

    code_ranking: tuple[str, ...] = ()
    """Sources of code rows, best first; none keeps all."""

    code_top: Annotated[int, Unit("sources"), Positive] = 2
    """How many of `sources.code_ranking` to keep."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SelectionSettings:
    """K-Center greedy selection over embeddings of prompts (Tables 2, 4, 5), by domain."""

    math: Annotated[int | None, Unit("prompts"), Positive] = None
    """Math prompts to keep (Tables 4 and 5: 31600 of each domain); null keeps all."""

    code: Annotated[int | None, Unit("prompts"), Positive] = None
    """Code prompts to keep; null keeps all."""

    embeddings: Literal["column", "file", "model"] = "column"
    """The rows' own column `embedding`, an .npy file, or an encoder that is run here."""

    path: str | None = None
    """The .npy file (float, one line per id of the file of the same name with .ids), or the encoder's directory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder is computed; distances are on the CPU."""

    batch_prompts: Prompts = 64
    """Prompts that the encoder takes at a time."""

    max_tokens: Tokens = 256
    """Tokens of a prompt that the encoder reads."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DifficultySettings:
    """Labels easy and hard from the pass rate of the sampling model (section `sampler`)."""

    hard_at_most: Share = 0.5
    """Largest pass rate of a hard prompt."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CorrectnessSettings:
    """Which of a prompt's responses become rows to fine-tune on."""

    keep_wrong: Literal["all", "hard", "none"] = "all"
    """Keep wrong responses: all (the paper's choice, since 88 % of its prompts are hard), those to hard prompts (what
    its ablation found best, section 5.1.1), or none. A prompt of unknown difficulty counts as easy."""

    keep_unfinished: bool = False
    """Keep responses that were cut off or whose thinking tags are not in order."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TestsSettings:
    """Code problems by their number of tests."""

    minimum: Annotated[int, Unit("tests"), Positive] = 16
    """Fewest tests (section 3.2.1: with fewer, wrong programs pass too often)."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SolvableSettings:
    """Problems that the teacher solves often enough for their reference to be believed (section 3.2.1)."""

    code_rule: Literal["pass_at_k", "pass_rate"] = "pass_at_k"
    """pass_at_k estimates pass@k without bias from all responses; pass_rate is the share of responses that pass."""

    k: Responses = 16
    """k of pass@k (the paper: 16). A code row that brings responses of its own, but fewer, is dropped and named."""

    code_above: Share = 0.5
    """Code problems stay with pass@k (or the pass rate) above this."""

    math_above: Share = 0.5
    """Math problems stay with a share of correct responses above this: the majority."""

    graded_at_least: Share = 0.5
    """Smallest share of responses that must have been graded; with less, nothing is known of the problem."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CurationSettings:
    """All settings of curation; `run.dir` and `run.task` are the only ones without a default."""

    run: CurationRunSettings
    input: CurationInputSettings = field(default_factory=CurationInputSettings)
    dedup: DedupSettings = field(default_factory=DedupSettings)
    decontamination: DecontaminationSettings = field(default_factory=DecontaminationSettings)
    sources: SourcesSettings = field(default_factory=SourcesSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    tests: TestsSettings = field(default_factory=TestsSettings)
    teacher: SamplerSettings = field(default_factory=SamplerSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    difficulty: DifficultySettings = field(default_factory=DifficultySettings)
    correctness: CorrectnessSettings = field(default_factory=CorrectnessSettings)
    solvable: SolvableSettings = field(default_factory=SolvableSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    code_reward: CodeRewardSettings = field(default_factory=CodeRewardSettings)


CURATION = describe_schema(CurationSettings)


def load_curation_settings(path: str | Path, overrides: Sequence[str] = ()) -> CurationSettings:
    """Read, override and check the settings of curation.

    Raises:
        ConfigError: with every problem found, each starting with the dotted path of the setting.
    """
    return load_schema(CURATION, path, overrides, _find_problems)


def stages_of(settings: CurationSettings) -> tuple[StageName, ...]:
    """The stages that rows go through, in order; those of the paper unless the settings name others."""
    if settings.run.stages:
        return settings.run.stages
    if settings.run.task == "rl":
        return ("dedup", "decontaminate", "tests", "solvable")
    choosing: list[StageName] = ["dedup", "decontaminate"]
    if settings.sources.math_ranking or settings.sources.code_ranking:
        choosing.append("sources")
    if settings.selection.math or settings.selection.code:
        choosing.append("select")
    return (*choosing, "respond", "difficulty", "correctness")


def input_files(settings: CurationSettings) -> list[str]:
    """The files that `input.files` names, directories and patterns opened up."""
    return row_files(settings.input.files)


def _find_problems(settings: CurationSettings, broken: frozenset[str]) -> list[str]:
    problems = Problems(broken=broken)
    stages = stages_of(settings)
    for name in sorted({name for name in stages if stages.count(name) > 1}):
        problems.add("run.stages", f"{name} is named more than once")
    for late, early in (("correctness", "respond"), ("correctness", "difficulty"), ("solvable", "tests")):
        if early in stages and late in stages and stages.index(early) > stages.index(late):
            problems.add("run.stages", f"{early} must come before {late}, which judges by it")
    if settings.run.task == "rl" and "correctness" in stages:
        problems.add("run.stages", "correctness makes rows to fine-tune on, and run.task is rl; leave it out")
    run = Path(settings.run.dir)
    existing = next((p for p in (run, *run.absolute().parents) if p.exists()), Path("/"))
    if run.exists() and not run.is_dir():
        problems.add("run.dir", f"{run} is a file, expected a directory")
    elif not os.access(existing, os.W_OK | os.X_OK):
        problems.add("run.dir", f"{run} cannot be written by this user")
    if settings.run.task == "rl" and settings.run.result_format == "parquet":
        problems.add("run.result_format", "got parquet, and data.prompts of the trainer reads JSON lines; set jsonl")
    if not settings.input.files:
        problems.add("input.files", "names no file, and there is nothing to curate")
    for text in entry_problems(settings.input.files):
        problems.add("input.files", text)
    if "decontaminate" in stages:
        for text in _benchmark_problems(settings):
            problems.add("decontamination.benchmarks", text)
        file = settings.decontamination.whitelist_file
        if file is not None and not Path(file).is_file():
            problems.add("decontamination.whitelist_file", f"no file {file}")
    for path, text in _model_problems(settings, stages):
        problems.add(path, text)
    rankings = {"math_ranking": settings.sources.math_ranking, "code_ranking": settings.sources.code_ranking}
    for setting, ranking in rankings.items():
        for source in sorted({source for source in ranking if ranking.count(source) > 1}):
            problems.add(f"sources.{setting}", f"{source!r} is named more than once, and has one place only")
    if "select" in stages and (settings.selection.math or settings.selection.code):
        for path, text in _selection_problems(settings.selection):
            problems.add(path, text)
    if settings.solvable.code_rule == "pass_at_k" and settings.teacher.responses < settings.solvable.k:
        text = f"got {settings.teacher.responses}, must be at least solvable.k = {settings.solvable.k}"
        if "solvable" in stages:
            problems.add("teacher.responses", text, "solvable.k")
    check_rewards(settings.reward, settings.code_reward, problems)
    return problems.texts


def _benchmark_problems(settings: CurationSettings) -> Iterator[str]:
    benchmarks = settings.decontamination.benchmarks
    if not benchmarks:
        yield "names no file; name the benchmarks to keep out, or leave decontaminate out of run.stages"
    yield from entry_problems(benchmarks)
    read = {os.path.realpath(name) for name in input_files(settings)}
    for name in row_files(benchmarks):
        if os.path.realpath(name) in read:
            yield f"{name} is also one of input.files, and would drop all of its own rows"


def _model_problems(settings: CurationSettings, stages: Sequence[StageName]) -> Iterator[tuple[str, str]]:
    """Problems of the samplers; one that names no model is fine where the rows bring what it would draw."""
    needed = {"teacher": {"respond", "solvable"}, "sampler": {"difficulty"}}
    for section, users in needed.items():
        sampler: SamplerSettings = getattr(settings, section)
        if users & set(stages) and (sampler.hf_dir is not None or sampler.urls):
            yield from sampler_problems(sampler, section)


def _selection_problems(selection: SelectionSettings) -> Iterator[tuple[str, str]]:
    kind, path = selection.embeddings, selection.path
    if kind == "column":
        if path is not None:
            yield "selection.path", f"got {path}, but selection.embeddings is column, which takes none"
    elif path is None:
        yield "selection.path", f"is null, and selection.embeddings is {kind}; name the {kind}"
    elif kind == "file":
        for file in (Path(path), Path(path).with_suffix(".ids")):
            if not file.is_file():
                yield "selection.path", f"no file {file}"
    elif not (Path(path) / "config.json").is_file():
        yield "selection.path", f"no config.json in {path}; name the directory of a Hugging Face encoder"
