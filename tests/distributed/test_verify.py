"""The command: its arguments, what it launches where, the tables, and the exit status."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from megatron_klear import verify
from megatron_klear.conformance.launch import LaunchResult, plan_launches
from megatron_klear.conformance.matrix import ERROR_NAMES, GPU_ONLY_LAYOUTS, LAYOUTS, SLACK, Comparison, Layout
from megatron_klear.conformance.table import EquationRow


def comparison(label: str, **errors: float) -> Comparison:
    values = dict.fromkeys(ERROR_NAMES, 1.25) | errors
    return Comparison(label=label, processes=1, device="cpu", seconds=0.1, **values)


@pytest.fixture
def run_nothing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Launches answer at once: every layout passes, unless `change` says otherwise."""
    told: dict[str, Any] = {"launches": [], "change": lambda rows: rows, "failure": None}

    def run(
        layouts: Sequence[Layout], processes: int, *, device: str, timeout_seconds: float, **_: Any
    ) -> LaunchResult:
        told["launches"].append((processes, device, len(layouts), timeout_seconds))
        rows = tuple(comparison(layout.label(processes)) for layout in layouts)
        return LaunchResult(rows=told["change"](rows), failure=told["failure"])

    monkeypatch.setattr(verify, "run_layouts", run)
    return told


def test_help_names_options_and_exit_status_without_torch() -> None:
    code = (
        "import sys\nfrom megatron_klear.verify import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'imported too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    for text in ("--processes", "--device", "--timeout", "--equations-only", "--layouts-only", "Exit status: 0"):
        assert text in done.stdout


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "3"], "got '3', allowed are 1, 2, 4"),
        (["--processes", "1,,2"], "allowed are 1, 2, 4"),
        (["--equations-only", "--layouts-only"], "not allowed with argument"),
        (["--timeout", "0"], "must be a number of seconds from 1 to 86400"),
        (["--timeout", "nan"], "must be a number of seconds"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--rewrds"], "unrecognized arguments: --rewrds"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        verify.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert verify.main(["--device", "cuda"]) == 2
    assert "got 1 processes and 0 GPUs" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert verify.main(["--device", "cuda", "--processes", "2,4"]) == 2
    assert "got 4 processes and 2 GPUs" in capsys.readouterr().err


def test_equations_alone_print_every_row_and_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--equations-only", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.rstrip().endswith("pass |")]
    assert len(rows) == 20
    for number in range(1, 19):
        assert any(f"Eq. {number} " in row or f" {number}" in row.split("|")[2] for row in rows), number
    assert "verify: 20 of 20 equations passed, " in output
    assert "\x1b" not in output, "colours belong on terminals"
    assert "layout" not in output


def test_a_wrong_equation_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_nothing: dict[str, Any]
) -> None:
    row = EquationRow(name="a sum", equation="Eq. 99", device="cpu", error=math.nan, tolerance=1e-13, passed=False)
    monkeypatch.setattr(verify, "check_equations", lambda devices: [row, replace(row, error=0.0, passed=True)])
    assert verify.main(["--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "| a sum | Eq. 99 | cpu |   nan |   1e-13 |   FAIL |" in output
    assert "1 of 2 equations passed, 44 of 44 layouts passed" in output


def test_all_layouts_pass_and_each_has_a_row(run_nothing: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--layouts-only", "--device", "cpu", "--timeout", "77"]) == 0
    captured = capsys.readouterr()
    assert run_nothing["launches"] == [(1, "cpu", 10, 77.0), (2, "cpu", 13, 77.0), (4, "cpu", 21, 77.0)]
    for processes, layouts in LAYOUTS.items():
        for layout in layouts:
            (row,) = [line for line in captured.out.splitlines() if line.startswith(f"| {layout.label(processes)}  ")
                      or line.startswith(f"| {layout.label(processes)} |")]  # fmt: skip
            assert row.split("|")[2].strip() == f"{processes} cpu"
            assert [cell.strip() for cell in row.split("|")[3:8]] == ["1.25"] * 5
    assert "verify: 44 of 44 layouts passed, " in captured.out
    assert "21 layouts on 4 processes (cpu)" in captured.err


@pytest.mark.parametrize("error", [SLACK * 1.01, math.inf, math.nan])
def test_one_error_too_large_ends_with_1(
    run_nothing: dict[str, Any], capsys: pytest.CaptureFixture[str], error: float
) -> None:
    run_nothing["change"] = lambda rows: (replace(rows[0], grads=error), *rows[1:])
    assert verify.main(["--layouts-only", "--device", "cpu", "--processes", "2"]) == 1
    output = capsys.readouterr().out
    assert output.count("FAIL") == 1
    assert "12 of 13 layouts passed" in output


def test_a_launch_that_fails_shows_why_and_which_layouts_did_not_run(
    run_nothing: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_nothing["change"] = lambda rows: rows[:4]
    run_nothing["failure"] = "not done after 600 s. Did not report: rank 1 (in layout 'x [bold] y')."
    assert verify.main(["--layouts-only", "--device", "cpu", "--processes", "2"]) == 1
    output = capsys.readouterr().out
    assert output.count("NOT RUN") == 9
    assert "Layouts on 2 processes (cpu): not done after 600 s." in output
    assert "rank 1 (in layout 'x [bold] y')" in output
    assert "4 of 13 layouts passed" in output


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("auto", 0, [(1, "cpu"), (2, "cpu"), (4, "cpu")]),
        ("auto", 1, [(1, "cpu"), (1, "cuda"), (2, "cpu"), (4, "cpu")]),
        ("auto", 2, [(1, "cpu"), (1, "cuda"), (2, "cuda"), (4, "cpu")]),
        ("auto", 8, [(1, "cpu"), (1, "cuda"), (2, "cuda"), (4, "cuda")]),
        ("cpu", 8, [(1, "cpu"), (2, "cpu"), (4, "cpu")]),
        ("cuda", 4, [(1, "cuda"), (2, "cuda"), (4, "cuda")]),
    ],
)
def test_gpus_are_used_where_there_are_enough(device: str, gpus: int, expected: list[tuple[int, str]]) -> None:
    plan = plan_launches([1, 2, 4], device, num_gpus=gpus, transformer_engine=False)
    assert [(launch.processes, launch.device) for launch in plan] == expected
    assert all(launch.layouts == LAYOUTS[launch.processes] for launch in plan)


def test_transformer_engine_adds_layouts_wherever_gpus_are_used() -> None:
    plan = plan_launches([1, 2, 4], "auto", num_gpus=2, transformer_engine=True)
    assert [(launch.processes, launch.device) for launch in plan] == [(1, "cpu"), (1, "cuda"), (2, "cuda"), (4, "cpu")]
    for launch in plan:
        added = GPU_ONLY_LAYOUTS[launch.processes] if launch.device == "cuda" else ()
        assert launch.layouts == (*LAYOUTS[launch.processes], *added)


def test_transformer_engine_meets_every_axis_and_both_losses() -> None:
    layouts = [(n, layout) for n, rows in GPU_ONLY_LAYOUTS.items() for layout in rows]
    assert {layout.layer_spec for _, layout in layouts} == {"te"}
    assert {layout.kind for _, layout in layouts} == {"sft", "rl"}
    assert all(n == layout.tp * layout.pp * layout.cp * layout.dp(n) for n, layout in layouts)
    for sizes in ({layout.tp for _, layout in layouts}, {layout.pp for _, layout in layouts},
                  {layout.cp for _, layout in layouts}, {layout.dp(n) for n, layout in layouts}):  # fmt: skip
        assert sizes == {1, 2}
