"""Compiles every Triton kernel for compute capability 9.0, which needs no GPU, and writes down what came out.

Usage: python ahead_of_time_worker.py FOLDER
For each kernel and variant FOLDER gets NAME-VARIANT.ptx, .sass, .usage (cuobjdump's resource line), .shared (bytes)
and .specialised (arguments that a launch would compile variants for).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from klear_kernels.linear_logprob.gradient_kernel import gradient_kernel
from klear_kernels.linear_logprob.label_logit_kernel import BLOCK, label_logit_kernel
from klear_kernels.linear_logprob.statistics_kernel import NO_WORD, statistics_kernel
from klear_kernels.linear_policy_loss.exponent_kernel import LARGEST_EXPONENT, exponent_kernel
from klear_kernels.triton_tiles import HOPPER

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SIZES = {"num_rows": "i32", "num_words": "i32", "size": "i32", "scale": "fp32"}


def descriptor(block: tuple[int, int]) -> str:
    """The type of a descriptor argument."""
    return f"tensordesc<bf16[{block[0]}, {block[1]}]>"


def specialised_arguments(kernel: Any, arguments: dict[str, str]) -> list[str]:
    """Those for whose values or alignment a launch would compile variants of its own."""
    return [
        parameter.name
        for parameter in kernel.params
        if not arguments.get(parameter.name, "tensordesc").startswith("tensordesc")
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    ]


def compile_kernel(
    folder: Path, kernel: Any, variant: str, arguments: dict[str, str], constants: dict[str, Any], **options: int
) -> None:
    """Compile the one variant that is ever launched: nothing is known of integers or of the alignment of pointers."""
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    binary = triton.compile(ASTSource(kernel, signature, constants), target=TARGET, options=options)
    name = f"{kernel.__name__}-{variant}"
    (folder / f"{name}.ptx").write_text(binary.asm["ptx"])
    (folder / f"{name}.specialised").write_text(" ".join(specialised_arguments(kernel, arguments)))
    (folder / f"{name}.shared").write_text(str(binary.metadata.shared))
    cubin = folder / f"{name}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    for suffix, flag in (("usage", "-res-usage"), ("sass", "-sass")):
        dump = subprocess.run([str(CUOBJDUMP), flag, str(cubin)], capture_output=True, text=True, check=True)
        (folder / f"{name}.{suffix}").write_text(dump.stdout)


def compile_tiled(folder: Path, kernel: Any, middle: dict[str, str], constants: dict[str, Any] | None = None) -> None:
    """Compile a kernel over tiles with and without entropy; `middle` are its arguments between weight and sizes."""
    shape_constants = HOPPER.constants()
    options = {key: shape_constants.pop(key) for key in ("num_warps", "num_stages")}
    arguments = {
        "hidden": descriptor(HOPPER.operand_blocks[0]),
        "weight": descriptor(HOPPER.operand_blocks[1]),
        **middle,
        **SIZES,
    }
    for variant, with_entropy in (("entropy", True), ("no-entropy", False)):
        given = {**shape_constants, **(constants or {}), "WITH_ENTROPY": with_entropy}
        compile_kernel(folder, kernel, variant, arguments, given, **options)


def main() -> None:
    folder = Path(sys.argv[1])
    tile = descriptor(HOPPER.stored_block)
    sums = {"sums": "*fp32", "weighted_sums": "*fp32"}
    compile_tiled(
        folder,
        exponent_kernel,
        {"exponentials": tile, "label_columns": "*i32", "reference": "*fp32", **sums},
        {"LARGEST": LARGEST_EXPONENT},
    )
    columns = {"logsumexp": "*fp32", "constant": "*fp32", "slope": "*fp32"}
    compile_tiled(folder, gradient_kernel, {"gradient": tile, **columns})
    compile_tiled(
        folder,
        statistics_kernel,
        {"label_columns": "*i32", "maxima": "*fp32", **sums},
        {"NO_WORD": NO_WORD},
    )
    arguments = {
        "hidden": "*bf16",
        "weight": "*bf16",
        "tokens": "*i64",
        "label_columns": "*i32",
        "out": "*fp32",
        "hidden_stride": "i32",
        "weight_stride": "i32",
        "size": "i32",
        "scale": "fp32",
    }
    compile_kernel(folder, label_logit_kernel, "plain", arguments, {"BLOCK": BLOCK}, num_warps=4, num_stages=3)


if __name__ == "__main__":
    main()
