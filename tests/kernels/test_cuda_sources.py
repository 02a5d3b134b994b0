"""The CUDA C++ sources themselves: what they include, and what nvcc makes of them for a Hopper GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "kernels" / "klear_kernels" / "csrc"


def test_only_the_bindings_know_torch() -> None:
    including = {
        path.name
        for path in CSRC.rglob("*")
        if path.is_file() and re.search(r"#include [<\"](torch|ATen|c10)/", path.read_text())
    }
    assert including == {"bindings.cpp"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_the_row_pass_without_spills_and_two_blocks_to_a_multiprocessor(tmp_path: Path) -> None:
    flags = ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", f"-I{CSRC / 'device'}"]
    output = tmp_path / "row_pass.o"
    command = ["nvcc", *flags, "-Werror", "all-warnings", "-c", str(CSRC / "row_pass.cu"), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert output.stat().st_size > 0
    report = result.stdout + result.stderr
    kernels = re.findall(r"Compiling entry function '\S*row_passILi(\d+)ELb([01])E", report)
    assert sorted(kernels) == sorted((width, write) for width in ("2", "4", "6", "8", "10") for write in "01")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * len(kernels)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    # 65,536 registers and 2048 threads a multiprocessor; a block has 512 threads
    assert len(registers) == len(kernels)
    assert max(registers) <= 65536 // (2 * 512)
