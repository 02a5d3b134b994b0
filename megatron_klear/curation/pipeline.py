"""The pipeline: stage after stage, each resumed where it was, and an audit of all of them at the end."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.config import dump_settings
from megatron_klear.config.curation import CurationSettings, input_files
from megatron_klear.curation.audit import Audit, merged
from megatron_klear.curation.audit_report import write_audit
from megatron_klear.curation.engines import work
from megatron_klear.curation.files import read_json, write_json
from megatron_klear.curation.reading import InputPart, plan_input
from megatron_klear.curation.stage import Stage, UnitJob, finished_unit
from megatron_klear.curation.stages import all_stages
from megatron_klear.errors import DataError
from megatron_klear.observe import Progress
from megatron_klear.observe.replace import replace_file

FORMAT = 1
"""Raised whenever the same input and rules would give other rows."""

RESULT, STAGES = "result", "stages"
_PART_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What a stage did.

    Attributes:
        name: of the stage.
        directory: where its units and logs lie.
        files: its rows, in order.
        digests: of these files.
        audit: counts and examples.
        units: number of units.
        kept_units: units that an earlier start had finished.
        seconds, cpu_seconds: work on all units, added up over processes and starts.
    """

    name: str
    directory: Path
    files: tuple[Path, ...]
    digests: tuple[str, ...]
    audit: Audit
    units: int
    kept_units: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurationResult:
    """What curation came to.

    Attributes:
        files: the rows, as the trainer reads them.
        rows: how many.
        report: the audit as a page.
        stages: what each stage did.
    """

    files: tuple[Path, ...]
    rows: int
    report: Path
    stages: tuple[StageRecord, ...]


def curate(settings: CurationSettings) -> CurationResult:
    """Take the input through all stages; work that an earlier start finished is verified and kept.

    Raises:
        DataError: input, benchmarks or embeddings that cannot be used; too many rejected rows; or no row left.
        KlearError: a model, server or grader that does not work.
        OSError: files cannot be read or written.
    """
    root = Path(settings.run.dir)
    root.mkdir(parents=True, exist_ok=True)
    replace_file(root / "config.yaml", dump_settings(settings))
    units: list[Path | InputPart] = list(plan_input(input_files(settings), _PART_BYTES))
    digests: tuple[str, ...] = ()
    records: list[StageRecord] = []
    stages = all_stages(settings)
    for number, stage in enumerate(stages):
        label = f"curate {number + 1}/{len(stages)} {stage.name}"
        rows = records[-1].audit.rows_out if records else None
        record = _StageRun(stage, number, settings, label).run(units, digests, rows)
        records.append(record)
        units, digests = list(record.files), record.digests
        if number == 0:
            _refuse_many_rejects(record, records, settings)
    report = write_audit(records, settings)
    if not records[-1].audit.rows_out:
        first = next(record.name for record in records if not record.audit.rows_out)
        raise DataError(f"no row is left after the stage {first}; {report} says why each was dropped")
    return CurationResult(
        files=records[-1].files, rows=records[-1].audit.rows_out, report=report, stages=tuple(records)
    )


def _refuse_many_rejects(record: StageRecord, records: Sequence[StageRecord], settings: CurationSettings) -> None:
    rejected, rows = sum(record.audit.rejected.values()), record.audit.rows_in
    if rejected > settings.input.max_reject_share * rows:
        write_audit(records, settings)
        kinds = ", ".join(f"{count} {kind}" for kind, count in record.audit.rejected.most_common())
        raise DataError(
            f"{rejected} of {rows} rows of input.files cannot be used ({kinds}), more than input.max_reject_share = "
            f"{settings.input.max_reject_share:g}; {Path(settings.run.dir) / 'rejects.jsonl'} lists them with file, "
            "line and reason"
        )


