"""The CUDA backend: its kernel's own source on a CPU, then the whole backend around it, against float64.

What needs the real device is marked `gpu` and asserts the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import emulated_cuda
import pytest
import torch

from klear_kernels import backends, cuda_extension, linear_policy_loss
from klear_kernels.linear_policy_loss.reference import reference_policy_loss
from megatron_klear.algorithm import PolicyObjective
