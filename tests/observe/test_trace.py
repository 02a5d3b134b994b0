"""What is read out of a trace, made by hand and by torch's profiler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_klear.observe.ranges import nvtx_range
from megatron_klear.observe.trace import Total, main, read_trace, summary, totals

EVENTS = [
    {"ph": "X", "cat": "user_annotation", "name": "train", "ts": 0, "dur": 5e6},
    {"ph": "X", "cat": "user_annotation", "name": "train", "ts": 9e6, "dur": 1e6},
    {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1, "dur": 2e6},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 3e6},
    {"ph": "M", "name": "process_name"},
]


@pytest.mark.parametrize("packed", [False, True])
def test_durations_are_added_up_by_name(packed: bool, tmp_path: Path) -> None:
    raw = json.dumps({"traceEvents": EVENTS}).encode()
    (tmp_path / "trace").write_bytes(gzip.compress(raw) if packed else raw)
    events = read_trace(tmp_path / "trace")
    assert totals(events, "user_annotation") == [Total("train", 2, 6.0)]
    assert totals(events, "kernel", "cpu_op") == [Total("aten::mm", 1, 3.0), Total("gemm", 1, 2.0)]
    lines = summary(events).splitlines()
    assert lines[1].split() == ["6.0000", "2", "train"]
    assert lines[4].split() == ["2.0000", "1", "gemm"], "kernels where there are any, else operations"


def test_our_ranges_are_in_torchs_own_trace(tmp_path: Path) -> None:
    with torch.profiler.profile() as profiler, nvtx_range("outer"), nvtx_range("inner"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = read_trace(tmp_path / "trace.json")
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "user_annotation"}
    assert spans["outer"][0] <= spans["inner"][0] < spans["inner"][1] <= spans["outer"][1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"traceEvents": 1}', b"\x1f\x8bnonsense"])
def test_what_is_no_trace(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace").write_bytes(content)
    assert main([str(tmp_path / "trace")]) == 2
    assert "not a trace that can be read" in capsys.readouterr().err


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(tmp_path / "nowhere")]) == 2
