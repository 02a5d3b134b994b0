"""tools/profile_kernels.sh and what it makes of ncu's output, without ncu."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
LONG = "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
BARRIER = "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"


@pytest.fixture(scope="module")
def limiter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ncu_limiter", ROOT / "tools" / "ncu_limiter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ncu_limiter"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def launch(identity: int, kernel: str, **metrics: tuple[str, str]) -> list[str]:
    """Lines as ncu writes them: one per metric, numbers with thousands separators."""
    start = f'"{identity}","4242","python3.11","127.0.0.1","{kernel}","1","7","(512, 1, 1)","(32768, 1, 1)","0","9.0",'
    section = '"Command line profiler metrics",'
    return [f'{start}{section}"{name}","{unit}","{value}"' for name, (unit, value) in metrics.items()]


def sample() -> list[str]:
    return [
        "==PROF== Connected to process 4242 (/usr/bin/python3.11)",
        '==PROF== Profiling "row_pass" - 0: 0%....50%....100% - 4 passes',
        "some line of the program itself",
        HEADER,
        *launch(0, "gemm, bf16(int, float)", **{
            "gpu__time_duration.sum": ("ns", "6,000,000"), "dram__bytes.sum": ("byte", "9,000,000,000"),
            TENSOR: ("%", "91.50"), DRAM: ("%", "48.00"), LONG: ("inst", "1.20"), WARPS: ("%", "12.4"),
        }),
        *launch(1, "row_pass", **{
            "gpu__time_duration.sum": ("ns", "1,000,000"), "dram__bytes.sum": ("byte", "1,500,000,000"),
            TENSOR: ("%", "0"), DRAM: ("%", "50.00"), LONG: ("inst", "9.00"), BARRIER: ("inst", "2.00"),
            WARPS: ("%", "47.0"),
        }),
        *launch(2, "row_pass", **{
            "gpu__time_duration.sum": ("ns", "3,000,000"), "dram__bytes.sum": ("byte", "4,500,000,000"),
            TENSOR: ("%", "0"), DRAM: ("%", "54.00"), LONG: ("inst", "1.00"), BARRIER: ("inst", "5.00"),
            WARPS: ("%", "47.0"),
        }),
        *launch(3, "tail", **{"gpu__time_duration.sum": ("us", "2.5"), TENSOR: ("%", "n/a")}),
        "==PROF== Disconnected from process 4242",
    ]  # fmt: skip


def test_launches_of_a_kernel_are_weighted_by_time(limiter: ModuleType) -> None:
    kernels = limiter.parse(sample())
    assert [kernel.name for kernel in kernels] == ["gemm, bf16(int, float)", "row_pass", "tail"]
    row_pass = kernels[1]
    assert (row_pass.launches, row_pass.nanoseconds, row_pass.bytes_moved) == (2, 4e6, 6e9)
    assert row_pass.mean(DRAM) == pytest.approx((50 * 1 + 54 * 3) / 4)
    assert row_pass.mean("lts__throughput.avg.pct_of_peak_sustained_elapsed") is None
    assert kernels[2].nanoseconds == 2500.0


def test_words(limiter: ModuleType) -> None:
    gemm, row_pass, tail = limiter.parse(sample())
    assert gemm.limiter() == "limited by the matrix instructions, used at 92 % of their peak"
    # barrier: (2 + 3 * 5) / 4 = 4.25, memory: (9 + 3 * 1) / 4 = 3
    assert row_pass.limiter() == (
        "limited by latency: the busiest is the device memory's bandwidth, used at 53 % of their peak; "
        "warps wait mostly for other warps at a barrier; 47 % of the warps that fit are there"
    )
    assert tail.limiter() == "ncu gave the use of no unit"
    text = limiter.describe([gemm, row_pass, tail])
    assert "1 launch(es), 6.000 ms (60% of all), 1500 GB/s of device memory, matrix instructions 92 % of" in text


def test_between_busy_and_idle(limiter: ModuleType) -> None:
    lines = [HEADER, *launch(0, "k", **{"gpu__time_duration.sum": ("ns", "10"), DRAM: ("%", "70")})]
    (kernel,) = limiter.parse(lines)
    assert kernel.limiter() == "nearest to the limit of the device memory's bandwidth, used at 70 % of their peak"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["==ERROR== no"], 'found no line that begins with "ID"'),
        (['"ID","Kernel Name","gpu__time_duration.sum"'], "found no column Metric Name, Metric Value"),
        ([HEADER, *launch(7, "k", **{DRAM: ("%", "70")})], "launch 7 of k has no gpu__time_duration.sum"),
    ],
)
def test_output_that_cannot_be_read(limiter: ModuleType, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limiter.parse(lines)


def run_script(*arguments: str, path: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "profile_kernels.sh"), *arguments],
        env={**os.environ, "PATH": path, "KLEAR_VENV": str(directory / "none"), **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake(directory: Path, name: str, body: str) -> None:
    program = directory / name
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)


def system_path(directory: Path) -> str:
    """What the script needs, and neither ncu nor a python that is not given."""
    for tool in ("bash", "dirname", "readlink", "sed", "grep", "tail", "cat"):
        (directory / tool).symlink_to(next(p for p in (Path("/bin"), Path("/usr/bin")) if (p / tool).exists()) / tool)
    return str(directory)


def test_refuses_without_ncu(tmp_path: Path) -> None:
    result = run_script(path=system_path(tmp_path), directory=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("profile: ncu is not on PATH. Install Nsight Compute")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fastest"], "profile: backend: got fastest, allowed torch, triton, cuda"),
        (["cuda", "all"], "profile: operation: got all, allowed logprob, policy, lm"),
        (["cuda", "lm", "8k"], "profile: sizes: got 8k, allowed whole numbers above 0"),
    ],
)
def test_refuses_arguments_by_name(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run_script(*arguments, path=system_path(tmp_path), directory=tmp_path)
    assert (result.returncode, result.stderr.strip()) == (2, message)


def test_refuses_without_a_gpu(tmp_path: Path) -> None:
    path = system_path(tmp_path)
    fake(tmp_path, "ncu", "exit 99")
    fake(tmp_path, "python3", "exit 1")
    result = run_script(path=path, directory=tmp_path)
    assert (result.returncode, result.stderr.strip()) == (2, "profile: torch sees no GPU")


def test_with_an_ncu_that_answers(tmp_path: Path) -> None:
    path = system_path(tmp_path)
    (tmp_path / "sample.csv").write_text("\n".join(sample()) + "\n")
    fake(tmp_path, "ncu", f'echo "$@" >{tmp_path}/arguments; cat {tmp_path}/sample.csv')
    # python3 that says there is a GPU, and otherwise is the real one
    fake(tmp_path, "python3", f'[[ $1 == -c ]] && exit 0; exec {sys.executable} "$@"')
    result = run_script("cuda", "lm", "64", "1000", "32", path=path, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("klear cuda, lm, N 64, V 1000, H 32")
    assert "limited by the matrix instructions" in result.stdout
    given = (tmp_path / "arguments").read_text()
    assert "--csv --print-units base --profile-from-start off" in given
    assert TENSOR in given
    assert "--profile --only klear cuda --operations lm --tokens 64 --words 1000 --hidden-size 32" in given
    assert (tmp_path / "profile_kernels.csv").exists()


def test_counters_that_may_not_be_read(tmp_path: Path) -> None:
    path = system_path(tmp_path)
    fake(tmp_path, "ncu", 'echo "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"; exit 1')
    fake(tmp_path, "python3", f'[[ $1 == -c ]] && exit 0; exec {sys.executable} "$@"')
    result = run_script(path=path, directory=tmp_path)
    assert result.returncode == 2
    assert "this user may not read the GPU's counters: run as root" in result.stderr
