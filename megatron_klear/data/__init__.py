"""Input files into prompts and conversations, checked all at once, and the seeded walk over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_klear.data.chat import ChatTokenizer, ConversationError, EncodedConversation, load_chat_tokenizer
    from megatron_klear.data.cursor import CursorState, DataCursor
    from megatron_klear.data.index import (
        IndexedLengths,
        IndexSource,
        SftIndex,
        describe_source,
        indexed_lengths,
        prepare_index,
    )
    from megatron_klear.data.overlap import require_disjoint, text_key
    from megatron_klear.data.prompts import PromptData, load_prompts
    from megatron_klear.data.rows import Message, PromptRow, SftRow, parse_sft_row, read_prompt_rows
    from megatron_klear.data.sft import SftData
    from megatron_klear.data.steps import BinSteps, SequenceSteps, StepPlan, Steps, sft_steps

__all__ = [
    "BinSteps",
    "ChatTokenizer",
    "ConversationError",
    "CursorState",
    "DataCursor",
    "EncodedConversation",
    "IndexSource",
    "IndexedLengths",
    "Message",
    "PromptData",
    "PromptRow",
    "SequenceSteps",
    "SftData",
    "SftIndex",
    "SftRow",
    "StepPlan",
    "Steps",
    "describe_source",
    "indexed_lengths",
    "load_chat_tokenizer",
    "load_prompts",
    "parse_sft_row",
    "prepare_index",
    "read_prompt_rows",
    "require_disjoint",
    "sft_steps",
    "text_key",
]

_HOMES = {
    "chat": (
        "ChatTokenizer",
        "ConversationError",
        "EncodedConversation",
        "load_chat_tokenizer",
    ),
    "cursor": (
        "CursorState",
        "DataCursor",
    ),
    "index": (
        "IndexSource",
        "IndexedLengths",
        "SftIndex",
        "describe_source",
        "indexed_lengths",
        "prepare_index",
    ),
    "overlap": (
        "require_disjoint",
        "text_key",
    ),
    "prompts": (
        "PromptData",
        "load_prompts",
    ),
    "rows": (
        "Message",
        "PromptRow",
        "SftRow",
        "parse_sft_row",
        "read_prompt_rows",
    ),
    "sft": ("SftData",),
    "steps": (
        "BinSteps",
        "SequenceSteps",
        "StepPlan",
        "Steps",
        "sft_steps",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a module when something of it is asked for: walks over the data take in torch, reading files does not."""
    from importlib import import_module

    for module, found in _HOMES.items():
        if name in found:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
