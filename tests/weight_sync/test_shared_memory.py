"""What a set of weights takes of shared memory is known before it is sent; a set that does not fit says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klear.config.architecture import PRESETS, Architecture
from megatron_klear.config.serving import SglangSettings, WeightSyncSettings
from megatron_klear.session import transports
from megatron_klear.session.transports import choose_transport
from megatron_klear.weight_sync import DistributedTransport, EngineGroup, EngineLayout, TensorTransport, shared_memory

ROOT = Path(__file__).parents[2]
QWEN = PRESETS["qwen3-8b"]
EMBEDDING = 151936 * 4096 * 2
MIB = 2**20
HERE = "http://127.0.0.1:30000"
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
WORDY = replace(PRESETS["qwen3-tiny"], vocab_size=8192)
"""Its embedding, 4 MiB, is many times a bucket of 256 KiB."""


def needed(arch: Architecture, bucket_bytes: int, dtype: str = "bfloat16") -> int:
    return shared_memory.needed_bytes(arch, dtype=dtype, bucket_bytes=bucket_bytes)


def test_a_tensor_that_is_larger_than_a_bucket_counts_whole() -> None:
    assert EMBEDDING + 400 * MIB < needed(QWEN, 256 * MIB) <= EMBEDDING + 2 * 256 * MIB
    assert needed(QWEN, 256 * MIB, "float32") > 2 * EMBEDDING
    assert needed(PRESETS["qwen3-tiny"], 16 * MIB) == 2 * sum(
        p for p in (512 * 128 * 2, 128, 4 * (2 * 128 + 2 * 32 + 128 * (2 * 128 + 2 * 64) + 3 * 128 * 384))
    ), "a set in one bucket takes its own size"


@pytest.mark.parametrize(("free", "by_value"), [(10**9, True), (2 * 10**9, False)])
def test_a_run_sends_requests_where_shared_memory_does_not_hold_its_largest_tensor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, by_value: bool
) -> None:
    """The 8B's embedding alone is 1.24 GB, and three buckets are 0.8 GB."""
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: free)
    settings = SimpleNamespace(
        weight_sync=WeightSyncSettings(transport="tensor", bucket_bytes=256 * MIB, keep_on_disk=False),
        sglang=SglangSettings(),
    )
    session: Any = SimpleNamespace(settings=settings, arch=QWEN, root=tmp_path, entry="rl")
    monkeypatch.setattr(transports, "served_config", lambda session, dtype: {})
    layout = EngineLayout(tp=1, device="cuda", dtype="bfloat16")
    made, files = choose_transport(session, EngineGroup([], 1.0), layout, are_ours=True, urls=[HERE])
    assert files is None
    assert isinstance(made, TensorTransport)
    assert made._by_value == by_value


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_server_elsewhere_that_comes_later_is_not_sent_names_in_this_machines_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: bool
) -> None:
    """Only the one that is here answers when the transport is chosen, which is for the whole run."""
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 10**11)
    monkeypatch.setattr(transports, "served_config", lambda session, dtype: {})
    made: list[Any] = []
    for transport in ("auto", "tensor"):
        settings = SimpleNamespace(
            weight_sync=WeightSyncSettings(transport=transport, keep_on_disk=False), sglang=SglangSettings()
        )
        session: Any = SimpleNamespace(settings=settings, arch=QWEN, root=tmp_path, entry="rl")
        group = EngineGroup([SimpleNamespace(url=HERE)], 1.0)  # type: ignore[list-item]
        urls = [HERE, "http://gpu7:30000"] if elsewhere else [HERE, HERE]
        layout = EngineLayout(tp=1, device="cuda", dtype="bfloat16")
        made.append(choose_transport(session, group, layout, are_ours=False, urls=urls)[0])
    assert isinstance(made[0], DistributedTransport if elsewhere else TensorTransport)
    assert isinstance(made[1], TensorTransport)
    assert made[1]._by_value == elsewhere


SEND = """
import base64, concurrent.futures, json, os, pickle, sys
from pathlib import Path
import torch
from megatron_klear.config.architecture import Architecture
from megatron_klear.errors import WeightSyncError
from megatron_klear.model.hf_names import tensor_rules
from megatron_klear.weight_sync import EngineGroup, TensorTransport
from megatron_klear.weight_sync.buckets import bucketed

class Reader:
    name = url = "reader"
    def start(self, path, body, *, timeout_seconds):
        answer = concurrent.futures.Future()
        for text in body.get("serialized_named_tensors", ()):
            child = os.fork()
            if child == 0:
                try:
                    torch.multiprocessing.reductions.shared_cache.clear()  # which the sender alone has
                    value = pickle.loads(base64.b64decode(text))
                    right = int(value["flattened_tensor"].min()) == 1
                    value.clear()
                    os._exit(0 if right else 1)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
        answer.set_result((200, "{}"))
        return answer

job = json.loads(sys.argv[1])
arch = Architecture(**job["arch"])
weights = ((name, torch.full(shape, 257, dtype=torch.int16).view(torch.bfloat16)) for rule in tensor_rules(arch)
           for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True))
transport = TensorTransport(EngineGroup([Reader() for _ in range(job["readers"])], 1.0), tp=job["tp"], by_value=False)
transport.begin(1)
try:
    for bucket in bucketed(weights, job["bucket_bytes"]):
        transport.send(bucket)
    transport.finish()
    print("sent", [name for name in os.listdir("/dev/shm") if name.startswith("torch_")])
except WeightSyncError as error:
    print(error)
"""


def sent_with(shared_bytes: int, *, readers: int = 1, tp: int = 1) -> str:
    """What comes of sending a set on a machine with so much shared memory."""
    arch = {name: getattr(WORDY, name) for name in WORDY.__slots__}
    job = {"arch": arch, "bucket_bytes": 2**18, "readers": readers, "tp": tp}
    command = ["bwrap", "--dev-bind", "/", "/", "--size", str(shared_bytes), "--tmpfs", "/dev/shm"]
    done = subprocess.run(
        [*command, sys.executable, "-W", "ignore", "-c", SEND, json.dumps(job)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_bubblewrap
def test_a_set_fits_into_what_it_was_said_to_need_and_says_what_to_do_where_it_does_not() -> None:
    enough = needed(WORDY, 2**18) + 3 * 4096  # whole pages
    assert sent_with(enough) == "sent []"
    said = sent_with(enough - 16 * 4096)
    assert said.startswith("/dev/shm has no room for a bucket of ")
    assert "No space left on device" in said
    assert (
        "(--shm-size), make weight_sync.bucket_bytes smaller, which splits no tensor, or set weight_sync.trans" in said
    )


@needs_bubblewrap
def test_any_number_of_engines_reads_a_bucket_one_after_another() -> None:
    """Torch removes its file when as many have let go of it as it was told of."""
    assert sent_with(64 * MIB, readers=3, tp=2) == "sent []"
