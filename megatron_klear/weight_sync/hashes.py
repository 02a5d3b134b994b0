"""The two hashes of a tensor's bytes that SGLang's weights checker reports, computed with torch and hashlib.

Read off SGLang 0.5.23, `managers/mm_utils.py` (`tensor_hash`) and `kernels/ops/memory/gpu_tensor_hash.py`: on a CPU
the first 8 bytes of SHA-256; on a GPU sums of mixed 32-bit words over tiles, which need no order between threads.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_MASK32 = 0xFFFFFFFF
_MASK64 = (1 << 64) - 1
_TILE_WORDS = 8192
_TILES_AT_A_TIME = 256
_MIX = (0x85EBCA6B, 0xC2B2AE35)  # MurmurHash3's finaliser
_POSITION = (0x27D4EB2D, 0x165667B1)
_ROTATION = (15, 13)
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK32)


def engine_hash(tensor: torch.Tensor, device: str) -> str:
    """The checksum that an engine reports for a tensor.

    Args:
        tensor: any data type and device.
        device: the engine's, `cpu` or `cuda`.

    Returns:
        16 hexadecimal digits.
    """
    return f"{gpu_hash(tensor) if device == 'cuda' else cpu_hash(tensor):016x}"


def cpu_hash(tensor: torch.Tensor) -> int:
    """First 8 bytes of the SHA-256 of the tensor's bytes, big-endian."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    # Not data.numpy(): torch keeps memory that was seen that way, and the trainer's weights may have to leave theirs.
    return int.from_bytes(hashlib.sha256(np.from_dlpack(data).data).digest()[:8], "big")


def gpu_hash(tensor: torch.Tensor) -> int:
    """Sum over tiles of 8192 words of two 32-bit hashes side by side, then mixed once more.

    Equation: with w_i the 32-bit words, R rotation to the left and m MurmurHash3's finaliser,
        h_j(tile) = m(sum_i m(w_i ^ (i * P_j + s_j) ^ R(i, r_j)) ^ number of bytes), for j = 1, 2
    """
    words = _words(tensor)
    count = words.numel()
    if count == 0:
        return 0
    total = 0
    step = _TILE_WORDS * _TILES_AT_A_TIME
    for start in range(0, count, step):
        # Widened piece by piece: 32-bit unsigned arithmetic is done in 64 bits and masked.
        piece = words[start : start + step].to(torch.int64) & _MASK32
        index = torch.arange(start, start + piece.numel(), device=piece.device)
        first, second = (_tile_hashes(piece, index, count, which) for which in (0, 1))
        total += sum(((a << 32) | b) for a, b in zip(first.tolist(), second.tolist(), strict=True))
    return _splitmix64(total & _MASK64)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as int32, filled up with zeros."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    missing = -data.numel() % 4
    if missing:
        data = torch.cat([data, data.new_zeros(missing)])
    return data.view(torch.int32)


def _tile_hashes(words: torch.Tensor, index: torch.Tensor, num_words: int, which: int) -> torch.Tensor:
    turn = _ROTATION[which]
    rotated = ((index << turn) | (index >> (32 - turn))) & _MASK32
    position = ((index * _POSITION[which] + _SEEDS[which]) & _MASK32) ^ rotated
    mixed = _mixed(words ^ position)
    padded = torch.nn.functional.pad(mixed, (0, -mixed.numel() % _TILE_WORDS))
    sums = padded.view(-1, _TILE_WORDS).sum(dim=1) & _MASK32
    return _mixed(sums ^ (num_words * 4 & _MASK32))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x = (x * _MIX[0]) & _MASK32  # overflow leaves the low bits right
    x = x ^ (x >> 13)
    x = (x * _MIX[1]) & _MASK32
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & _MASK64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
