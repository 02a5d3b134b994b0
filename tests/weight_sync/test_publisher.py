"""A publish that goes wrong stops with a message, and leaves the engines paused."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_klear import parallel
from megatron_klear.config import ParallelSettings
from megatron_klear.errors import RolloutError, WeightSyncError
from megatron_klear.parallel import FirstRank
from megatron_klear.records import ParallelContext
from megatron_klear.weight_sync import (
    DiskTransport,
    EngineGroup,
    EngineLayout,
    KeepingTransport,
    Publisher,
    TensorTransport,
    WeightFiles,
    common_layout,
    restore,
)
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.checksums import differences, verify
from megatron_klear.weight_sync.hashes import engine_hash

WEIGHTS = {"model.norm.weight": torch.arange(4.0), "model.layers.0.self_attn.q_norm.weight": torch.ones(3)}

Answer = tuple[int, str] | Exception


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


class Engine:
    """An engine that answers 200, and true checksums, unless told otherwise."""

    def __init__(self, name: str, answers: dict[str, Answer] | None = None) -> None:
        self.name, self.url = name, "http://127.0.0.1:1"
        self.answers = {"/weights_checker": (200, self.checksums({})), **(answers or {})}
        self.seen: list[tuple[str, Mapping[str, Any]]] = []

    @staticmethod
    def checksums(changes: dict[str, str | None]) -> str:
        told = {name: engine_hash(tensor, "cpu") for name, tensor in WEIGHTS.items()} | changes
        return json.dumps({"ranks": [{"checksums": {n: h for n, h in told.items() if h is not None}}]})

    def start(self, path: str, body: Mapping[str, Any], *, timeout_seconds: float) -> Any:
        self.seen.append((path, body))
        future: concurrent.futures.Future[tuple[int, str]] = concurrent.futures.Future()
        answer = self.answers.get(path, (200, "{}"))
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


@pytest.fixture
def publisher(context: ParallelContext) -> Callable[..., Publisher]:
    def make(*engines: Engine, quantized: bool = False, transport: Any = None, **options: Any) -> Publisher:
        group = EngineGroup(engines, 5.0)
        settings: dict[str, Any] = {"pause_mode": "abort", "verify_mode": "checksum", "bucket_bytes": 16} | options
        return Publisher(
            group,
            transport(group) if transport else TensorTransport(group, tp=1, by_value=True),
            EngineLayout(tp=1, device="cpu", dtype="float32", quantized=quantized),
            head_dim=2,
            context=context,
            first_rank=FirstRank(context, silence_seconds=5.0),
            **settings,
        )

    return make


def test_the_order_of_a_publish(publisher: Callable[..., Publisher]) -> None:
    engines = [Engine("a"), Engine("b")]
    made = publisher(*engines)
    report = made.publish(WEIGHTS.items(), version=4)
    assert (report.version, report.num_bytes, report.proof) == (4, 28, "checksum")
    assert made.version == 4
    for engine in engines:
        assert engine.paths() == [
            "/pause_generation",
            "/pause_generation",
            "/begin_weight_update",
            "/update_weights_from_tensor",
            "/update_weights_from_tensor",
            "/end_weight_update",
            "/flush_cache",
            "/weights_checker",
            "/update_weight_version",
            "/continue_generation",
        ]
    bodies = dict(engines[0].seen)
    # The first publish of a life meets what another trainer may have left paused in place, which nothing else moves.
    modes = [body["mode"] for path, body in engines[0].seen if path == "/pause_generation"]
    assert modes == ["retract", "abort"]
    made.publish(WEIGHTS.items(), version=5)
    assert [body["mode"] for path, body in engines[0].seen if path == "/pause_generation"] == [*modes, "abort"]
    assert bodies["/update_weight_version"] == {"new_version": "4", "abort_all_requests": False}


def test_in_place_leaves_the_cache_to_unfinished_responses(publisher: Callable[..., Publisher]) -> None:
    engine = Engine("a")
    publisher(engine, pause_mode="in_place").publish(WEIGHTS.items(), version=1)
    assert "/flush_cache" not in engine.paths()


def test_servers_without_update_sessions_need_none(publisher: Callable[..., Publisher]) -> None:
    engine = Engine("a", {"/begin_weight_update": (404, "Not Found")})
    publisher(engine).publish(WEIGHTS.items(), version=1)
    assert "/end_weight_update" not in engine.paths()


class LeftOpen(Engine):
    """An engine that knows whether a frame is open, as SGLang does: one is, from a trainer that was killed in a set."""

    is_open = True

    def start(self, path: str, body: Mapping[str, Any], *, timeout_seconds: float) -> Any:
        if path in ("/begin_weight_update", "/end_weight_update"):
            begins = path == "/begin_weight_update"
            self.answers[path] = (
                (400, "already open" if begins else "none is open") if self.is_open == begins else (200, "{}")
            )
            self.is_open = begins
        return super().start(path, body, timeout_seconds=timeout_seconds)


def test_a_frame_that_an_earlier_trainer_left_open_is_closed(publisher: Callable[..., Publisher]) -> None:
    left_open, closed = LeftOpen("a"), LeftOpen("b")
    closed.is_open = False
    made = publisher(left_open, closed)
    made.publish(WEIGHTS.items(), version=1)
    begin, end, update = "/begin_weight_update", "/end_weight_update", "/update_weights_from_tensor"
    for engine in (left_open, closed):
        assert engine.paths()[2:8] == [begin, end, begin, update, update, end]
    closed.is_open = True  # it was lost in a set, and has come back
    made.publish(WEIGHTS.items(), version=2)
    assert left_open.paths()[-8:-3] == closed.paths()[-8:-3] == [begin, update, update, end, "/flush_cache"]


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"/pause_generation": (400, "tired")}, "b: /pause_generation answered status 400: tired"),
        ({"/update_weights_from_tensor": (400, "no such name")}, "b: /update_weights_from_tensor answered status 400"),
        ({"/update_weights_from_tensor": RolloutError("b: broken off")}, "publishing weights failed: b: broken off"),
        ({"/flush_cache": (400, "busy")}, "b: /flush_cache answered status 400: busy"),
        ({"/begin_weight_update": (404, "")}, "only some engines know /begin_weight_update"),
        ({"/weights_checker": (200, '{"ranks": null}')}, "b: /weights_checker answered without checksums"),
        ({"/weights_checker": (200, Engine.checksums({"model.norm.weight": "0" * 16}))},
         "b: 1 differ: model.norm.weight"),
        ({"/weights_checker": (200, Engine.checksums({"model.norm.weight": None}))}, "1 missing: model.norm.weight"),
        ({"/weights_checker": (200, Engine.checksums({"lm_head.weight": "1"}))}, "1 not of this model: lm_head.weight"),
    ],
)  # fmt: skip
def test_what_fails_is_named_and_the_engines_stay_paused(
    publisher: Callable[..., Publisher], answers: dict[str, Answer], text: str
) -> None:
    engines = [Engine("a"), Engine("b", answers)]
    made = publisher(*engines)
    read = []
    with pytest.raises(WeightSyncError) as error:
        made.publish(((name, read.append(name) or tensor) for name, tensor in WEIGHTS.items()), version=1)
    assert text in str(error.value)
    assert made.version == -1
    assert all("/continue_generation" not in engine.paths() for engine in engines)
    if "/pause_generation" not in answers and "/begin_weight_update" not in answers:
        assert read == list(WEIGHTS), "other ranks would wait for the rest of the stream"


@pytest.mark.parametrize("damaged", [0, 1])
def test_the_rank_of_an_engine_that_holds_another_share_is_named(damaged: int) -> None:
    shares = [{"model.norm.weight": "a", "lm_head.weight": f"share {rank}"} for rank in range(2)]
    told = [{**share, "lm_head.weight": "other"} if r == damaged else share for r, share in enumerate(shares)]
    answer = json.dumps({"ranks": [{"checksums": checksums} for checksums in told]})
    with pytest.raises(WeightSyncError, match=rf"not the trainer's: b, rank {damaged}: 1 differ: lm_head.weight$"):
        verify(EngineGroup([Engine("b", {"/weights_checker": (200, answer)})], 5.0), shares)


def test_whatever_a_transport_raises_the_stream_is_read_to_its_end(publisher: Callable[..., Publisher]) -> None:
    """The other ranks read it, too, in exchanges; memory and threads run out without an error of ours."""

    class NoMemory(TensorTransport):
        def send(self, bucket: Bucket) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine, read = Engine("a"), []
    made = publisher(engine, transport=lambda group: NoMemory(group, tp=1, by_value=True))
    with pytest.raises(WeightSyncError, match="sending weights failed: OutOfMemoryError: CUDA out of mem") as error:
        made.publish(((name, read.append(name) or tensor) for name, tensor in WEIGHTS.items()), version=1)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert read == list(WEIGHTS)
    assert "/continue_generation" not in engine.paths()


@pytest.mark.parametrize("wrong", [2, 3, 5])
def test_versions_go_up_by_one(publisher: Callable[..., Publisher], wrong: int) -> None:
    engine = Engine("a")
    made = publisher(engine)
    made.publish(WEIGHTS.items(), version=3)  # as a run that resumes from step 3 does
    with pytest.raises(WeightSyncError, match=f"have weights of version 3 and were sent version {wrong}; .* up by one"):
        made.publish(WEIGHTS.items(), version=wrong)
    made.publish(WEIGHTS.items(), version=4)
    told = [body["new_version"] for path, body in engine.seen if path == "/update_weight_version"]
    assert told == ["3", "4"]


@pytest.mark.parametrize("quantized", [False, True])
def test_without_checksums_the_policy_decides(publisher: Callable[..., Publisher], quantized: bool) -> None:
    answers: dict[str, Answer] = {} if quantized else {"/weights_checker": (404, "Not Found")}
    engine, checked = Engine("a", answers), []
    made = publisher(engine, quantized=quantized, check_logprobs=lambda: checked.append(True))
    with pytest.raises(WeightSyncError, match=r"cannot tell checksums .* and weight_sync.verify asks for them"):
        made.publish(WEIGHTS.items(), version=1)
    assert "/continue_generation" not in engine.paths()
    assert checked == []
    either = publisher(
        engine, quantized=quantized, verify_mode="checksum_or_logprobs", check_logprobs=lambda: checked.append(True)
    )
    assert either.publish(WEIGHTS.items(), version=2).proof == "logprobs"
    assert checked == [True]


def test_disk_keeps_two_whole_versions(publisher: Callable[..., Publisher], tmp_path: Path) -> None:
    engine = Engine("a")
    made = publisher(
        engine, transport=lambda group: DiskTransport(group, WeightFiles(tmp_path, {"model_type": "qwen3"}, keep=2))
    )
    for version in (1, 2, 3):
        made.publish(WEIGHTS.items(), version=version)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["version_00000002", "version_00000003"]
    newest = tmp_path / "version_00000003"
    assert dict(engine.seen)["/update_weights_from_disk"]["model_path"] == str(newest)
    index = json.loads((newest / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 28
    assert len(set(index["weight_map"].values())) == 2  # one file per bucket of 16 bytes
    for name, tensor in WEIGHTS.items():
        with safe_open(newest / index["weight_map"][name], framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensor)
    assert json.loads((newest / "config.json").read_text()) == {"model_type": "qwen3"}


def test_a_copy_is_kept_beside_another_transport_and_restores_an_engine(
    publisher: Callable[..., Publisher], tmp_path: Path
) -> None:
    files = WeightFiles(tmp_path, {}, keep=1)
    made = publisher(Engine("a"), transport=lambda g: KeepingTransport(TensorTransport(g, tp=1, by_value=True), files))
    made.publish(WEIGHTS.items(), version=3)
    assert made.expected is not None
    assert files.newest is not None
    index = json.loads((files.newest / "model.safetensors.index.json").read_text())
    for name, tensor in WEIGHTS.items():
        with safe_open(files.newest / index["weight_map"][name], framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensor)

    fresh = Engine("fresh")
    restore(EngineGroup([fresh], 5.0), files.newest, version=3, expected=made.expected)
    assert fresh.paths() == ["/update_weights_from_disk", "/weights_checker", "/update_weight_version"]
    assert fresh.seen[0][1]["model_path"] == str(files.newest)
    assert fresh.seen[2][1]["new_version"] == "3"

    wrong = Engine("wrong", {"/weights_checker": (200, Engine.checksums({"model.norm.weight": "0" * 16}))})
    with pytest.raises(WeightSyncError, match=r"wrong: 1 differ: model.norm.weight"):
        restore(EngineGroup([wrong], 5.0), files.newest, version=3, expected=made.expected)
    assert "/update_weight_version" not in wrong.paths(), "it must not pass for one with current weights"
    silent = Engine("silent", {"/weights_checker": (404, "")})
    with pytest.raises(WeightSyncError, match=r"silent: tells no checksums"):
        restore(EngineGroup([silent], 5.0), files.newest, version=3, expected=made.expected)


def test_an_engine_that_does_not_see_the_files_is_sent_them_and_goes_on_only_when_proved(
    publisher: Callable[..., Publisher], tmp_path: Path
) -> None:
    files = WeightFiles(tmp_path, {}, keep=1)
    made = publisher(Engine("a"), transport=lambda g: KeepingTransport(TensorTransport(g, tp=1, by_value=True), files))
    made.publish(WEIGHTS.items(), version=3)
    assert files.newest is not None
    far = Engine("far", {"/update_weights_from_disk": (400, "Failed to get weights iterator: no such folder.")})
    restore(EngineGroup([far], 5.0), files.newest, version=3, expected=made.expected, sent_to_tp=1)
    paths = far.paths()
    assert paths[:3] == ["/pause_generation", "/pause_generation", "/update_weights_from_disk"]
    assert [body["mode"] for path, body in far.seen if path == "/pause_generation"] == ["retract", "abort"]
    assert paths[-4:] == ["/flush_cache", "/weights_checker", "/update_weight_version", "/continue_generation"]
    arrived = {}
    for path, body in far.seen:
        if path == "/update_weights_from_tensor":
            bucket = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
            for entry in bucket["metadata"]:
                raw = bucket["flattened_tensor"][entry.start_idx : entry.end_idx]
                arrived[entry.name] = raw.clone().view(entry.dtype).reshape(entry.shape)
    assert arrived.keys() == WEIGHTS.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in WEIGHTS.items())

    near = Engine("near")
    restore(EngineGroup([near], 5.0), files.newest, version=3, expected=made.expected, sent_to_tp=1)
    assert "/update_weights_from_tensor" not in near.paths()

    wrong = Engine("wrong", {"/weights_checker": (200, Engine.checksums({"model.norm.weight": "0" * 16}))})
    with pytest.raises(WeightSyncError, match=r"wrong: 1 differ: model.norm.weight"):
        restore(EngineGroup([wrong], 5.0), files.newest, version=3, expected=made.expected, sent_to_tp=1)
    assert not {"/update_weight_version", "/continue_generation"} & set(wrong.paths()), "it stays paused"
    (files.newest / "model.safetensors.index.json").write_text("half")
    with pytest.raises(WeightSyncError, match="cannot read the weights of version 3"):
        restore(EngineGroup([far], 5.0), files.newest, version=3, expected=made.expected, sent_to_tp=1)


@pytest.mark.parametrize(
    "answer",
    [
        (400, "Failed to update weights: The size of tensor a (128) must match the size of tensor b (96)."),
        RolloutError("other: /update_weights_from_disk: broken off"),
    ],
)
def test_an_engine_that_sees_the_files_and_does_not_load_them_is_not_sent_them(
    publisher: Callable[..., Publisher], tmp_path: Path, answer: Answer
) -> None:
    files = WeightFiles(tmp_path, {}, keep=1)
    made = publisher(Engine("a"), transport=lambda g: KeepingTransport(TensorTransport(g, tp=1, by_value=True), files))
    made.publish(WEIGHTS.items(), version=3)
    assert files.newest is not None
    other = Engine("other", {"/update_weights_from_disk": answer})
    with pytest.raises(WeightSyncError, match=r"The size of tensor a|broken off"):
        restore(EngineGroup([other], 5.0), files.newest, version=3, expected=made.expected, sent_to_tp=1)
    assert other.paths()[1:] == ["/pause_generation", "/update_weights_from_disk"], "weights in requests would end it"


@pytest.mark.parametrize("sent_to_tp", [None, 1])
def test_without_checksums_an_engine_gets_its_version_when_it_is_proved_otherwise(
    publisher: Callable[..., Publisher], tmp_path: Path, sent_to_tp: int | None
) -> None:
    files = WeightFiles(tmp_path, {}, keep=1)
    made = publisher(Engine("a"), transport=lambda g: KeepingTransport(TensorTransport(g, tp=1, by_value=True), files))
    made.publish(WEIGHTS.items(), version=3)
    assert files.newest is not None
    fresh = Engine("fresh")

    def prove() -> None:
        generates = sent_to_tp is None or fresh.paths()[-1] == "/continue_generation"
        assert generates, "only then it can show its log-probabilities"
        fresh.seen.append(("proof", {}))

    options: dict[str, Any] = {"version": 3, "expected": None, "sent_to_tp": sent_to_tp}
    restore(EngineGroup([fresh], 5.0), files.newest, prove=prove, **options)
    assert fresh.paths()[-2:] == ["proof", "/update_weight_version"]
    assert fresh.paths().count("/continue_generation") == (0 if sent_to_tp is None else 1)

    wrong = Engine("wrong")

    def refute() -> None:
        raise WeightSyncError("wrong: log-probabilities differ")

    with pytest.raises(WeightSyncError, match="log-probabilities differ"):
        restore(EngineGroup([wrong], 5.0), files.newest, prove=refute, **options)
    assert "/update_weight_version" not in wrong.paths(), "it must not pass for one with current weights"


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weights_from_tensor", "/weights_checker"])
def test_an_engine_that_gives_no_answer_is_done_without_where_enough_are_left(
    publisher: Callable[..., Publisher], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    gone = RolloutError(f"b: {path}: broken off")
    groups: list[EngineGroup] = []

    def transport(group: EngineGroup) -> TensorTransport:
        groups.append(group)
        return TensorTransport(group, tp=1, by_value=True)

    engines = [Engine("a"), Engine("b", {path: gone}), Engine("c")]
    made = publisher(*engines, transport=transport)
    groups[0].least = 2
    assert made.publish(WEIGHTS.items(), version=1).proof == "checksum"
    assert [caller.name for caller in groups[0].callers] == ["a", "c"]
    assert "broken off; publishing goes on with 2 engines" in caplog.text
    assert all("/continue_generation" in engine.paths() for engine in (engines[0], engines[2]))
    assert "/update_weight_version" not in engines[1].paths()

    engines[2].answers[path] = gone
    with pytest.raises(WeightSyncError, match="publishing weights failed: b: "):
        made.publish(WEIGHTS.items(), version=2)


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weight_version", "/continue_generation"])
def test_whoever_is_left_out_of_a_publish_is_told_of_before_it_may_come_back(
    publisher: Callable[..., Publisher], path: str
) -> None:
    """In the last calls, too, after which it would look as if it had all it needs."""
    groups: list[EngineGroup] = []

    def transport(group: EngineGroup) -> TensorTransport:
        groups.append(group)
        return TensorTransport(group, tp=1, by_value=True)

    engines = [Engine("a"), Engine("b", {path: RolloutError(f"b: {path}: broken off")})]
    made, lost = publisher(*engines, transport=transport), []
    (group,) = groups
    group.least = 1
    leaving = []

    def on_lost(caller: Any) -> None:
        thread = threading.Thread(target=group.leave, args=(caller,))  # as its restart does
        thread.start()
        thread.join(0.3)
        leaving.append(thread)
        lost.append((caller, thread.is_alive()))

    group.on_lost = on_lost
    made.publish(WEIGHTS.items(), version=1)
    leaving[0].join(5.0)
    assert lost == [(engines[1], True)], "the restart waits until it has been told of"
    assert group.callers == (engines[0],)


def test_an_engine_that_refuses_is_never_done_without(publisher: Callable[..., Publisher]) -> None:
    groups: list[EngineGroup] = []

    def transport(group: EngineGroup) -> TensorTransport:
        groups.append(group)
        return TensorTransport(group, tp=1, by_value=True)

    wrong = {"/weights_checker": (200, Engine.checksums({"model.norm.weight": "0" * 16}))}
    made = publisher(Engine("a"), Engine("b", wrong), transport=transport)
    groups[0].least = 0
    with pytest.raises(WeightSyncError, match=r"b: 1 differ: model.norm.weight"):
        made.publish(WEIGHTS.items(), version=1)


def test_a_disk_that_cannot_be_written_is_named(publisher: Callable[..., Publisher], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = publisher(
        Engine("a"), transport=lambda group: DiskTransport(group, WeightFiles(tmp_path / "file", {}, keep=2))
    )
    with pytest.raises(
        WeightSyncError, match=r"cannot make a directory for the weights of version 1 .*weight_sync.transport"
    ):
        made.publish(WEIGHTS.items(), version=1)


def test_engines_must_hold_weights_alike() -> None:
    one, other = (EngineLayout(tp=tp, device="cpu", dtype="float32") for tp in (1, 2))
    assert common_layout([one, one], ["a", "b"]) == one
    with pytest.raises(WeightSyncError, match="must hold their weights alike"):
        common_layout([one, other], ["a", "b"])


def test_differences_are_counted_and_cut() -> None:
    ours = {f"w{i}": "0" for i in range(15)}
    assert differences(ours, ours) == []
    (text,) = differences(ours, dict.fromkeys(ours, "1"))
    assert text.startswith("15 differ: w0, w1, ")
    assert text.endswith("w11 and 3 more")