class _StageRun:
    """One stage of one start.

    Args:
        stage: what to do.
        number: place in the pipeline.
        settings: of the run.
        label: for the display.
    """

    def __init__(self, stage: Stage, number: int, settings: CurationSettings, label: str) -> None:
        self._stage, self._settings, self._label = stage, settings, label
        root = Path(settings.run.dir)
        self._result = root / RESULT
        self._directory = root / STAGES / f"{number:02d}-{stage.name}"
        self._rows = self._result if stage.name == "export" else self._directory / "rows"

    def run(self, units: Sequence[Path | InputPart], digests: Sequence[str], rows: int | None) -> StageRecord:
        """Make the units that are not there yet.

        Args:
            units: input of the stage.
            digests: of the units that are files.
            rows: rows in all of them, None where that is not known.
        """
        fingerprint = self._prepare(digests)
        jobs = [self._job(number, unit) for number, unit in enumerate(units)]
        manifests = {job.number: found for job in jobs if (found := finished_unit(job)) is not None}
        kept = len(manifests)
        todo = [job for job in jobs if job.number not in manifests]
        if todo:
            # Rows that later stages made of other input must not be taken for the result of this one.
            if self._stage.name != "export":
                shutil.rmtree(self._result, ignore_errors=True)
            done = sum(manifest["audit"]["rows_in"] for manifest in manifests.values())
            inputs = [unit for unit in units if isinstance(unit, Path)]
            for manifest in self._made(todo, inputs, fingerprint, rows, done):
                manifests[manifest["number"]] = manifest
        ordered = [manifests[job.number] for job in jobs]
        names = [name for manifest in ordered for name in manifest["rows"]]
        known = {name: digest for manifest in ordered for name, digest in manifest["digests"].items()}
        return StageRecord(
            name=self._stage.name,
            directory=self._directory,
            files=tuple((self._directory / name).resolve() for name in names),
            digests=tuple(known[name] for name in names),
            audit=merged(manifest["audit"] for manifest in ordered),
            units=len(jobs),
            kept_units=kept,
            seconds=sum(manifest["seconds"] for manifest in ordered),
            cpu_seconds=sum(manifest["cpu_seconds"] for manifest in ordered),
        )

    def _prepare(self, digests: Sequence[str]) -> str:
        """Keep what was made of the same input by the same rules, and clear away all else."""
        run = self._settings.run
        told = [FORMAT, self._stage.name, self._stage.depends_on(), list(digests), run.format, run.rows_per_file]
        told.append(run.result_format if self._stage.name == "export" else "")
        fingerprint = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()
        plan = read_json(self._directory / "plan.json")
        same = isinstance(plan, dict) and plan.get("fingerprint") == fingerprint
        if not same or not self._stage.state_is_whole(self._directory):
            for old in {self._directory, self._rows}:
                shutil.rmtree(old, ignore_errors=True)
        for new in (self._directory / "units", self._directory / "log", self._rows):
            new.mkdir(parents=True, exist_ok=True)
        write_json(self._directory / "plan.json", {"stage": self._stage.name, "fingerprint": fingerprint})
        return fingerprint

    def _job(self, number: int, unit: Path | InputPart) -> UnitJob:
        run = self._settings.run
        final = self._stage.name == "export"
        return UnitJob(
            number=number,
            unit=unit,
            directory=self._directory,
            rows=self._rows,
            file_format=run.result_format if final else run.format,
            rows_per_file=run.rows_per_file,
        )

    def _made(
        self, todo: Sequence[UnitJob], inputs: Sequence[Path], fingerprint: str, rows: int | None, done: int
    ) -> Iterable[dict[str, Any]]:
        with ExitStack() as stack:
            stack.callback(self._stage.close)
            # Of reading, only the number of parts is known before.
            reading = rows is None
            progress = stack.enter_context(
                Progress(
                    self._label,
                    len(todo) if rows is None else rows,
                    done_steps=0 if reading else done,
                    noun="part" if reading else "row",
                    interactive=None if self._settings.run.progress else False,
                )
            )
            counts: Callable[..., None] = lambda count: None  # noqa: E731
            if self._stage.counts:
                counts = stack.enter_context(progress.phase(self._stage.counts))
            self._stage.watch(counts)
            self._stage.start(inputs, self._directory, counts)
            add = counts if reading else _Counter(progress, done).add
            made = work(self._stage, todo, self._settings, fingerprint, add)
            for number, manifest in enumerate(made, start=1):
                if reading:
                    progress.step(number, {})
                yield manifest


class _Counter:
    """Passes rows on to the display, but not each of them."""

    def __init__(self, progress: Progress, done: int) -> None:
        self._progress, self._done = progress, done
        self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Count rows."""
        self._done += count
        if self._done >= self._progress.total_steps or time.monotonic() - self._told > 0.2:
            self._progress.step(self._done, {})
            self._told = time.monotonic()
