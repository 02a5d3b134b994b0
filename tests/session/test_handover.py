"""The order of handovers, and what happens when an engine fails in one; engines and trainer are stand-ins here."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klear import parallel
from megatron_klear.config import ParallelSettings
from megatron_klear.errors import KlearError, RolloutError, WeightSyncError
from megatron_klear.observe import MemoryReading, names
from megatron_klear.parallel import FirstRank
from megatron_klear.records import ParallelContext
from megatron_klear.session import engine_memory
from megatron_klear.session.engine_memory import EngineMemory
from megatron_klear.session.handover import Handover
from megatron_klear.weight_sync import EngineGroup

Answer = tuple[int, str] | Exception
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
GB = 10**9


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


class Scene:
    """An engine, a trainer's memory and a GPU in one: all that is done is noted in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.answers: dict[str, list[Answer]] = {}
        self.trainer: set[str] = {"gradients", "optimizer", "weights"}
        self.free = 100 * GB
        self.engine_bytes = {"kv_cache": 40 * GB, "weights": 16 * GB}

    # The engine, as `EngineCaller`.
    name, url = "engine 0", "http://127.0.0.1:1"

    def start(self, path: str, body: Mapping[str, Any], *, timeout_seconds: float) -> Any:
        stage = body.get("tags", [""])[0]
        self.done.append(f"{path} {stage}".strip())
        queue = self.answers.get(path, [])
        answer = queue.pop(0) if queue else (200, "null")
        if not isinstance(answer, Exception) and answer[0] == 200 and stage:
            self.free += self.engine_bytes[stage] * (1 if path == RELEASE else -1)
        future: concurrent.futures.Future[tuple[int, str]] = concurrent.futures.Future()
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    # The trainer, as `TrainerMemory`.
    def away(self) -> set[str]:
        return {"gradients", "optimizer", "weights"} - self.trainer

    def num_bytes(self, part: str) -> int:
        return 1 if part in self.trainer else 0

    def offload(self, *parts: str) -> None:
        self.done += [f"offload {part}" for part in sorted(parts) if part in self.trainer]
        self.trainer -= set(parts)

    def restore(self, *parts: str) -> None:
        self.done += [f"restore {part}" for part in sorted(parts) if part not in self.trainer]
        self.trainer |= set(parts)

    def read(self) -> MemoryReading:
        return MemoryReading(device_free_bytes=self.free, device_used_bytes=1, host_free_bytes=2, host_used_bytes=3)

    def take(self) -> list[str]:
        done, self.done = self.done, []
        return done


@pytest.fixture
def scene() -> Scene:
    return Scene()


class Colocated:
    """A handover in the middle of its life: servers have started, and the trainer has the memory."""

    def __init__(self, scene: Scene, context: ParallelContext, root: Path, *, offload_weights: bool = False) -> None:
        settings = SimpleNamespace(sglang=SimpleNamespace(offload_weights=offload_weights))
        self.session: Any = SimpleNamespace(
            trainer=SimpleNamespace(memory=scene), settings=settings, context=context, root=root, is_first=True, step=4,
            noted={}, around_save=None,
        )  # fmt: skip
        self.scene = scene
        first_rank = FirstRank(context, silence_seconds=5.0)
        self.group = EngineGroup([scene], 5.0)
        self.ended: list[str] = []
        self.group.on_lost = lambda caller: self.ended.append(caller.name)
        self.stopping = False
        self.engines = EngineMemory(self.group, first_rank.alive, lambda: self.stopping)
        self.handover = Handover(self.session, first_rank, scene.read)
        self.handover._is_gpu = True  # as far as measuring goes: without CUDA engines give nothing back
        self.handover.make_room()
        scene.free -= sum(scene.engine_bytes.values())
        self.handover.engines_started(self.engines)

    def publish(self) -> str:
        def send() -> str:
            self.scene.done.append("publish")
            self.handover.resume_cache()
            self.scene.done.append("go on")
            return "report"

        return self.handover.to_engines(send)


