"""Ranges in profilers' timelines for a stage's layers and microbatches, by hooks that training does without."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_klear.observe.ranges import OpenRange


class StageRanges:
    """Names `layer 7 forward`, `layer 7 backward` and, around the latter, `microbatch 2 backward`.

    Layers count from 1 over all stages, microbatches from 0. The backward pass of a layer begins with the gradient of
    its output and ends with that of its input; what autograd does later, such as weight gradients put off, belongs to
    the range that follows. Under `model.recompute=full` a layer's forward pass comes again, just before its backward.

    Args:
        model: this stage; hooks are added to its layers.
    """

    def __init__(self, model: GPTModel) -> None:
        self._open: tuple[str, OpenRange] | None = None  # the layer whose backward pass runs
        self._microbatch: OpenRange | None = None
        self._next_microbatch = 0
        layers = list(model.decoder.layers)
        for layer in layers:
            name = f"layer {layer.layer_number}"
            _LayerHooks(self, name, layer, last=layer is layers[-1], first=layer is layers[0])

    def restart(self) -> None:
        """Count microbatches from 0 again; pipeline schedules go back through them in the order of the forwards."""
        self.end_backward()
        self._next_microbatch = 0

    def begin_backward(self, layer: str, *, opens_microbatch: bool) -> None:
        """A layer's output has its gradient: the layer behind it is done."""
        self._close_layer()
        if opens_microbatch:
            self.end_backward()
            self._microbatch = OpenRange(f"microbatch {self._next_microbatch} backward")
            self._next_microbatch += 1
        self._open = (layer, OpenRange(f"{layer} backward"))

    def end_backward(self, layer: str | None = None) -> None:
        """The input of a layer has its gradient; without a layer, the microbatch has gone through the stage."""
        if layer is None or (self._open is not None and self._open[0] == layer):
            self._close_layer()
        if layer is None and self._microbatch is not None:
            self._microbatch.close()
            self._microbatch = None

    def _close_layer(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def begin_forward(self, layer: str) -> OpenRange:
        """A layer begins; inside a backward pass this is recomputation, and the layer behind it is done."""
        self._close_layer()
        return OpenRange(f"{layer} forward")


class _LayerHooks:
    """The hooks of one layer."""

    def __init__(self, stage: StageRanges, name: str, layer: torch.nn.Module, *, last: bool, first: bool) -> None:
        self.stage, self.name, self.last, self.first = stage, name, last, first
        self.forwards: list[OpenRange] = []
        layer.register_forward_pre_hook(self.begin, with_kwargs=True)
        layer.register_forward_hook(self.end, with_kwargs=True, always_call=True)

    def begin(self, layer: torch.nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.forwards.append(self.stage.begin_forward(self.name))

    def end(self, layer: torch.nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        self.forwards.pop().close()
        entered = keywords["hidden_states"] if "hidden_states" in keywords else args[0]
        left = output[0] if isinstance(output, tuple) else output
        if not (isinstance(left, torch.Tensor) and left.requires_grad and entered.requires_grad):
            return
        left.register_hook(lambda _: self.stage.begin_backward(self.name, opens_microbatch=self.last))
        entered.register_hook(lambda _: self.left_behind())

    def left_behind(self) -> None:
        """The gradient of this layer's input is there."""
        self.stage.end_backward(self.name)
        if self.first:
            self.stage.end_backward()
