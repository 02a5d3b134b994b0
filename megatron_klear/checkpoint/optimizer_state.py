"""What Megatron's optimizer checkpoints need besides saving and loading: torch's AdamW, and settings that changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

_STORED = ("params", "step")
"""What a parameter group takes from a checkpoint; everything else in it is settings."""


def prepare(optimizer: MegatronOptimizer) -> None:
    """Make torch's AdamW storable and loadable at any time; unlike the fused optimizers it keeps `step` per parameter.

    Megatron's distributed optimizer reads that step before it saves or loads (so the state must exist, also before
    the first update) and does not store it among the tensors (so the step just restored from the group is passed
    through).
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW) or inner.state:
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            inner.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            part._set_main_param_and_optimizer_states = partial(
                _set_with_step, part._set_main_param_and_optimizer_states, part._get_main_param_and_optimizer_states
            )


def restore(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load moments, steps and float32 weights; learning rates, decays and betas stay those of the settings.

    Megatron would take them from the checkpoint, and a run resumed with another `optimizer.lr` would ignore it.
    """
    before = [{k: v for k, v in group.items() if k not in _STORED} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group.update(settings)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            # Megatron gives all parameters one and the same `step` tensor, and torch would add 1 to it once for each
            # of them.
            for entry in part.optimizer.state.values():
                entry["step"] = entry["step"].clone()


def _set_with_step(
    set_states: Callable[..., None],
    get_states: Callable[..., dict[str, torch.Tensor]],
    parameter: torch.nn.Parameter,
    tensors: dict[str, torch.Tensor],
) -> None:
    set_states(parameter, {"step": get_states(parameter)["step"], **tensors})
