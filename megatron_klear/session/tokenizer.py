"""The tokenizer that a run's settings name; all entries with these settings see prompts and responses through it."""

from __future__ import annotations

from megatron_klear.config import Settings
from megatron_klear.data import ChatTokenizer, load_chat_tokenizer


def run_tokenizer(settings: Settings) -> ChatTokenizer:
    """Load `tokenizer.dir`, with the think markers, stop tokens and model of the settings.

    Raises:
        DataError: as `load_chat_tokenizer`.
    """
    return load_chat_tokenizer(
        settings.tokenizer.dir,
        think_start=settings.tokenizer.think_start,
        think_end=settings.tokenizer.think_end,
        stop_tokens=settings.rollout.stop_tokens,
        model_dir=settings.model.hf_dir,
    )
