"""`klear_kernels._cuda` without CUDA: its C++ sources compiled for a CPU and called through ctypes.

The row pass is the very kernel that nvcc compiles, run by the fibers of emulator/simt.cuh; the products are
products.cpp over a plain loop that does what cuBLAS documents. Only bindings.cpp is left out, and stood in for here.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch

CSRC = Path(__file__).resolve().parents[2] / "kernels" / "klear_kernels" / "csrc"
EMULATOR = Path(__file__).with_name("emulator")
MAX_WORDS = 163_840


def compile_emulated(directory: Path) -> Path:
    """Compile the sources with the machine's C++ compiler; a second or two."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "a C++ compiler is needed (on Debian: apt install g++)"
    library = directory / "emulated_cuda.so"
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",
        "-shared",
        "-fPIC",
    ]
    sources = [CSRC / "row_pass.cu", CSRC / "products.cpp", EMULATOR / "entry.cpp"]
    command = [compiler, *flags, f"-I{EMULATOR}", f"-I{CSRC}", "-x", "c++", *map(str, sources), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return library


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


class EmulatedCuda:
    """The functions of bindings.cpp, on CPU tensors."""

    max_words = MAX_WORDS

    def __init__(self, library: Path) -> None:
        self._library: Any = ctypes.CDLL(str(library))
        for name in ("row_pass", "logits_product", "hidden_product", "add_weight_product"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._one_at_a_time = threading.Lock()  # the fibers know one running cluster

    def _call(self, name: str, *arguments: Any) -> None:
        with self._one_at_a_time:
            error: bytes | None = getattr(self._library, name)(*arguments)
        if error is not None:
            raise RuntimeError(f"{name}: {error.decode()}")

    def row_pass_blocks(self, words: int) -> int:
        return int(self._library.row_pass_blocks(words))

    def logits_product(self, rows: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, scale: float) -> None:
        assert hidden.dtype == weight.dtype == torch.bfloat16
        assert rows.dtype == torch.float32
        shape = self._shape(rows, weight.shape[0], weight.shape[1])
        self._call("logits_product", *shape, _pointer(hidden), _pointer(weight), ctypes.c_float(scale), _pointer(rows))

    def row_pass(
        self, rows: torch.Tensor, words: int, labels: torch.Tensor, write: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert rows.dtype == torch.float32
        assert labels.dtype == torch.int64
        row_max, label_gap = (
            rows.new_full((rows.shape[0],), float("nan")),
            rows.new_full((rows.shape[0],), float("nan")),
        )
        partials = rows.new_full((rows.shape[0], self.row_pass_blocks(words), 3), float("nan"))
        self._call(
            "row_pass",
            _pointer(rows),
            ctypes.c_int64(rows.shape[1]),
            ctypes.c_int64(rows.shape[0]),
            ctypes.c_int(words),
            *(_pointer(tensor) for tensor in (labels, row_max, label_gap, partials)),
            ctypes.c_int(write),
        )
        return row_max, label_gap, partials

    def hidden_product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert weight.dtype == torch.bfloat16
        out = rows.new_full((rows.shape[0], weight.shape[1]), float("nan"))
        shape = self._shape(rows, weight.shape[0], weight.shape[1])
        self._call("hidden_product", *shape, *map(_pointer, (rows, weight, out)))
        return out

    def add_weight_product(self, gradient: torch.Tensor, rows: torch.Tensor, scaled_hidden: torch.Tensor) -> None:
        assert scaled_hidden.dtype == torch.bfloat16
        assert gradient.dtype == torch.float32
        shape = self._shape(rows, gradient.shape[0], gradient.shape[1])
        self._call("add_weight_product", *shape, *map(_pointer, (rows, scaled_hidden, gradient)))

    @staticmethod
    def _shape(rows: torch.Tensor, words: int, hidden_size: int) -> tuple[Any, ...]:
        return (
            ctypes.c_int(rows.shape[0]),
            ctypes.c_int(hidden_size),
            ctypes.c_int(words),
            ctypes.c_int64(rows.shape[1]),
        )