@pytest.mark.parametrize("offload_weights", [False, True])
def test_the_order_of_a_step(scene: Scene, context: ParallelContext, tmp_path: Path, offload_weights: bool) -> None:
    weights = ["weights"] if offload_weights else []
    quiet = ["/pause_generation", "/flush_cache"]
    release = [f"{RELEASE} kv_cache", f"{RELEASE} weights"]
    back = ["restore gradients", "restore optimizer", *(f"restore {w}" for w in weights)]
    colocated = Colocated(scene, context, tmp_path, offload_weights=offload_weights)
    assert scene.take() == [
        "offload gradients", "offload optimizer", *(f"offload {w}" for w in weights), *quiet, *release, *back,
    ]  # fmt: skip
    for _ in range(2):
        assert colocated.publish() == "report"
        assert scene.take() == [
            "offload gradients",
            "offload optimizer",
            f"{RESUME} weights",
            "publish",
            *(f"offload {w}" for w in weights),
            f"{RESUME} kv_cache",
            "go on",
        ]
        colocated.handover.to_trainer()
        assert scene.take() == [*quiet, *release, *back]
    colocated.handover.to_trainer()
    assert scene.take() == [], "it had the memory already"
    noted = colocated.session.noted
    assert noted[names.at_turn("engines", "device_free_bytes")] == 44 * GB
    assert noted[names.at_turn("trainer", "device_free_bytes")] == 100 * GB
    assert noted[names.at_turn("trainer", "trainer_bytes")] == 3
    assert noted[names.at_turn("engines", "trainer_bytes")] == (0 if offload_weights else 1)
    rows = [json.loads(line) for line in (tmp_path / "logs" / "memory.jsonl").read_text().splitlines()]
    assert [row["turn"] for row in rows] == ["trainer", *["engines", "trainer"] * 2, "trainer"]
    assert {(row["rank"], row["step"], row["host_used_bytes"]) for row in rows} == {(0, 4, 3)}


def test_a_checkpoint_borrows_the_caches_memory_and_gives_it_back(
    scene: Scene, context: ParallelContext, tmp_path: Path
) -> None:
    colocated = Colocated(scene, context, tmp_path, offload_weights=True)
    colocated.publish()
    scene.take()
    with colocated.session.around_save():
        assert scene.take() == [
            "/pause_generation", "/flush_cache", f"{RELEASE} kv_cache", "restore optimizer", "restore weights",
        ]  # fmt: skip
    assert scene.take() == ["offload optimizer", "offload weights", f"{RESUME} kv_cache", "/continue_generation"]
    colocated.handover.to_trainer()
    scene.take()
    with colocated.session.around_save():
        pass
    assert scene.take() == [], "in the trainer's turn its state is there"


def test_too_little_memory_is_said_before_an_engine_is_woken(
    scene: Scene, context: ParallelContext, tmp_path: Path
) -> None:
    colocated = Colocated(scene, context, tmp_path)
    scene.take()
    scene.free = 55 * GB  # somebody else has come: enough for the weights, not for the cache beside them
    with pytest.raises(RolloutError, match=r"KV cache and graphs .*rank 0: 39\.00 GB free, 40\.00 GB needed") as error:
        colocated.publish()
    assert "sglang.memory_fraction" in str(error.value)
    assert f"{RESUME} kv_cache" not in scene.take()


def test_an_engine_that_refuses_stops_the_run(scene: Scene, context: ParallelContext, tmp_path: Path) -> None:
    colocated = Colocated(scene, context, tmp_path)
    colocated.group.least = 0
    scene.answers = {RESUME: [(400, "CUDA out of memory")]}
    with pytest.raises(WeightSyncError, match=r"taking memory back .*engine 0: .* status 400: CUDA out of memory"):
        colocated.publish()
    assert colocated.ended == [], "it answered"


