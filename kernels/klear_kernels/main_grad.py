"""Adding a weight's gradient to the float32 buffer that Megatron hangs on each parameter.

Megatron-Core's distributed data parallelism gives each parameter `main_grad`, where the gradients of all
microbatches are summed, and the flag `grad_added_to_main_grad`. A layer that has added its gradient itself
sets the flag and returns a placeholder, which the hook that follows does not add (megatron.core 0.16,
tensor_parallel/layers.py and distributed/distributed_data_parallel.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MainGrad:
    """Where the gradient of one parameter goes.

    Attributes:
        parameter: the weight itself, which carries Megatron's attributes.
        buffer: its `main_grad`, [V_local, H] float32.
    """

    parameter: torch.Tensor
    buffer: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> MainGrad:
        """Find the buffer of a weight.

        Raises:
            ValueError: it has none, or one that does not fit.
        """
        buffer = getattr(weight, "main_grad", None)
        if not isinstance(buffer, torch.Tensor):
            raise ValueError("into_main_grad: weight has no main_grad; pass the parameter that Megatron prepared")
        wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if buffer.dtype != wanted or buffer.shape != weight.shape or buffer.device != weight.device:
            raise ValueError(
                f"into_main_grad: weight.main_grad is {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}, "
                f"allowed {wanted} {tuple(weight.shape)} on {weight.device}"
            )
        return cls(parameter=weight, buffer=buffer)

    def placeholder(self) -> torch.Tensor | None:
        """Say that the gradient is in the buffer; what a backward pass returns in its place.

        Zeros where Megatron keeps count: its hooks must see a gradient, and one that is shared with an embedding
        (`zero_out_wgrad`) is added to the embedding's own. None without Megatron's flag.
        """
        if not hasattr(self.parameter, "grad_added_to_main_grad"):
            return None
        self.parameter.grad_added_to_main_grad = True
        return torch.zeros_like(self.parameter)
