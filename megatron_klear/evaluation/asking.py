"""Benchmark problems put to a model: every response drawn once, kept on disk, and returned as generations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_klear import __version__
from megatron_klear.config.evaluating import (
    BenchmarkSettings,
    EvaluationSettings,
    as_day,
    evaluation_yarn,
    servers_yarn,
)
from megatron_klear.data.chat import ConversationError
from megatron_klear.data.problems import Problems
from megatron_klear.errors import ConfigError
from megatron_klear.evaluation.generations import Generation
from megatron_klear.evaluation.published import Contests, benchmark_name, read_benchmark
from megatron_klear.evaluation.writing import Benchmark
from megatron_klear.observe.work_progress import WorkProgress
from megatron_klear.records import Prompt
from megatron_klear.rollout import RolloutProgress
from megatron_klear.rollout.open_sampler import Sampler, open_sampler

CACHE_FILE = "responses.sqlite"


def read_benchmarks(settings: BenchmarkSettings) -> list[Benchmark]:
    """All benchmarks, each cut to `benchmarks.problems`.

    Raises:
        DataError: naming file and line of everything that is wrong.
    """
    contests = Contests(first=as_day(settings.contests_from), last=as_day(settings.contests_until))
    found = []
    for file in settings.files:
        rows = read_benchmark(file, setting="benchmarks.files", instruction=settings.instruction, contests=contests)
        found.append(Benchmark(name=benchmark_name(file), rows=tuple(rows[: settings.problems])))
    return found


def generations_of(benchmarks: Sequence[Benchmark], settings: EvaluationSettings) -> dict[str, list[Generation]]:
    """Responses to all problems, by the benchmark's name; those drawn before are not drawn again.

    Raises:
        ConfigError, DataError, CheckpointError: the model's directory, a server or a problem is not what it must be.
        RolloutError: the engine cannot serve a request, or the cache cannot be used.
    """
    sampler_settings = settings.sampler
    with open_sampler(
        sampler_settings, section="sampler", cache=Path(settings.run.dir) / CACHE_FILE, seed=settings.run.seed,
        config_changes=rope_changes(settings), servers_yarn=servers_yarn(settings) or "any",
    ) as sampler:  # fmt: skip
        asked = _prompts(benchmarks, sampler, sampler_settings.max_prompt_tokens)
        total = sum(map(len, asked.values())) * sampler_settings.responses
        found: dict[str, list[Generation]] = {}
        with WorkProgress("responses", total, noun="responses") as progress:
            before = 0
            for benchmark in benchmarks:

                def show(news: RolloutProgress, before: int = before) -> None:
                    progress.advance(before + news.finished_responses - progress.done)

                prompts = asked[benchmark.name]
                groups = sampler.responses.sample(
                    prompts, num_responses=sampler_settings.responses, on_progress=show, total_prompts=len(prompts)
                )
                found[benchmark.name] = [
                    Generation(
                        problem_id=group.prompt.prompt_id,
                        index=index,
                        response=sampler.chat.response_text(rollout.response_ids),
                        finish_reason=rollout.finish_reason,
                        num_tokens=len(rollout.response_ids),
                        benchmark=benchmark.name,
                    )
                    for group in groups
                    for index, rollout in enumerate(group.rollouts)
                ]
                before += len(prompts) * sampler_settings.responses
    return found


def _prompts(benchmarks: Sequence[Benchmark], sampler: Sampler, longest: int) -> dict[str, list[Prompt]]:
    """All problems as the engine takes them.

    Raises:
        DataError: names those that the chat template refuses or that are too long; leaving them out would change what
            the accuracy is of.
    """
    problems = Problems("the prompts of benchmarks.files")
    found: dict[str, list[Prompt]] = {}
    most = 0
    for benchmark in benchmarks:
        found[benchmark.name] = []
        for row in benchmark.rows:
            try:
                prompt = sampler.prompt(row.row_id, row.domain, row.messages)
            except ConversationError as error:
                problems.add(row.where, str(error))
                continue
            if len(prompt.token_ids) > longest:
                most = max(most, len(prompt.token_ids))
                problems.add(row.where, f"has {len(prompt.token_ids)} tokens, sampler.max_prompt_tokens = {longest}")
            found[benchmark.name].append(prompt)
    problems.raise_if_any(f"Set sampler.max_prompt_tokens to at least {most}." if most else "")
    return found


def rope_changes(settings: EvaluationSettings) -> dict[str, Any]:
    """What YaRN changes in the model's config.json; nothing without it.

    The base of the rotary frequencies is the model's own, which stands in `rope_parameters` or by itself; a changed
    `rope_scaling` alone would have transformers take its default base in the first case.

    Raises:
        ConfigError: config.json cannot be read or names no base.
    """
    yarn = evaluation_yarn(settings)
    if yarn is None:
        return {}
    file = Path(settings.sampler.hf_dir or "") / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        theta = float((config.get("rope_parameters") or config)["rope_theta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"sampler.hf_dir: {file} names no rope_theta ({type(error).__name__}: {error})"]) from error
    rope = {**yarn.hf_scaling(), "rope_theta": theta}
    return {"rope_parameters": rope, "rope_scaling": None, "max_position_embeddings": yarn.positions}


def facts_of(settings: EvaluationSettings) -> dict[str, Any]:
    """What the figures are made with, for results.json and the page."""
    sampler = settings.sampler
    engine = f"servers {', '.join(sampler.urls)}" if sampler.urls else f"local, {sampler.dtype}"
    return {
        "model": sampler.hf_dir,
        "engine": engine,
        "responses per problem": sampler.responses,
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "max_response_tokens": sampler.max_response_tokens,
        "yarn_factor": settings.yarn.factor,
        "preset": settings.run.preset,
        **_contests(settings.benchmarks),
        "thinking part required": settings.reward.require_think,
        "seed": settings.run.seed,
        "megatron_klear": __version__,
    }


def _contests(settings: BenchmarkSettings) -> dict[str, str]:
    first, last = settings.contests_from, settings.contests_until
    return {} if first is None and last is None else {"contests": f"{first or 'the first'} to {last or 'the last'}"}