@pytest.mark.parametrize("path", ["/pause_generation", "/flush_cache", RELEASE, RESUME])
@pytest.mark.parametrize("managed", [True, False])
def test_an_engine_that_gives_no_answer_is_ended_for_its_memory(
    scene: Scene, context: ParallelContext, tmp_path: Path, path: str, managed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, hung, or slower than allowed: the manager starts it anew in the engines' turn, if there is a manager."""
    monkeypatch.setattr(engine_memory, "_DRAIN_SECONDS", 0.0)
    colocated = Colocated(scene, context, tmp_path)
    colocated.publish()
    colocated.group.least = 0 if managed else None
    scene.answers = {path: [KlearError(f"engine 0: no answer to {path} for 900 s")]}
    if not managed:
        failing = colocated.publish if path == RESUME else colocated.handover.to_trainer
        if path == RESUME:
            colocated.handover.to_trainer()
        with pytest.raises(WeightSyncError, match=f"no answer to {path}"):
            failing()
        return
    colocated.handover.to_trainer()
    assert scene.trainer == {"gradients", "optimizer", "weights"}
    assert colocated.publish() == "report"
    assert colocated.group.callers == ()
    assert colocated.ended == ["engine 0"]
    with colocated.engines.turn.starting(lambda: pytest.fail("it is the engines' turn: a server may start")):
        pass


def test_an_engine_that_its_restart_has_taken_out_is_not_ended(
    scene: Scene, context: ParallelContext, tmp_path: Path
) -> None:
    """It was ended before; what is ended now would be the server that starts in its place."""
    colocated = Colocated(scene, context, tmp_path)
    colocated.publish()
    colocated.group.least = 0

    def restarting(path: str, body: Mapping[str, Any], *, timeout_seconds: float) -> Any:
        colocated.group.leave(scene)
        scene.answers = {path: [KlearError("engine 0: no connection")]}
        return Scene.start(scene, path, body, timeout_seconds=timeout_seconds)

    scene.start = restarting  # type: ignore[method-assign]
    colocated.engines.go_on()
    assert colocated.group.callers == ()
    assert colocated.ended == []


def test_a_run_that_is_stopping_saves_without_waiting_for_a_server_that_starts(
    scene: Scene, context: ParallelContext, tmp_path: Path
) -> None:
    colocated = Colocated(scene, context, tmp_path)
    colocated.publish()
    turn, started, given_up = colocated.engines.turn, threading.Event(), threading.Event()

    def start() -> None:
        with turn.starting(lambda: None):
            started.set()
            while not (turn.is_urgent or given_up.is_set()):
                time.sleep(0.01)

    starting = threading.Thread(target=start)
    starting.start()
    assert started.wait(10.0)
    threading.Timer(0.5, lambda: setattr(colocated, "stopping", True)).start()
    fallback = threading.Timer(20.0, given_up.set)
    fallback.start()
    began = time.monotonic()
    with colocated.session.around_save():
        assert "optimizer" in scene.trainer
        assert 0.4 < time.monotonic() - began < 10.0, "it waits until it is asked to stop, and no longer"
    fallback.cancel()
    given_up.set()
    starting.join(10.0)


def test_memory_is_asked_for_when_nothing_computes_any_more(
    scene: Scene, context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_memory, "_PAUSE_SECONDS", 0.0)
    colocated = Colocated(scene, context, tmp_path)
    colocated.publish()
    scene.take()
    busy = (400, "Flush cache failed: running or waiting requests")
    scene.answers = {"/flush_cache": [busy, busy]}
    colocated.handover.to_trainer()
    assert scene.take()[:5] == ["/pause_generation", *["/flush_cache"] * 3, f"{RELEASE} kv_cache"]
    colocated.publish()
    scene.take()
    monkeypatch.setattr(engine_memory, "_DRAIN_SECONDS", 0.0)
    scene.answers = {"/flush_cache": [busy, busy]}
    with pytest.raises(WeightSyncError, match=r"giving up memory .*running or waiting requests"):
        colocated.handover.to_trainer()
    assert f"{RELEASE} kv_cache" not in scene.take()
