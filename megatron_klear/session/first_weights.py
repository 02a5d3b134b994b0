"""What version 0 of a run's weights is, by what the files hold that it comes from and not by where they lie alone."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.conversion import HF_FILES
from megatron_klear.session.session import Session


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
    found = [(file.name, file.stat()) for file in sorted(files.glob("*.safetensors"))]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])
