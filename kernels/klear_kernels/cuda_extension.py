"""The compiled CUDA C++ part, `klear_kernels._cuda`: there only where it could be built at installation."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def import_error() -> str | None:
    """Why the compiled part cannot be imported, None where it can."""
    try:
        extension()
    except Exception as error:  # not built, or built against another torch: other backends then serve
        return (
            f"klear_kernels._cuda cannot be imported ({error}); "
            "it is built when the package is installed beside nvcc and a CUDA torch"
        )
    return None


def extension() -> Any:
    """The module of csrc/bindings.cpp."""
    return importlib.import_module("klear_kernels._cuda")
