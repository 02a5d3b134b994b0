"""The fused head beside full logits and other libraries: python -m klear_kernels.linear_policy_loss.benchmark"""

from __future__ import annotations
