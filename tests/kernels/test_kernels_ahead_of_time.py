"""Every Triton kernel compiled for an H100 without one: no register spills, and Hopper's matrix instruction."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("ahead_of_time_worker.py")
KERNELS = [
    f"{name}-{entropy}"
    for name in ("exponent_kernel", "gradient_kernel", "statistics_kernel")
    for entropy in ("entropy", "no-entropy")
]
SHARED_MEMORY_OF_A_HOPPER_BLOCK = 227 * 1024


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the PTX, machine code and resources of each kernel, made by one process."""
    folder = tmp_path_factory.mktemp("kernels")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    result = subprocess.run(
        [sys.executable, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def test_every_kernel_of_the_package_is_compiled(compiled: Path) -> None:
    sources = (Path(__file__).parents[2] / "kernels/klear_kernels").rglob("*.py")
    defined = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert defined == {path.stem.split("-")[0] for path in compiled.glob("*.ptx")}


@pytest.mark.parametrize("name", [*KERNELS, "label_logit_kernel-plain"])
def test_no_register_is_spilled(compiled: Path, name: str) -> None:
    usage = (compiled / f"{name}.usage").read_text()
    assert re.search(r"REG:\d+", usage), usage
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage
    assert not re.findall(r"\b(?:STL|LDL)\b", (compiled / f"{name}.sass").read_text())


def test_launches_with_other_numbers_of_tokens_compile_nothing_new(compiled: Path) -> None:
    """Row sums begin where those before them end, at any multiple of 4 bytes; and what is checked here is what runs."""
    assert {path.stem: path.read_text() for path in compiled.glob("*.specialised")} == dict.fromkeys(
        [*KERNELS, "label_logit_kernel-plain"], ""
    )


@pytest.mark.parametrize("name", KERNELS)
def test_the_matrix_instruction_and_the_copies_are_those_of_hopper(compiled: Path, name: str) -> None:
    ptx, sass = (compiled / f"{name}.ptx").read_text(), (compiled / f"{name}.sass").read_text()
    assert set(re.findall(r"wgmma\.mma_async\S*", ptx)) == {
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"  # 64 tokens x 256 words in one instruction
    }
    assert set(re.findall(r"\bHGMMA\.\S+", sass)) == {"HGMMA.64x256x16.F32.BF16"}
    assert not re.search(r"\bHMMA\b", sass)
    assert "cp.async.bulk.tensor" in ptx
    # One product stays under way while the next blocks are asked for.
    assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", ptx)


@pytest.mark.parametrize("name", KERNELS)
def test_blocks_fit_in_shared_memory(compiled: Path, name: str) -> None:
    assert 0 < int((compiled / f"{name}.shared").read_text()) <= SHARED_MEMORY_OF_A_HOPPER_BLOCK


@pytest.mark.parametrize("name", ["exponent_kernel-entropy", "gradient_kernel-entropy"])
def test_tiles_are_written_by_the_copy_engine(compiled: Path, name: str) -> None:
    assert "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group" in (compiled / f"{name}.ptx").read_text()
