"""The token ids at which a Hugging Face directory has generation end: by its model, and by its tokenizer.

Whoever serves such a directory reads them from there and ends responses at them, whatever a request says. So
they must be among the ends of every engine, or what is sampled would depend on who started it.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_klear.errors import DataError

_FILES = ("config.json", "generation_config.json")


def end_ids(directory: str | Path) -> tuple[int, ...]:
    """`eos_token_id` of config.json and of generation_config.json together, as SGLang takes them; empty without any.

    Raises:
        DataError: a file that is there cannot be read, or its value is neither an id nor a list of ids.
    """
    found: list[int] = []
    for path in (Path(directory) / name for name in _FILES):
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: eos_token_id cannot be read: {error}") from error
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(number) is int and number >= 0 for number in ids):
            raise DataError(f"{path}: eos_token_id is {value!r}, must be a token id or a list of them")
        found += ids
    return tuple(dict.fromkeys(found))


def tokenizer_end_id(directory: str | Path) -> int | None:
    """The id of the end token of the tokenizer that lies in a directory; None where none can be read."""
    folder = Path(directory)
    try:
        text = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        text = text["content"] if isinstance(text, dict) else text
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        known = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}}
        return int(known[text])
    except (OSError, ValueError, KeyError, TypeError):
        return None
