"""What holds for every test: one thread per process, no network, and a GPU for those alone that are marked `gpu`.

Also SGLang's real servers, started once for all tests that need them, where SGLang's environment is there.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megatron_klear.config.serving import SglangSettings

# Before torch is imported anywhere, and inherited by every process that a test starts.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

SGLANG_LONGEST = 96
"""Prompt and response together that the test servers take."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless the tests marked `gpu` are asked for, as `pytest -m gpu`.

    The others prove numbers on the CPU, and Megatron-Core would take a GPU wherever torch sees one.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # As session/launch.py does on a CPU, for the many processes that import Megatron-Core without it.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, since most tests do not need its seconds of start-up

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and `-m gpu`: torch sees none"))


@pytest.fixture(scope="session")
def sglang_settings() -> SglangSettings:
    """Settings that name SGLang's environment; skips where there is none."""
    from megatron_klear.config.serving import SglangSettings

    venv = Path(os.environ.get("KLEAR_SGLANG_VENV") or Path(__file__).parents[1] / ".venv-sglang")
    if not (venv / "bin" / "python").exists():
        pytest.skip(f"needs SGLang's environment and {venv} is none; make it with tools/setup_sglang.sh")
    return SglangSettings(venv=str(venv), stream_interval=4, start_seconds=400.0)


@pytest.fixture(scope="session")
def sglang_urls(sglang_settings: SglangSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URL of a real server by data type; they serve conformance's small Qwen3 and have no weights yet."""
    from megatron_klear.conformance.compare import architecture
    from megatron_klear.model import hf_config
    from megatron_klear.rollout.sglang import ServerFleet

    with ExitStack() as stack:
        fleets = {}
        for dtype in ("float32", "bfloat16"):
            fleets[dtype] = stack.enter_context(
                ServerFleet(
                    sglang_settings,
                    hf_config(architecture(tied=False), dtype=dtype),
                    tmp_path_factory.mktemp(f"sglang_{dtype}"),
                    dtype=dtype,
                    on_cpu=True,
                    batch_responses=16,
                    longest_sequence=SGLANG_LONGEST,
                )
            )
            fleets[dtype].start(0)
        for fleet in fleets.values():
            fleet.wait_ready(0)
        yield {dtype: fleet.url(0) for dtype, fleet in fleets.items()}


@pytest.fixture(scope="module")
def make_chains(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[int]], Path]:
    """A folder with the quickstart's tokenizer and an sft.jsonl of one chain of thought for each number of terms."""

    def make(terms: Sequence[int]) -> Path:
        out = tmp_path_factory.mktemp("chains") / "data"
        subprocess.run(
            [sys.executable, "examples/quickstart_data.py", "--out", str(out), "--sft-rows", "8", "--prompts", "8",
             "--heldout", "8"],
            cwd=Path(__file__).parents[1], check=True, capture_output=True,
        )  # fmt: skip
        with (out / "sft.jsonl").open("w") as stream:
            for number, count in enumerate(terms):
                thought = "\n".join(["1 + 1 = 2"] * count)
                messages = [
                    {"role": "user", "content": f"{number} ="},
                    {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{number}"},
                ]
                stream.write(json.dumps({"id": f"r{number}", "messages": messages, "source": "here"}) + "\n")
        return out

    return make


@pytest.fixture
def start_router(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts `sglang_router` of SGLang's environment in front of servers; returns its URL."""
    venv = Path(os.environ.get("KLEAR_SGLANG_VENV") or Path(__file__).parents[1] / ".venv-sglang")
    python = venv / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import sglang_router"], capture_output=True).returncode:
        pytest.skip(f"needs sglang_router in SGLang's environment ({venv}); tools/setup_sglang.sh installs it")
    routers: list[subprocess.Popen[bytes]] = []

    def start(urls: list[str]) -> str:
        with socket.socket() as probe, socket.socket() as metrics:
            probe.bind(("127.0.0.1", 0))
            metrics.bind(("127.0.0.1", 0))
            port, metrics_port = probe.getsockname()[1], metrics.getsockname()[1]
        command = [
            str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
            "--prometheus-port", str(metrics_port), "--policy", "round_robin", "--worker-urls", *urls,
        ]  # fmt: skip
        log = (tmp_path / "router.log").open("wb")
        routers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url}/workers", timeout=5) as page:
                    if page.read().count(b'"url"') == len(urls):
                        return url
            except OSError:
                pass
            assert routers[-1].poll() is None, (tmp_path / "router.log").read_text()
            time.sleep(0.1)
        pytest.fail(f"no router after 60 s:\n{(tmp_path / 'router.log').read_text()}")

    yield start
    for router in routers:
        router.kill()
        router.wait()
