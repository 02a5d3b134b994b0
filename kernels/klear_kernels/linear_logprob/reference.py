"""What `linear_logprob` means: full logits in float64 and torch's own softmax and autograd."""

from __future__ import annotations

import torch

from klear_kernels.linear_logprob.function import LogprobOutput


def reference_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> LogprobOutput:
    """Float64 log-probabilities [T], entropy [T] and log-sum-exp [T] of the inputs as they are rounded.

    Args:
        hidden: [T, H], any floating dtype; the whole sequence.
        weight: [V, H]; the whole vocabulary.
        labels: int64 [T].
        vocab_size, temperature, ignore_index: as in `linear_logprob`.
    """
    keep = labels != ignore_index
    words = weight.shape[0] if vocab_size is None else vocab_size
    logits = hidden[keep].double() @ weight[:words].double().t() / temperature
    all_logprobs = torch.log_softmax(logits, dim=-1)
    chosen = all_logprobs.gather(1, labels[keep].unsqueeze(1)).squeeze(1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)
    logsumexp = torch.logsumexp(logits, dim=-1).detach()

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(labels.shape, dtype=torch.float64, device=values.device).masked_scatter(keep, values)

    return LogprobOutput(spread(chosen), spread(entropy), spread(logsumexp))
