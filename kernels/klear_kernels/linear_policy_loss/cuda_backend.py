"""CUDA C++ backend for Hopper: losses and both gradients from one look at the logits; see cuda_rows.py."""

from __future__ import annotations

import torch

from klear_kernels.cuda_rows import GRADIENT_CHUNK_BYTES, CudaRows, contiguous, cuda_chunks, cuda_statistics
from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HeadGradients
from klear_kernels.linear_policy_loss.policy_rows import PolicyRows
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms, token_losses
from klear_kernels.softmax_rows import RowStatistics


def statistics(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of rows that carry no loss."""
    return cuda_statistics(problem)


def forward(
    problem: HeadProblem,
    terms: PolicyTerms,
    *,
    for_hidden: bool,
    for_weight: bool,
    main_grad: torch.Tensor | None = None,
) -> PolicyRows:
    """Compute losses and the wanted gradients in one pass over the chunks (6 K H V operations for both).

    Args:
        problem: the K rows, bfloat16.
        terms: of those K rows, in float32.
        for_hidden, for_weight: which gradients are wanted.
        main_grad: where the weight's gradient is added, or None to return it.
    """
    problem = contiguous(problem)
    gradients = HeadGradients(problem, for_hidden=for_hidden, for_weight=for_weight, main_grad=main_grad)
    if not gradients.wanted:
        result = cuda_statistics(problem)
        return PolicyRows.of(result, token_losses(result.logprobs, terms), (None, None))
    chunks = cuda_chunks(problem, GRADIENT_CHUNK_BYTES)
    result, buffer = RowStatistics.empty(problem), CudaRows(problem, chunks)
    losses = (torch.empty_like(result.logprobs), torch.empty_like(result.logprobs), torch.empty_like(result.logprobs))
    for chunk in chunks:
        hidden, labels = problem.hidden_rows(chunk), problem.label_rows(chunk)
        rows = buffer.load(hidden)
        part, reference = buffer.reduce(rows, labels, write=True)
        part_losses = token_losses(part.logprobs, terms.select(chunk, problem.compute_dtype))
        _, scale = buffer.factors(rows, labels, part, reference, part_losses[2])
        buffer.add_gradients(gradients, chunk, hidden, rows, scale)
        result.write(chunk, part)
        for whole, piece in zip(losses, part_losses, strict=True):
            whole[chunk] = piece
    return PolicyRows.of(result, losses, gradients.finish())
