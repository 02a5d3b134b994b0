"""CUDA C++ backend for Hopper: statistics and gradients from a chunk of logits; see cuda_rows.py."""

from __future__ import annotations

import torch

from klear_kernels.cuda_rows import GRADIENT_CHUNK_BYTES, CudaRows, contiguous, cuda_chunks, cuda_statistics
from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HeadGradients
from klear_kernels.linear_logprob import torch_backend
from klear_kernels.softmax_rows import RowStatistics


def forward(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of the problem's K rows (2 K H V operations)."""
    return cuda_statistics(problem)


def backward(
    problem: HeadProblem,
    rows: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    gradients: HeadGradients,
) -> None:
    """Recompute each chunk's logits and add the wanted gradients (6 K H V operations for both).

    The gradient of the entropy is no row factor times exponentials; where it is asked for, the torch backend serves.

    Args:
        problem: the rows whose upstream gradient is not zero.
        rows: their statistics from the forward pass.
        grad_logprobs, grad_entropy: upstream gradients [K] in the compute dtype.
        gradients: takes the gradients.
    """
    problem = contiguous(problem)
    if grad_entropy is not None:
        torch_backend.backward(problem, rows, grad_logprobs, grad_entropy, gradients)
        return
    chunks = cuda_chunks(problem, GRADIENT_CHUNK_BYTES)
    buffer = CudaRows(problem, chunks)
    for chunk in chunks:
        hidden, labels = problem.hidden_rows(chunk), problem.label_rows(chunk)
        buffered = buffer.load(hidden)
        part, reference = buffer.reduce(buffered, labels, write=True)
        _, scale = buffer.factors(buffered, labels, part, reference, grad_logprobs[chunk])
        buffer.add_gradients(gradients, chunk, hidden, buffered, scale)
