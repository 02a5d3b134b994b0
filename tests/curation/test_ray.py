"""Curation on a Ray cluster of two nodes makes what one process makes, also when a node is lost on the way."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curation_inputs import row
from megatron_klear import curate
from megatron_klear.curation import engines

WriteConfig = Callable[..., Path]
UNITS, PER_UNIT = 12, 5


@pytest.fixture
def nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster, and two nodes of it beside its head."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
    try:
        yield cluster, [cluster.add_node(num_cpus=2, **memory) for _ in range(2)]
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def config(write_config: WriteConfig) -> Path:
    rows = [row(i, f"prompt number {i}", source="ab"[i % 2]) for i in range(UNITS * PER_UNIT)]
    return write_config(rows, stages=("sources",), sources={"math_ranking": ["a"]}, run={"rows_per_file": PER_UNIT})


def made(config: Path, root: Path, *overrides: str) -> list[bytes]:
    assert curate.run([str(config), f"run.dir={root}", *overrides]) == 0
    return [file.read_bytes() for file in sorted((root / "result").iterdir())]


def test_a_cluster_that_loses_a_node_makes_what_one_process_makes(
    nodes: tuple[Any, Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, workers = nodes
    seen = tmp_path / "seen"
    seen.mkdir()
    do_item = engines._do_item

    def noted(item: dict[str, bytes]) -> dict[str, str]:
        import os

        import ray

        (seen / f"{ray.get_runtime_context().get_node_id()} {os.getpid()} {time.monotonic_ns()}").touch()
        time.sleep(1.0)  # long enough for the node to be lost in the middle of it
        return do_item(item)

    monkeypatch.setattr(engines, "_do_item", noted)

    def lose() -> None:
        deadline = time.monotonic() + 240
        while not (at_work := [node for node in workers if node.node_id in nodes_seen(seen)]):
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        cluster.remove_node(at_work[0], allow_graceful=False)

    losing = threading.Thread(target=lose, daemon=True)
    expected = made(config, tmp_path / "local")
    losing.start()
    found = made(config, tmp_path / "ray", "run.engine=ray", "run.workers=4", f"run.ray_address={cluster.address}")
    assert found == expected
    assert len(found) == UNITS
    assert len(nodes_seen(seen)) >= 2, "both nodes were given units"
    losing.join(30)
    assert not losing.is_alive()
    assert len(list(seen.iterdir())) > UNITS, "units of the lost node were made again"


def nodes_seen(directory: Path) -> set[str]:
    return {file.name.split()[0] for file in directory.iterdir()}


def test_ray_is_asked_for_by_name_where_it_is_missing(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert curate.run([str(config), "run.engine=ray"]) == 2
    assert "install the extra ray, or set run.engine=local" in capsys.readouterr().err
