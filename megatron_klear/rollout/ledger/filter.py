"""Which groups and responses of a ledger to look at, as a condition of its database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFilter:
    """Which responses to look at; None asks for nothing.

    Attributes:
        state: of the group.
        step: that the group is committed to or was trained in.
        outcome: of the response's grade.
        min_reward, max_reward: of the response, both included.
        min_tokens, max_tokens: its length, both included.
        version: a version that some of its tokens were sampled from.
        prompt_id: exactly, or with `%` for any text.
        epoch: pass over the data.
        whole_id: as prompt_id, where `%` stands for itself.
        domain: of the prompt.
    """

    state: str | None = None
    step: int | None = None
    outcome: str | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    version: int | None = None
    prompt_id: str | None = None
    epoch: int | None = None
    whole_id: str | None = None
    domain: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """An SQL condition over `g` (groups) and `r` (responses, absent for groups without any), and its values."""
        # A reward of an ungraded response is stored as 0 and means nothing.
        conditions: list[tuple[str, Any]] = [
            ("g.state = ?", self.state),
            ("g.step = ?", self.step),
            ("r.outcome = ?", self.outcome),
            ("r.outcome != 'ungraded' AND r.reward >= ?", self.min_reward),
            ("r.outcome != 'ungraded' AND r.reward <= ?", self.max_reward),
            ("r.num_tokens >= ?", self.min_tokens),
            ("r.num_tokens <= ?", self.max_tokens),
            ("EXISTS (SELECT 1 FROM json_each(r.versions) v WHERE json_extract(v.value, '$[0]') = ?)", self.version),
            ("g.prompt_id GLOB ?", None if self.prompt_id is None else id_pattern(self.prompt_id)),
            ("g.epoch = ?", self.epoch),
            ("g.prompt_id = ?", self.whole_id),
            ("g.prompt_id IN (SELECT prompt_id FROM prompts WHERE domain = ?)", self.domain),
        ]
        asked = [(text, value) for text, value in conditions if value is not None]
        return " AND ".join(f"({text})" for text, _ in asked) or "1", [value for _, value in asked]


def id_pattern(prompt_id: str) -> str:
    """For SQL's GLOB, in which unlike in LIKE upper and lower case differ; only `%` stands for something else."""
    return "".join("*" if c == "%" else f"[{c}]" if c in "*?[" else c for c in prompt_id)
