"""Whether the machine's shared memory holds what is there of a set of weights at a time, and what to do where not."""

from __future__ import annotations

import os

import torch

from megatron_klear.config import Architecture
from megatron_klear.model.hf_names import tensor_rules
from megatron_klear.weight_sync.buckets import bucketed

SHARED_MEMORY = "/dev/shm"
_AT_A_TIME = 3
"""Buckets: one that is made, one that engines load, and one that they may hold still."""


def free_bytes() -> int:
    """Free shared memory of this machine, in bytes."""
    try:
        free = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return free.f_bavail * free.f_frsize


def needed_bytes(arch: Architecture, *, dtype: str, bucket_bytes: int) -> int:
    """Most bytes of shared memory that one rank takes while a set is sent.

    Args:
        arch: of the model: a tensor is never split, so its embedding may be a bucket of several times that size.
        dtype: of the engines' weights, as torch names it.
        bucket_bytes: size of a bucket (weight_sync.bucket_bytes).
    """
    tensors = (
        (name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
        for rule in tensor_rules(arch)
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    )
    sizes = [bucket.num_bytes for bucket in bucketed(tensors, bucket_bytes)]
    return max(sum(sizes[start : start + _AT_A_TIME]) for start in range(len(sizes)))


def lack_of_shared_memory(arch: Architecture, *, dtype: str, bucket_bytes: int, ranks: int = 1) -> str:
    """What is missing, in words; empty where a set fits.

    Args:
        arch, dtype, bucket_bytes: see `needed_bytes`.
        ranks: of this machine, each of which takes as much.
    """
    free, needed = free_bytes(), ranks * needed_bytes(arch, dtype=dtype, bucket_bytes=bucket_bytes)
    return "" if free > needed else f"{SHARED_MEMORY} has {free} bytes free, and {needed} are needed"


def no_room(num_bytes: int, why: str) -> str:
    """Says that a bucket did not fit, and what to do.

    Args:
        num_bytes: of the bucket.
        why: what the system said.
    """
    return (
        f"{SHARED_MEMORY} has no room for a bucket of {num_bytes} bytes ({free_bytes()} are free): {why}; give this "
        "machine or container more of it (--shm-size), make weight_sync.bucket_bytes smaller, which splits no tensor, "
        "or set weight_sync.transport to disk or distributed"
    )
