"""A trainer's state off the device and back: nothing left behind, every bit the same, training goes on as if not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.errors import TrainingError
from megatron_klear.records import TrainSequence
from megatron_klear.trainer import PARTS, Trainer, offload

OBJECTIVE = PolicyObjective()


def inner(trainer: Trainer) -> list[torch.optim.Optimizer]:
    """The optimizers that Megatron's own wrap."""
    outer = trainer.trainable.optimizer
    return [one.optimizer for one in getattr(outer, "chained_optimizers", [outer])]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of weights, the optimizer's parameters and its moments, by a walk of the test's own."""
    found = {f"model {name}": p.detach().clone() for name, p in trainer.trainable.model.named_parameters()}
    for number, optimizer in enumerate(inner(trainer)):
        for place, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            found[f"main {number} {place}"] = param.detach().clone()
            for key, value in optimizer.state[param].items():
                if isinstance(value, torch.Tensor):
                    found[f"{key} {number} {place}"] = value.clone()
    return found


def update(trainer: Trainer, sequences: list[TrainSequence], times: int) -> None:
    for step in range(times):
        trainer.update(sequences, OBJECTIVE, step=step)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_training_goes_on_with_the_same_bits(make_trainer, sequences, dtype: str, distributed: bool) -> None:
    """In float32 what the optimizer updates are views of the weights: they must be again when they come back."""
    moved, apart = (make_trainer(dtype=dtype, distributed=distributed) for _ in range(2))
    for trainer in (moved, apart):
        update(trainer, sequences, 2)
    before = state_of(moved)
    for parts in (PARTS, ("gradients", "optimizer")):
        moved.memory.offload(*parts)
        assert moved.memory.away() == set(parts)
        moved.memory.restore(*PARTS)
        assert moved.memory.away() == set()
        assert_same(state_of(moved), before)
    buffers = moved.trainable.ddp.buffers
    assert all(not buffer.grad_data.any() for buffer in buffers)
    for trainer in (moved, apart):
        update(trainer, sequences, 2)
    assert_same(state_of(moved), state_of(apart))
    assert any(not torch.equal(value, before[name]) for name, value in state_of(moved).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_away_takes_nothing(make_trainer, sequences, dtype: str) -> None:
    trainer = make_trainer(dtype=dtype, distributed=True)
    update(trainer, sequences, 1)
    count = sum(p.numel() for p in trainer.trainable.model.parameters())
    size = 4 if dtype == "float32" else 2
    # Two moments, and in bfloat16 the float32 weights; buffers are padded, and each parameter has a step of 4 bytes.
    wanted = {"weights": size * count, "gradients": 4 * count, "optimizer": (8 if dtype == "float32" else 12) * count}
    params = len(list(trainer.trainable.model.parameters()))
    for part, least in wanted.items():
        assert least <= trainer.memory.num_bytes(part) <= least + 4 * params + 4096, part
    trainer.memory.offload(*PARTS)
    assert [trainer.memory.num_bytes(part) for part in PARTS] == [0, 0, 0]
    held = [p.data for p in trainer.trainable.model.parameters()]
    held += [v for o in inner(trainer) for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    held += [buffer.grad_data for buffer in trainer.trainable.ddp.buffers]
    assert {tensor.untyped_storage().nbytes() for tensor in held} == {0}


def test_a_second_time_the_same_host_memory_is_used(make_trainer, sequences) -> None:
    trainer = make_trainer(distributed=True)
    update(trainer, sequences, 1)
    places = []
    for _ in range(2):
        trainer.memory.offload("optimizer")
        places.append({host.data_ptr() for host in trainer.memory._host["optimizer"].values()})
        trainer.memory.restore("optimizer")
    assert places[0] == places[1]


def test_nothing_is_computed_with_what_is_away(make_trainer, sequences) -> None:
    trainer = make_trainer(distributed=True)
    expected = trainer.token_logprobs(sequences)
    trainer.memory.offload("gradients", "optimizer")
    assert all(np.array_equal(a, b) for a, b in zip(trainer.token_logprobs(sequences), expected, strict=True))
    with pytest.raises(TrainingError, match="gradients and optimizer gave way to the engines"):
        trainer.update(sequences, OBJECTIVE, step=1)
    trainer.memory.offload("weights")
    with pytest.raises(TrainingError, match="weights gave way"):
        trainer.token_logprobs(sequences)


def test_what_cannot_leave_leaves_everything_as_it_was(make_trainer, sequences, monkeypatch) -> None:
    trainer = make_trainer(distributed=True)
    update(trainer, sequences, 1)
    before, (state, *_) = state_of(trainer), inner(trainer)[0].state.values()
    state["exp_avg"] = torch.from_numpy(state["exp_avg"].numpy())  # memory of another owner
    with pytest.raises(TrainingError, match=r"optimizer on cpu cannot be given back; set sglang\.placement=separate"):
        trainer.memory.offload("optimizer")
    assert trainer.memory.away() == set()
    assert_same(state_of(trainer), before)
    monkeypatch.setattr(offload, "host_free_bytes", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"the host has 0\.0 GB free, .* weights of its 2 ranks need"):
        trainer.memory.offload("weights")
    assert trainer.memory.away() == set()
    assert_same(state_of(trainer), before)


@pytest.mark.gpu
def test_the_gpus_memory_goes_down_by_all_of_it(make_trainer, sequences, arch) -> None:
    """Allocated memory falls by what the parts take, the driver gets it back, and copies lie in pinned memory."""
    large = replace(arch, num_layers=4, hidden_size=1024, ffn_hidden_size=4096, head_dim=64, vocab_size=29)
    trainer = make_trainer(dtype="bfloat16", distributed=True, arch=large)
    update(trainer, sequences, 2)
    before = state_of(trainer)
    parts = sum(trainer.memory.num_bytes(part) for part in PARTS)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free, _ = torch.cuda.mem_get_info()
    trainer.memory.offload(*PARTS)
    assert allocated - torch.cuda.memory_allocated() >= parts
    given = reserved - torch.cuda.memory_reserved()
    assert given >= 0.9 * parts, "torch keeps whole segments of which a little is in use"
    assert torch.cuda.mem_get_info()[0] - free >= given
    assert all(host.is_pinned() for hosts in trainer.memory._host.values() for host in hosts.values())
    trainer.memory.restore(*PARTS)
    assert_same(state_of(trainer), before)
    update(trainer, sequences, 1)
