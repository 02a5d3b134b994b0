"""Joining a launch: places in the layout, and layouts and devices that are refused."""

from __future__ import annotations

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.config import ParallelSettings
from megatron_klear.errors import EXIT_BAD_INPUT, ConfigError

pytestmark = pytest.mark.usefixtures("no_groups")


def test_a_run_of_one_process_needs_no_launcher() -> None:
    context = parallel.start(ParallelSettings())
    axes = (context.world, context.tp, context.cp, context.pp, context.dp, context.dp_cp)
    assert [(axis.rank, axis.size) for axis in axes] == [(0, 1)] * 6
    for axis in axes:
        value = torch.full((2,), 3.0, device=context.device)
        dist.all_reduce(value, group=axis.group)
        assert value.tolist() == [3.0, 3.0]


def test_starting_again_gives_the_same_layout() -> None:
    first = parallel.start(ParallelSettings())
    second = parallel.start(ParallelSettings())
    assert first.tp.group is second.tp.group
    assert first.dp_cp.group is second.dp_cp.group


def test_a_reset_layout_can_be_built_anew_among_the_same_processes() -> None:
    from megatron.core import parallel_state

    first = parallel.start(ParallelSettings())
    parallel.reset_layout()
    assert dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    second = parallel.start(ParallelSettings())
    assert second.world.group is first.world.group
    assert second.tp.group is not first.tp.group


def test_layouts_that_were_left_leave_no_threads_behind() -> None:
    counts = []
    for _ in range(4):
        parallel.start(ParallelSettings())
        parallel.reset_layout()
        counts.append(psutil.Process().num_threads())
    assert counts[-1] <= counts[0] + 2, counts


def test_resetting_without_a_layout_is_harmless() -> None:
    parallel.reset_layout()
    assert not dist.is_initialized()


def test_stopping_twice_or_without_a_start_is_harmless() -> None:
    parallel.stop()
    parallel.start(ParallelSettings())
    parallel.stop()
    assert not dist.is_initialized()
    parallel.stop()


def test_the_seed_decides_what_megatron_draws() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    draws = []
    for seed in (1, 1, 2):
        parallel.start(ParallelSettings(), seed=seed)
        with get_cuda_rng_tracker().fork():
            draws.append(torch.rand(4).tolist())
        parallel.stop()
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("sizes", "world", "product"),
    [({"tp": 2}, 1, 2), ({"tp": 2, "pp": 2}, 6, 4), ({"cp": 3}, 4, 3), ({"tp": 4, "cp": 2}, 4, 8)],
)
def test_a_layout_that_does_not_divide_the_processes_is_refused(
    sizes: dict[str, int], world: int, product: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ConfigError) as error:
        parallel.start(ParallelSettings(**sizes))
    assert error.value.exit_status == EXIT_BAD_INPUT
    (problem,) = error.value.problems
    assert problem == f"parallel: tp * pp * cp = {product} does not divide the {world} launched processes"
    assert not dist.is_initialized(), "refused before anything was started"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"run.device: cuda was asked for but no CUDA device is there; use auto or cpu"
    ):
        parallel.start(ParallelSettings(), device="cuda")
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_cuda_the_cpu_is_taken(device: str) -> None:
    assert parallel.start(ParallelSettings(), device=device).device == torch.device("cpu")


def test_the_cpu_is_refused_where_megatron_would_take_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"run.device: cpu cannot be forced .* CUDA_VISIBLE_DEVICES="):
        parallel.start(ParallelSettings(), device="cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"3 processes were started on this node, which has 2 GPUs; .*--nproc"):
        parallel.start(ParallelSettings())
    assert not dist.is_initialized()
