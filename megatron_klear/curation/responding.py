"""Stages that have a model answer: a teacher's responses, and the difficulty that a sampling model finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.config.sampler import SamplerSettings
from megatron_klear.curation.batches import batches
from megatron_klear.curation.grading import RowGraders
from megatron_klear.curation.row import Response, Row
from megatron_klear.curation.stage import Advance, Stage, UnitLog
from megatron_klear.data.chat import ConversationError
from megatron_klear.records import Prompt
from megatron_klear.rollout import ProgressCallback, RolloutProgress

if TYPE_CHECKING:
    from megatron_klear.rollout.open_sampler import Sampler


class SamplingStage(Stage):
    """What stages with a model have in common.

    Args:
        settings: of the run.
        section: name of the sampler's settings.
    """

    stateless = False  # one model at a time; its servers are what is scaled
    counts = "responses"

    def __init__(self, settings: CurationSettings, section: str) -> None:
        self._settings, self._section = settings, section
        self._model: SamplerSettings = getattr(settings, section)
        self._resources = ExitStack()
        self._graders = RowGraders(settings)
        self._sampler: Sampler | None = None
        self._advance: Advance = lambda count: None

    def depends_on(self) -> dict[str, Any]:
        """How responses are drawn, the model's files by name, size and time of change, and how they are graded."""
        drawn = asdict(self._model)
        for name in ("cache", "batch_responses", "chunk_responses", "idle_seconds", "retries", "urls", "device"):
            del drawn[name]  # these change no response
        seen = []
        if self._model.hf_dir is not None:
            seen = [
                (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(self._model.hf_dir).iterdir())
            ]
        rewards = [asdict(self._settings.reward), asdict(self._settings.code_reward)]
        for reward in rewards:
            del reward["workers"]
        return {"drawn": drawn, "model": seen, "seed": self._settings.run.seed, "rewards": rewards}

    def start(self, inputs: Sequence[Path], directory: Path, advance: Advance) -> None:
        """Load the model or find its servers, where the settings name one."""
        if self._model.hf_dir is None:
            return
        from megatron_klear.rollout.open_sampler import open_sampler

        cache = Path(self._settings.run.dir) / f"responses-{self._section}.sqlite"
        seed = self._settings.run.seed
        opened = open_sampler(self._model, section=self._section, cache=cache, seed=seed)
        self._sampler = self._resources.enter_context(opened)

    def watch(self, advance: Advance) -> None:
        """Take what is to be told of every response."""
        self._advance = advance

    def close(self) -> None:
        """Release the model and end the graders."""
        self._resources.close()
        self._graders.close()

    def respond(self, rows: Sequence[Row], log: UnitLog) -> list[Row]:
        """Draw the responses to all rows that have none; rows to which that cannot be done are told to the log.

        At most `max(1, chunk_responses / responses)` rows are handed over at a time, so that one call of the engine
        draws them all.
        """
        asked: dict[int, Prompt] = {}
        kept: list[Row] = []
        for row in rows:
            if not row.responses:
                prompt = self._prompt(row, log)
                if prompt is None:
                    continue
                asked[id(row)] = prompt
            kept.append(row)
        if asked:
            assert self._sampler is not None
            groups = self._sampler.responses.sample(
                asked.values(), num_responses=self._model.responses, on_progress=self._told()
            )
            drawn = dict(zip(asked, groups, strict=True))
            for row in kept:
                if id(row) in drawn:
                    row.responses = [
                        Response(text=self._sampler.chat.response_text(r.response_ids), finish_reason=r.finish_reason)
                        for r in drawn[id(row)].rollouts
                    ]
        return kept

    def _told(self) -> ProgressCallback:
        before = 0

        def tell(progress: RolloutProgress) -> None:
            nonlocal before
            self._advance(progress.finished_responses - before)
            before = progress.finished_responses

        return tell

    def _prompt(self, row: Row, log: UnitLog) -> Prompt | None:
        if self._sampler is None:
            text = f"has no responses, and {self._section}.hf_dir names no model to draw them from"
            log.reject(row, text, "no responses")
            return None
        try:
            prompt = self._sampler.prompt(row.row_id, row.domain, row.messages)
        except ConversationError as error:
            log.reject(row, str(error), "refused by the chat template")
            return None
        length, most = len(prompt.token_ids), self._model.max_prompt_tokens
        if length > most:
            text = f"has {length} tokens, {self._section}.max_prompt_tokens = {most}"
            log.drop(row, "prompt too long", tokens=length, setting=text)
            return None
        return prompt

    @property
    def rows_at_once(self) -> int:
        """Rows whose responses one call of the engine draws."""
        return max(1, self._model.chunk_responses // self._model.responses)


class RespondStage(SamplingStage):
    """Gives every row up to `teacher.responses` graded responses, drawn from the teacher where it brings none.

    Args:
        settings: of the run.
    """

    name = "respond"

    def __init__(self, settings: CurationSettings) -> None:
        super().__init__(settings, "teacher")

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield rows with responses."""
        for batch in batches(rows, self.rows_at_once):
            for row in batch:
                if row.responses:
                    log.audit.count("rows by where responses come from", "input")
                    row.responses = row.responses[: self._model.responses]
                else:
                    log.audit.count("rows by where responses come from", "teacher")
            answered = self.respond(batch, log)
            self._graders.grade_responses(answered)
            for row in answered:
                for response in row.responses:
                    log.audit.count("responses by outcome", response.outcome)
                yield row


class DifficultyStage(SamplingStage):
    """Labels rows easy or hard by the share of the sampling model's responses that are correct (section 5.1.1).

    A row that brings a pass rate keeps it. Where no response could be graded the difficulty stays unknown.

    Args:
        settings: of the run.
    """

    name = "difficulty"

    def __init__(self, settings: CurationSettings) -> None:
        super().__init__(settings, "sampler")
        self._hard_at_most = settings.difficulty.hard_at_most

    def depends_on(self) -> dict[str, Any]:
        """How responses are drawn and graded, and the threshold."""
        return {**super().depends_on(), "hard_at_most": self._hard_at_most}

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield all rows that can be asked, with pass rate and label."""
        from megatron_klear.curation.verify_rl import rate_bucket

        for batch in batches(rows, self.rows_at_once):
            kept = {id(row): row.responses for row in batch}
            unknown = [row for row in batch if row.pass_rate is None]
            for row in unknown:
                row.responses = []
            asked = self.respond(unknown, log)
            self._graders.grade_responses(asked)
            for row in asked:
                graded = [r.outcome for r in row.responses if r.outcome != "ungraded"]
                row.pass_rate = graded.count("correct") / len(graded) if graded else None
            gone = {id(row) for row in unknown} - {id(row) for row in asked}
            for row in batch:
                if id(row) in gone:
                    continue
                row.responses = kept[id(row)]
                if row.pass_rate is None:
                    log.audit.count("rows by difficulty", "unknown")
                else:
                    row.difficulty = "hard" if row.pass_rate <= self._hard_at_most else "easy"
                    log.audit.count("rows by difficulty", row.difficulty)
                    log.audit.count("problems by pass rate", rate_bucket(row.pass_rate))
                yield row
