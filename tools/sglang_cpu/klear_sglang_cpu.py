"""Lets torchvision's Python part load beside a CPU build of torch; imported at start by klear_sglang_cpu.pth.

The torchvision wheel of the package index is linked against CUDA, so its compiled operators cannot load on a machine
without it. Its Python part then stops at two operators that it describes to torch without having them. Declaring
these two is enough: SGLang imports torchvision for image models and calls nothing of it for text.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from typing import Any

OPERATORS = ("nms", "qnms")


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first looked for; torch is not imported before that."""

    def __init__(self) -> None:
        self.declared: Any = None  # torch forgets operators whose library object is gone

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> None:
        if fullname == "torchvision" and self.declared is None:
            import torch

            self.declared = torch.library.Library("torchvision", "DEF")
            for name in OPERATORS:
                self.declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, DeclareOperators())
