"""Prompts that share n words in a row with a benchmark problem are left out (the paper: 9)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.config.data import row_files
from megatron_klear.curation.benchmarks import BenchmarkIndex, read_benchmarks, whitelist_grams
from megatron_klear.curation.row import Row
from megatron_klear.curation.stage import Advance, Stage, UnitLog
from megatron_klear.data.index.files import digest_of
from megatron_klear.data.problems import Problems


class DecontaminateStage(Stage):
    """Leaves out contaminated prompts, and says by which benchmark, problem and n-gram.

    Args:
        settings: of the run.
    """

    name = "decontaminate"

    def __init__(self, settings: CurationSettings) -> None:
        self._settings = settings.decontamination
        self._index = self._empty_index()

    def depends_on(self) -> dict[str, Any]:
        """The benchmarks by content, and the rules."""
        files = [(os.path.basename(name), digest_of(Path(name))) for name in row_files(self._settings.benchmarks)]
        return {"benchmarks": files, "ngram": self._settings.ngram, "short_words": self._settings.short_words,
                "short_characters": self._settings.short_characters, "normalisation": 3, "owners": "all",
                "whitelist": list(self._whitelisted())}  # fmt: skip

    def start(self, inputs: Sequence[Path], directory: Path, advance: Advance) -> None:
        """Take in the benchmarks.

        Raises:
            DataError: naming everything that is wrong with them, and with the whitelist.
        """
        problems = Problems("decontamination")
        index = self._empty_index()
        setting = "decontamination.whitelist"
        index.whitelist = whitelist_grams(self._whitelisted(), index, problems, setting=setting)
        read_benchmarks(row_files(self._settings.benchmarks), index, problems)
        problems.raise_if_any("A problem that is not read cannot be kept out of the data.")
        self._index = index

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield rows that share nothing with a benchmark but whitelisted n-grams."""
        for row in rows:
            counting, excused = self._index.overlaps(row.prompt_text)
            if counting:
                first = counting[0]
                for name in {overlap.benchmark for overlap in counting}:
                    log.audit.count("contaminated rows by benchmark", name)
                if first.is_short:
                    log.audit.count("short benchmark problems in prompts", f"{first.benchmark}: {first.ngram}")
                else:
                    log.audit.count("contaminating n-grams", first.ngram)
                log.drop(
                    row,
                    "contaminated",
                    benchmark=first.benchmark,
                    problem=first.problem,
                    ngram=first.ngram,
                    shared_ngrams=len({overlap.ngram for overlap in counting}),
                )
                continue
            if excused:
                first = excused[0]
                log.audit.count("rows kept by the whitelist, by n-gram", first.ngram)
                log.audit.example(
                    "kept by the whitelist",
                    row,
                    f"benchmark: {first.benchmark}; problem: {first.problem}; ngram: {first.ngram}",
                )
            yield row

    def _empty_index(self) -> BenchmarkIndex:
        rules = self._settings
        return BenchmarkIndex(n=rules.ngram, short_words=rules.short_words, short_characters=rules.short_characters)

    def _whitelisted(self) -> Iterator[str]:
        yield from self._settings.whitelist
        file = self._settings.whitelist_file
        if file is not None:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
            yield from (line for line in lines if line.strip())
