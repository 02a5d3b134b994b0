"""Input files into prompts and conversations, checked all at once, and the seeded walk over them."""

from __future__ import annotations

from megatron_klear.data.chat import ChatTokenizer, ConversationError, EncodedConversation, load_chat_tokenizer
from megatron_klear.data.cursor import CursorState, DataCursor
from megatron_klear.data.overlap import require_disjoint, text_key
from megatron_klear.data.prompts import PromptData, load_prompts
from megatron_klear.data.rows import Message, PromptRow, SftRow, read_prompt_rows, read_sft_rows
from megatron_klear.data.sft import SftData, SftExample, load_sft

__all__ = [
    "ChatTokenizer",
    "ConversationError",
    "CursorState",
    "DataCursor",
    "EncodedConversation",
    "Message",
    "PromptData",
    "PromptRow",
    "SftData",
    "SftExample",
    "SftRow",
    "load_chat_tokenizer",
    "load_prompts",
    "load_sft",
    "read_prompt_rows",
    "read_sft_rows",
    "require_disjoint",
    "text_key",
]
