"""The mathematics of a row whose label was left out of its sums, for backends that see each logit once.

With z the logits over the temperature, r any reference, and sums over all words but the label y:

    R = sum_j exp(z_j - r)        Q = sum_j exp(z_j - r) (z_j - r)        d = log R - (z_y - r)
    logprob   = -log(1 + exp(d))
    1 - p_y   = 1 / (1 + exp(-d))
    logsumexp = r + log(R + exp(z_y - r))
    entropy   = -p_y log p_y + (1 - p_y) (logsumexp - r) - Q exp(r - logsumexp)

No word has to be known as the largest, so that one pass over the logits is enough, and the log-probability and
the gradient of a token whose probability is nearly 1 still keep full relative precision in float32. The entropy is
exact to rounding in the size of its terms, which for a good reference is the size of the entropy or of 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klear_kernels.softmax_rows import RowStatistics


def rows_from_sums(
    reference: torch.Tensor, rest: torch.Tensor, label_gap: torch.Tensor, weighted: torch.Tensor | None
) -> RowStatistics:
    """Statistics of rows, all [C] float32 and equal on all shards.

    Args:
        reference: r.
        rest: R.
        label_gap: z_y - r.
        weighted: Q, or None where no entropy is wanted.
    """
    log_rest = torch.log(rest)
    odds = log_rest - label_gap
    logprobs = F.logsigmoid(-odds)
    complement = torch.sigmoid(odds)
    log_sum = torch.logaddexp(log_rest, label_gap)
    entropy = None
    if weighted is not None:
        label_term = -torch.exp(logprobs) * logprobs
        entropy = label_term + complement * log_sum - weighted * torch.exp(-log_sum)
    return RowStatistics(
        reference=reference, log_sum=log_sum, label_complement=complement, logprobs=logprobs, entropy=entropy
    )
