"""What a server is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_klear.config.server_arguments import own_arguments
from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError
from megatron_klear.rollout.sglang.command import CPU_PLUGIN, server_command, server_environment


@pytest.fixture
def venv(tmp_path: Path) -> str:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch(mode=0o755)
    return str(tmp_path)


def arguments(venv: str, *, on_cpu: bool = False, **settings: Any) -> dict[str, str | None]:
    """Options of the command line with their values."""
    command = server_command(
        SglangSettings(venv=venv, **settings), Path("/model"), dtype="bfloat16", host="10.0.0.7", port=4000,
        name="ours", on_cpu=on_cpu, batch_responses=32, longest_sequence=100,
    )  # fmt: skip
    assert command[:3] == [f"{venv}/bin/python", "-m", "sglang.launch_server"]
    options = command[3:]
    following = [*options[1:], "--"]
    return {o: None if v.startswith("--") else v for o, v in zip(options, following, strict=True) if o.startswith("--")}


def test_settings_become_arguments(venv: str) -> None:
    found = arguments(
        venv,
        server_tp=4,
        quantization="fp8",
        memory_fraction=0.6,
        max_total_tokens=9000,
        extra_args=("--enable-x", "1"),
    )
    assert found["--model-path"] == "/model"
    assert (found["--host"], found["--port"]) == ("10.0.0.7", "4000")
    assert found["--tp-size"] == "4"
    assert found["--dtype"] == "bfloat16"
    assert found["--quantization"] == "fp8"
    assert found["--load-format"] == "flash_rl", "SGLang takes weights for such a server by no other"
    assert found["--mem-fraction-static"] == "0.6"
    assert found["--max-total-tokens"] == "9000"
    assert found["--max-running-requests"] == "32"
    assert found["--context-length"] == "108"
    assert found["--enable-x"] == "1"
    assert found["--served-model-name"] == "ours"
    assert "--device" not in found


@pytest.mark.parametrize("on_cpu", [False, True])
def test_no_option_with_a_value_may_be_given_again_but_the_attention_backend(venv: str, on_cpu: bool) -> None:
    values = {"quantization": "fp8", "memory_fraction": 0.6, "max_total_tokens": 9000, "deterministic": True}
    found = arguments(venv, on_cpu=on_cpu, **values)
    given = [option for option, value in found.items() if value is not None and option != "--attention-backend"]
    assert [option for option, _ in own_arguments(given)] == given
    assert list(own_arguments(["--enable-deterministic-inference"]))


def test_a_server_is_not_put_on_the_trainers_gpus_unknowingly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"sglang.first_gpu: got 0, and GPUs 0 to 3 .* set at least 4"):
        server_environment(SglangSettings(), 0, on_cpu=False)
    for fine in ({"first_gpu": 4}, {"memory_fraction": 0.3}, {"placement": "colocated"}):
        server_environment(SglangSettings(**fine), 0, on_cpu=False)  # type: ignore[arg-type]
    server_environment(SglangSettings(), 0, on_cpu=True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"GPUs 0 to 0 .* set at least 1"):  # one process, without torchrun
        server_environment(SglangSettings(), 0, on_cpu=False)


def test_a_deterministic_cpu_server_gets_the_plugin_and_one_thread(venv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "--enable-deterministic-inference" in arguments(venv, deterministic=True)
    assert "--enable-deterministic-inference" not in arguments(venv)
    found = server_environment(SglangSettings(deterministic=True), 0, on_cpu=True)
    assert (found["OMP_NUM_THREADS"], found["TORCH_COMPILE_DISABLE"]) == ("1", "1")
    # No other plugin: that of SGLang's environment lets a token's sums depend on its company.
    entry_points = (CPU_PLUGIN / "klear_sglang_repeatable-1.dist-info" / "entry_points.txt").read_text()
    assert f"{found['SGLANG_PLUGINS']} = klear_sglang_repeatable:register" in entry_points.splitlines()
    names = [p.name for p in Path(found["PYTHONPATH"]).iterdir()]
    assert {"klear_sglang_repeatable.py", "klear_sglang_repeatable-1.dist-info"} <= set(names)
    assert "PYTHONPATH" not in server_environment(SglangSettings(), 0, on_cpu=True)


def test_a_cpu_server_takes_no_more_memory_than_the_batch_needs(venv: str) -> None:
    found = arguments(venv, on_cpu=True, dtype="float32")
    assert found["--device"] == "cpu"
    assert found["--dtype"] == "float32"
    assert found["--max-total-tokens"] == str(32 * 108)


def test_ranks_of_a_cpu_server_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of one NUMA node SGLang starts no server of two ranks otherwise."""

    def bound(tp: int) -> str | None:
        return server_environment(SglangSettings(server_tp=tp), 0, on_cpu=True).get("SGLANG_CPU_OMP_THREADS_BIND")

    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {4, 0, 2, 1, 3})
    assert (bound(1), bound(2)) == (None, "0,1|2,3,4")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {5})
    assert bound(2) == "5|5"
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "7|8")
    assert bound(2) == "7|8"


def test_the_trainers_process_group_is_not_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"RANK", "MASTER_ADDR", "WORLD_SIZE", "PYTHONPATH", "TORCHELASTIC_RUN_ID"}
    names |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHDYNAMO_DISABLE"}
    for name in names:
        monkeypatch.setenv(name, "1")
    found = server_environment(SglangSettings(), 0, on_cpu=True)
    assert not names & set(found)
    assert found["SGLANG_USE_CPU_ENGINE"] == "1"


def test_a_server_on_the_trainers_gpus_can_give_up_its_memory(venv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--enable-memory-saver" in arguments(venv, placement="colocated")
    assert "--enable-memory-saver" not in arguments(venv, placement="colocated", on_cpu=True)
    assert "--enable-memory-saver" not in arguments(venv)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    settings = SglangSettings(server_tp=2, servers=2, placement="colocated")
    found = server_environment(settings, 1, on_cpu=False)
    assert found["CUDA_VISIBLE_DEVICES"] == "6,7", "those of ranks 2 and 3"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in found
    assert "PYTORCH_CUDA_ALLOC_CONF" in server_environment(SglangSettings(first_gpu=1), 0, on_cpu=False)


def test_each_server_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    settings = SglangSettings(server_tp=2, first_gpu=1, servers=2)
    assert server_environment(settings, 1, on_cpu=False)["CUDA_VISIBLE_DEVICES"] == "3,4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert server_environment(settings, 0, on_cpu=False)["CUDA_VISIBLE_DEVICES"] == "5,6"
    with pytest.raises(ConfigError, match=r"needs GPUs 3 to 4 \(.*\), and CUDA_VISIBLE_DEVICES shows 4"):
        server_environment(settings, 1, on_cpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES shows 0"):
        server_environment(SglangSettings(first_gpu=1), 0, on_cpu=False)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    settings = SglangSettings(server_tp=2, first_gpu=1, servers=2)
    assert server_environment(settings, 0, on_cpu=False)["CUDA_VISIBLE_DEVICES"] == "1,2"
    with pytest.raises(ConfigError, match=r"needs GPUs 3 to 4 \(sglang.first_gpu, .*\), and this machine has 4"):
        server_environment(settings, 1, on_cpu=False)
