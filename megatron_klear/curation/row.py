"""A row on its way through curation, and how it stands in files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_klear.records import Domain


@dataclass(slots=True, kw_only=True)
class Response:
    """A teacher's response and what the grader said of it.

    Attributes:
        text: with its thinking part.
        finish_reason: `stop`, or `length` where it was cut off.
        outcome: as in `records.Grade`; empty while it has not been graded.
        reason: the grader's words.
    """

    text: str
    finish_reason: str = "stop"
    outcome: str = ""
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Row:
    """A problem.

    Attributes:
        row_id: unique over all input.
        domain: which grader judges answers.
        source: where it comes from, by name.
        messages: the conversation up to the question, {"role", "content"} each.
        reference: gold answer (math) or tests as JSON (code); None where there is none.
        responses: answers of a teacher.
        pass_rate: share of a sampling model's graded responses that are correct.
        difficulty: `easy`, `hard`, or empty while unknown.
        embedding: of the prompt, for selection.
        file, line: where the row was read.
    """

    row_id: str
    domain: Domain
    source: str
    messages: list[dict[str, str]]
    reference: str | None
    file: str
    line: int
    responses: list[Response] = field(default_factory=list)
    pass_rate: float | None = None
    difficulty: str = ""
    embedding: list[float] | None = None

    @property
    def prompt_text(self) -> str:
        """The problem as a person reads it: all but system messages."""
        return "\n\n".join(m["content"] for m in self.messages if m["role"] != "system")

    @property
    def size(self) -> int:
        """Characters of its texts, by which buffers are bounded."""
        texts = sum(len(m["content"]) for m in self.messages) + sum(len(r.text) for r in self.responses)
        return texts + len(self.reference or "") + 8 * len(self.embedding or ())


def to_object(row: Row) -> dict[str, Any]:
    """A row as JSON or Parquet holds it between stages."""
    # By hand: dataclasses.asdict copies every text's container, and was most of the time of a stage.
    return {
        "id": row.row_id,
        "domain": row.domain,
        "source": row.source,
        "messages": row.messages,
        "reference": row.reference,
        "file": row.file,
        "line": row.line,
        "responses": [
            {"text": r.text, "finish_reason": r.finish_reason, "outcome": r.outcome, "reason": r.reason}
            for r in row.responses
        ],
        "pass_rate": row.pass_rate,
        "difficulty": row.difficulty,
        "embedding": row.embedding,
    }


def from_object(value: dict[str, Any]) -> Row:
    """The row that `to_object` made a value of."""
    fields = dict(value)
    fields["row_id"] = fields.pop("id")
    fields["responses"] = [Response(**response) for response in fields["responses"] or ()]
    # Parquet gives every message every key.
    fields["messages"] = [{k: v for k, v in message.items() if v is not None} for message in fields["messages"]]
    return Row(**fields)


def row_schema() -> Any:
    """Arrow schema of rows between stages."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("reasoning_content", pa.string())])
    response = pa.struct([(name, pa.string()) for name in ("text", "finish_reason", "outcome", "reason")])
    return pa.schema(
        [
            ("id", pa.string()),
            ("domain", pa.string()),
            ("source", pa.string()),
            ("messages", pa.list_(message)),
            ("reference", pa.string()),
            ("file", pa.string()),
            ("line", pa.int64()),
            ("responses", pa.list_(response)),
            ("pass_rate", pa.float64()),
            ("difficulty", pa.string()),
            ("embedding", pa.list_(pa.float32())),
        ]
    )


def final_schema() -> Any:
    """Arrow schema of the result: what `data.sft` and `data.prompts` of the trainer read, and a few facts beside."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("reasoning_content", pa.string())])
    texts = [(name, pa.string()) for name in ("id", "domain", "source")]
    more = [
        ("reference", pa.string()),
        ("difficulty", pa.string()),
        ("pass_rate", pa.float64()),
        ("outcome", pa.string()),
    ]
    return pa.schema([*texts, ("messages", pa.list_(message)), *more])


def to_final(row: Row) -> dict[str, Any]:
    """A row as the trainer reads it; the one response of a row to fine-tune on is its last message."""
    messages = list(row.messages)
    if row.responses:
        messages.append({"role": "assistant", "content": row.responses[0].text})
    return {
        "id": row.row_id,
        "domain": row.domain,
        "source": row.source,
        "messages": messages,
        "reference": row.reference,
        "difficulty": row.difficulty,
        "pass_rate": row.pass_rate,
        "outcome": row.responses[0].outcome if row.responses else "",
    }
