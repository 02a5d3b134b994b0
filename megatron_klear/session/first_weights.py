"""What version 0 of a run's weights is, by what the files hold that it comes from and not by where they lie alone."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.conversion import HF_FILES
from megatron_klear.session.session import Session

_PIECES, _PIECE_BYTES = 64, 2**14


def first_weights_identity(session: Session, fingerprint: str) -> str:
    """Of all that responses of version 0 depend on; on rank 0, in a life that has just filled the model.

    Args:
        session: the run.
        fingerprint: of the data.
    """
    settings = session.settings
    named = (settings.model, settings.checkpoint.start_from, settings.run.seed, fingerprint)
    files = session.store.hf_files if settings.checkpoint.start_from or settings.model.hf_dir else None
    content = () if files is None or session.resumed is not None else (_content(files),)
    return hashlib.blake2b(repr((*named, *content)).encode(), digest_size=16).hexdigest()


def _content(files: Path) -> str:
    """Of the checkpoint, or the Hugging Face directory, that the model was filled from.

    A run that is started from goes on meanwhile, and the newest of its checkpoints is another one then.
    """
    if files.name == HF_FILES:
        with contextlib.suppress(OSError):  # removed since it was read: no later life starts from the same
            return f"{files.parent.name} {hashlib.blake2b((files.parent / layout.MANIFEST).read_bytes()).hexdigest()}"
        return files.parent.name
    return repr([(file.name, _sample(file)) for file in sorted(files.glob("*.safetensors"))])


def _sample(file: Path) -> str:
    """Of a file's size and of bytes all over it; its times say nothing, as where each job copies it anew."""
    size, found = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        for number in range(_PIECES):
            opened.seek(max(0, size - _PIECE_BYTES) * number // (_PIECES - 1))
            found.update(opened.read(_PIECE_BYTES))
    return f"{size} {found.hexdigest()}"
