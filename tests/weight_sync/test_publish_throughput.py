"""The benchmark of publishing: which ways it compares, and what it keeps of each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import publish_throughput as module
from benchmarks.origin import origin
from megatron_klear import parallel
from megatron_klear.config import ParallelSettings
from megatron_klear.conformance.compare import architecture
from megatron_klear.records import ParallelContext
from megatron_klear.weight_sync import KeepingTransport, SharedTransport
from megatron_klear.weight_sync.checksums import ExpectedChecksums
from tests.weight_sync.test_publisher import Engine


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


@pytest.fixture
def publishing(context: ParallelContext, tmp_path: Path) -> module.Publishing:
    """To a stand-in that tells true checksums."""
    engine = Engine("a")
    one = SimpleNamespace(facts=SimpleNamespace(tp=1, device="cpu"), caller=engine)
    made = module.Publishing(
        architecture(tied=False), SimpleNamespace(engines=[one]), context, 2**16, tmp_path / "weights"
    )
    expected = ExpectedChecksums(made.layout, head_dim=made.arch.head_dim, context=context)
    assert len(list(expected.watch(made.stream()))) == len(made.weights)
    answer = {"ranks": [{"checksums": rank} for rank in expected.gather()]}
    engine.answers["/weights_checker"] = (200, json.dumps(answer))
    del made.transports["distributed"]  # a stand-in joins no group
    return made


def test_the_default_of_a_run_and_a_colocated_ones_way_are_among_the_rows(
    publishing: module.Publishing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(publishing.transports[module.KEPT], KeepingTransport)
    assert isinstance(publishing.transports[module.SHARED], SharedTransport)
    seconds, peaks = module.measure(publishing, 2)
    told = module.report(publishing, seconds, peaks, argparse.Namespace(rounds=2, out=tmp_path))
    rows = told["rows"]
    assert set(rows) == {"plain copy", "checksums alone", *publishing.transports}
    assert {module.KEPT, module.SHARED} < set(rows)
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in rows)
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["peak_resident_bytes"] > publishing.num_bytes
    newest = list((tmp_path / "weights" / "kept").iterdir())
    assert len(newest) == 1, "the newest set is kept, and no other"


def test_a_peak_is_that_of_its_own_row() -> None:
    """In a process of its own, whose memory nobody else changes."""
    source = (
        "from types import SimpleNamespace\n"
        "import torch\n"
        "from benchmarks.publish_throughput import measure\n"
        "def publish(name):\n"
        "    return float(torch.ones(2**28 if name == 'large' else 1, dtype=torch.uint8)[0])\n"
        "nothing = lambda: 0.0\n"
        "rows = {'large': None, 'small': None}\n"
        "_, peaks = measure(SimpleNamespace(copy=nothing, checksums=nothing, publish=publish, transports=rows), 1)\n"
        "print(peaks['large'] - peaks['small'], peaks['plain copy'] - peaks['small'])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], cwd=root, capture_output=True, text=True)
    large, plain = map(int, done.stdout.split())
    assert large > 2**28 - 2**25
    assert abs(plain) < 2**25


def test_a_result_says_when_and_with_what_it_was_made(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 0.5.23 2.13.0\n")
    python.chmod(0o755)
    told = origin(tmp_path / "venv")
    assert (told["sglang"], told["torch_of_sglang"]) == ("0.5.23", "2.13.0")
    assert len(told["load_average_before"]) == 3
    assert {"date", "commit", "torch", "megatron_core", "machine"} < set(told)
