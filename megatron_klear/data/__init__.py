"""Input files into prompts and conversations, checked all at once, and the seeded walk over them."""

from __future__ import annotations

from megatron_klear.data.chat import ChatTokenizer, ConversationError, EncodedConversation, load_chat_tokenizer
from megatron_klear.data.cursor import CursorState, DataCursor
from megatron_klear.data.index import IndexSource, SftIndex, describe_source, prepare_index
from megatron_klear.data.overlap import require_disjoint, text_key
from megatron_klear.data.prompts import PromptData, load_prompts
from megatron_klear.data.rows import Message, PromptRow, SftRow, parse_sft_row, read_prompt_rows
from megatron_klear.data.sft import SftData
from megatron_klear.data.steps import BinSteps, SequenceSteps, StepPlan, Steps

__all__ = [
    "BinSteps",
    "ChatTokenizer",
    "ConversationError",
    "CursorState",
    "DataCursor",
    "EncodedConversation",
    "IndexSource",
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
    "load_chat_tokenizer",
    "load_prompts",
    "parse_sft_row",
    "prepare_index",
    "read_prompt_rows",
    "require_disjoint",
    "text_key",
]
