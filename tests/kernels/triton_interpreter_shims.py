"""What Triton's interpreter lacks for these kernels: `install` before a kernel runs under TRITON_INTERPRET=1.

The interpreter holds bfloat16 values as 16-bit words, which its product takes for integers; operands are widened
first, as the matrix instruction does. Its rounding to bfloat16 truncates where the device rounds to nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install() -> None:
    """Mend the interpreter of this process; twice does no harm."""
    if getattr(InterpreterBuilder, "klear_shims", False):
        return
    InterpreterBuilder.klear_shims = True
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    plain_convert = InterpreterBuilder.create_fp_to_fp

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, _widened(a), _widened(b), d, *rest)

    def cast(self: Any, source: Any, target: Any) -> Any:
        return _rounded(source) if _narrows(source, target) else plain_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return _rounded(source) if _narrows(source, target) else plain_convert(self, source, target, rounding)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
    InterpreterBuilder.create_fp_to_fp = convert


def _narrows(source: Any, target: Any) -> bool:
    return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16


def _rounded(source: Any) -> Any:
    words = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
    return TensorHandle(words.view(np.uint16), tl.bfloat16)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
