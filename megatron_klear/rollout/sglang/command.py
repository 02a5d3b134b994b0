"""The command line and environment of one SGLang server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_klear.config.server_options import CONTEXT_MARGIN, ONLINE_FP8
from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError

CPU_ARGUMENTS = ("--device", "cpu", "--attention-backend", "torch_native")
CPU_PLUGIN, CPU_PLUGIN_NAME = Path(__file__).with_name("cpu_plugin"), "klear_repeatable"
"""SGLang's plugin that gives it deterministic inference on a CPU."""


def server_python(settings: SglangSettings) -> Path:
    """The Python of SGLang's environment.

    Raises:
        ConfigError: there is none at `sglang.venv`.
    """
    python = Path(settings.venv) / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise ConfigError(
            [f"sglang.venv: no {python}; run tools/setup_sglang.sh (KLEAR_SGLANG_VENV says where), or name running "
             "servers in sglang.urls"]
        )  # fmt: skip
    return python


def server_command(
    settings: SglangSettings,
    model_dir: Path,
    *,
    dtype: str,
    host: str,
    port: int,
    name: str,
    on_cpu: bool,
    batch_responses: int,
    longest_sequence: int,
) -> list[str]:
    """Program and arguments that start one server.

    It starts with weights of no meaning, since the trainer's arrive before the first request (one that quantises, with
    any of the model, whose scales it replaces), and without a tokenizer, since requests and answers are token ids.

    Args:
        settings: section `sglang`.
        model_dir: directory with the model's config.json, and its weights where the server quantises them.
        dtype: data type where `sglang.dtype` is auto.
        host, port: to listen on.
        name: that it tells whoever asks for its models.
        on_cpu: whether it computes on the CPU.
        batch_responses: responses generated at a time.
        longest_sequence: prompt and response together, in tokens.
    """
    arguments = [
        *("--model-path", str(model_dir)),
        *("--load-format", "dummy" if settings.quantization == "none" else ONLINE_FP8),
        "--skip-tokenizer-init",
        *("--host", host),
        *("--port", str(port)),
        *("--tp-size", str(settings.server_tp)),
        *("--dtype", dtype if settings.dtype == "auto" else settings.dtype),
        *("--context-length", str(longest_sequence + CONTEXT_MARGIN)),
        *("--max-running-requests", str(batch_responses)),
        *("--stream-interval", str(settings.stream_interval)),
        "--incremental-streaming-output",
        "--skip-server-warmup",
        "--sleep-on-idle",
    ]
    max_total_tokens = settings.max_total_tokens
    if settings.placement == "colocated" and not on_cpu:
        arguments.append("--enable-memory-saver")
    if on_cpu:
        arguments += CPU_ARGUMENTS
        if max_total_tokens is None:
            # What SGLang would take by itself is most of the machine's memory.
            max_total_tokens = batch_responses * (longest_sequence + CONTEXT_MARGIN)
    if max_total_tokens is not None:
        arguments += ["--max-total-tokens", str(max_total_tokens)]
    if settings.memory_fraction is not None:
        arguments += ["--mem-fraction-static", str(settings.memory_fraction)]
    if settings.deterministic:
        arguments.append("--enable-deterministic-inference")
    if settings.quantization != "none":
        arguments += ["--quantization", settings.quantization]
    return [str(server_python(settings)), "-m", "sglang.launch_server", *arguments, *settings.extra_args,
            "--served-model-name", name]  # fmt: skip


def server_environment(settings: SglangSettings, index: int, *, on_cpu: bool) -> dict[str, str]:
    """Environment variables of server number `index`: the trainer's, less what would steer the server wrongly.

    Raises:
        ConfigError: its GPUs are the trainer's, or not there.
    """
    environment = {name: value for name, value in os.environ.items() if not _is_the_trainers(name)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # The margin may exceed the model's positions; no token is ever placed there.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if on_cpu:
        # Without a number of its own SGLang binds threads to all cores, where they wait for the trainer's.
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if settings.server_tp > 1:
            # Without shares of the cores it wants as many NUMA nodes as ranks.
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _core_shares(settings.server_tp))
        if settings.deterministic:
            # A sum that threads share is cut by their number; what is compiled differs by the shapes it was made for.
            environment |= {"PYTHONPATH": str(CPU_PLUGIN), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
            # The plugin of SGLang's environment computes whole batches at once, where sums depend on their company.
            environment["SGLANG_PLUGINS"] = CPU_PLUGIN_NAME
        return environment
    if settings.placement == "colocated":
        # What is meant for the trainer's allocator (expandable segments) and what gives memory up do not go together.
        environment = {name: value for name, value in environment.items() if not name.endswith("_ALLOC_CONF")}
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # without torchrun one process trains, on GPU 0
    if settings.placement == "separate" and settings.first_gpu < ranks and settings.memory_fraction is None:
        raise ConfigError(
            [
                f"sglang.first_gpu: got {settings.first_gpu}, and GPUs 0 to {ranks - 1} of this machine are the "
                f"trainer's; set at least {ranks}, start fewer ranks, set sglang.placement=colocated, or say with "
                "sglang.memory_fraction how much of a shared GPU the servers may take"
            ]
        )
    first = settings.first_gpu + index * settings.server_tp
    return environment | {"CUDA_VISIBLE_DEVICES": _gpus(os.environ, first, settings.server_tp)}


def _core_shares(count: int) -> str:
    """This process's cores as SGLang takes them, dealt to `count` ranks: `0,1|2,3`; all to each where they are few."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    shares = [cores[rank * len(cores) // count : (rank + 1) * len(cores) // count] for rank in range(count)]
    return "|".join(",".join(share or cores) for share in shares)


def _gpus(environment: Mapping[str, str], first: int, count: int) -> str:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    names = [name for name in names if name.strip()]
    if len(names) < first + count:
        there = f"this machine has {len(names)}" if visible is None else f"CUDA_VISIBLE_DEVICES shows {len(names)}"
        raise ConfigError(
            [f"sglang.servers: needs GPUs {first} to {first + count - 1} (sglang.first_gpu, sglang.server_tp), and "
             f"{there}"]
        )  # fmt: skip
    return ",".join(names[first : first + count])


def _is_the_trainers(name: str) -> bool:
    """Whether a variable speaks of the trainer's Python or of its process group."""
    return name.startswith(("TORCHELASTIC_", "PYTHON")) or name in (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
        *("ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES"),
        "TORCHDYNAMO_DISABLE",  # set on a CPU by session/launch.py, where servers do compile
        # Set by launchers, and by us for as long as a group for weights is made, beside which a server may start.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    )
