"""Data curation as a pipeline of stages, each leaving its rows on disk and an audit of what it did (3.1, 3.2.1)."""

from __future__ import annotations

from megatron_klear.curation.pipeline import CurationResult, curate

__all__ = ["CurationResult", "curate"]
