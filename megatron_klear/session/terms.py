"""The settings that a run's responses and grades are of, as its rollout ledger keeps them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from megatron_klear.config import Settings
from megatron_klear.data import ChatTokenizer
from megatron_klear.rollout.ledger import OPENING, Terms

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_SAMPLING = ("responses_per_prompt", "temperature", "top_p", "max_response_tokens", "stop_tokens")
_ONLY_SPEED = {"workers", "machine_seconds", "warm_modules"}
"""Settings of the graders that no grade depends on."""


def run_terms(settings: Settings, chat: ChatTokenizer) -> Terms:
    """What stored responses and grades must agree with to be trained on under these settings.

    Args:
        settings: of the run.
        chat: its tokenizer; the model's directory, which no checkpoint keeps, has a say in the end tokens.

    The tokenizer counts by what its files hold and not by where they lie: end tokens and the text that is graded come
    from it. Numerics of the engine do not count, since every token keeps the log-probability it was drawn with.
    """
    sampling: dict[str, Any] = {f"rollout.{name}": getattr(settings.rollout, name) for name in _SAMPLING}
    sampling["end tokens"] = sorted(chat.stop_ids)
    sampling["tokenizer.dir (content)"] = _content(Path(settings.tokenizer.dir))
    if settings.yarn.apply_to == "everything":
        sampling["yarn.factor"] = settings.yarn.factor
        sampling["yarn.original_positions"] = settings.yarn.original_positions
    grading: dict[str, Any] = {
        "tokenizer.think_start": settings.tokenizer.think_start,
        "tokenizer.think_end": settings.tokenizer.think_end,
    }
    if chat.opening:  # a ledger without it was graded without it
        grading[OPENING] = chat.opening
    for section, values in (("reward", settings.reward), ("code_reward", settings.code_reward)):
        names = [f.name for f in dataclasses.fields(values) if f.name not in _ONLY_SPEED]
        grading |= {f"{section}.{name}": getattr(values, name) for name in names}
    return Terms(sampling=sampling, grading=grading)


def _content(directory: Path) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name in _TOKENIZER_FILES:
        file = directory / name
        if file.is_file():
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
