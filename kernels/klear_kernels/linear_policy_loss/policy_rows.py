"""What a backend of `linear_policy_loss` returns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from klear_kernels.softmax_rows import RowStatistics


class PolicyRows(NamedTuple):
    """Results of the problem's K rows, in the compute dtype, and the gradients of the summed loss.

    Attributes:
        rows: statistics of the K rows.
        policy_loss, lm_loss: weighted losses [K].
        grad_logprobs: d loss / d logprob [K].
        grad_hidden: [T, H] ([T / tp, H] when sequence-parallel) in the input dtype, or None.
        grad_weight: [V_local, H] in the input dtype, or None where not wanted or added to main_grad.
    """

    rows: RowStatistics
    policy_loss: torch.Tensor
    lm_loss: torch.Tensor
    grad_logprobs: torch.Tensor
    grad_hidden: torch.Tensor | None
    grad_weight: torch.Tensor | None

    @classmethod
    def of(
        cls,
        rows: RowStatistics,
        losses: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        gradients: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> PolicyRows:
        """Put together statistics, what `token_losses` gave, and what `HeadGradients.finish` gave."""
        return cls(rows, *losses, *gradients)
