"""What holds for every test: one thread per process, no network, and a GPU for those alone that are marked `gpu`."""

from __future__ import annotations

import os

import pytest

# Before torch is imported anywhere, and inherited by every process that a test starts.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless the tests marked `gpu` are asked for, as `pytest -m gpu`.

    The others prove numbers on the CPU, and Megatron-Core would take a GPU wherever torch sees one.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, since most tests do not need its seconds of start-up

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and `-m gpu`: torch sees none"))
