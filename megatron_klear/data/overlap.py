"""Keeps held-out problems out of the training data."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping

from megatron_klear.data.problems import Problems


def text_key(text: str) -> str:
    """What a problem is recognised by: a digest of its text without regard to case, spacing and Unicode variants."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def require_disjoint(
    heldout: Iterable[tuple[str, str]],
    training: Mapping[str, Iterable[tuple[str, str]]],
    *,
    setting: str = "data.heldout",
) -> None:
    """Refuse held-out problems that are trained on.

    Args:
        heldout: (name, text key) of each held-out problem.
        training: by setting that lists the files (data.prompts, data.sft), (name, text key) of each problem.
        setting: dotted path of the setting that lists the held-out files.

    Raises:
        DataError: listing the problems in common by their names on both sides.
    """
    names: dict[str, str] = {}
    for name, key in heldout:
        names.setdefault(key, name)
    problems = Problems(f"{setting}: held-out problems must not be trained on")
    for trained_setting, rows in training.items():
        for name, key in rows:
            if key in names:
                problems.add(f"{trained_setting} {name}", f"the same problem as held-out {names[key]}")
    problems.raise_if_any(f"Remove these rows from the training files or from {setting}.")
