"""Tokens of a run as text, with the tokenizer that the run used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_klear.records import IntArray

Decode = Callable[[IntArray], str]


def run_decoder(run_dir: Path) -> Decode | None:
    """A function from token ids to text; None when the run's tokenizer is no longer where its settings say.

    Args:
        run_dir: its `config.yaml` names the tokenizer's directory, relative to where the run was started.
    """
    # Here, and by the small library only: a listing must not wait for transformers.
    import yaml
    from tokenizers import Tokenizer

    try:
        settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        file = Path(settings["tokenizer"]["dir"]) / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises a plain Exception; whatever it is, ids are shown instead
        return None
    return lambda token_ids: str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))
