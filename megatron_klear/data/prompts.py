"""Problems to reinforce on or to evaluate with, as prompts ready for generation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_klear.data.chat import ChatTokenizer, ConversationError
from megatron_klear.data.overlap import text_key
from megatron_klear.data.problems import Problems
from megatron_klear.data.rows import read_prompt_rows
from megatron_klear.errors import DataError
from megatron_klear.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptData:
    """All usable prompts in file order.

    Attributes:
        prompts: at least one.
        dropped_ids: rows left out for their length.
        fingerprint: of ids, tokens and references; equal data have equal fingerprints.
    """

    prompts: tuple[Prompt, ...]
    dropped_ids: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def keys(self) -> list[tuple[str, str]]:
        """(prompt_id, text key) of each prompt, for `require_disjoint`."""
        return [(p.prompt_id, text_key(p.text)) for p in self.prompts]


def load_prompts(
    paths: Sequence[str | Path],
    chat: ChatTokenizer,
    *,
    max_prompt_tokens: int,
    oversize: Literal["refuse", "drop"] = "refuse",
    setting: str = "data.prompts",
) -> PromptData:
    """Read, check and tokenize prompt files.

    Args:
        paths: JSON lines files (data.prompts or data.heldout).
        chat: the tokenizer; its generation prompt ends every prompt.
        max_prompt_tokens: longest prompt, chat template included (data.max_prompt_tokens).
        oversize: what happens to longer ones (data.oversize).
        setting: dotted path of the setting that lists the files.

    Raises:
        DataError: naming file and line of everything that is wrong, prompts that are too long included.
    """
    problems = Problems(f"the prompts of {setting}")
    prompts: list[Prompt] = []
    dropped: list[str] = []
    too_long = 0
    for row in read_prompt_rows(paths, setting=setting):
        try:
            token_ids = chat.encode_prompt(row.messages)
        except ConversationError as error:
            problems.add(row.where, str(error))
            continue
        if len(token_ids) > max_prompt_tokens:
            if oversize == "drop":
                dropped.append(row.row_id)
            else:
                too_long = max(too_long, len(token_ids))
                text = f"prompt {row.row_id} has {len(token_ids)} tokens, data.max_prompt_tokens = {max_prompt_tokens}"
                problems.add(row.where, text)
            continue
        prompts.append(
            Prompt(
                prompt_id=row.row_id,
                domain=row.domain,
                token_ids=token_ids,
                reference=row.reference,
                text="\n\n".join(m["content"] for m in row.messages if m["role"] != "system"),
            )
        )
    problems.raise_if_any(
        f"Set data.max_prompt_tokens to at least {too_long}, or data.oversize=drop to leave long prompts out."
        if too_long
        else ""
    )
    if not prompts:
        raise DataError(
            f"{setting}: all {len(dropped)} prompts are over data.max_prompt_tokens = {max_prompt_tokens} tokens "
            "and were dropped; raise it"
        )
    return PromptData(prompts=tuple(prompts), dropped_ids=tuple(dropped), fingerprint=_fingerprint(prompts))


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\0{prompt.domain}\0{prompt.reference}\0".encode())
        digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()
