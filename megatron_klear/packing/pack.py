"""Train sequences into one packed microbatch, and per-token results of the model back to the sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_klear.packing.frame import to_prediction_frame, to_token_frame
from megatron_klear.packing.layout import pack_multiple, round_up, sequence_multiple, zigzag_indices
from megatron_klear.records import IGNORED_LABEL, FloatArray, IntArray, PackedBatch, TrainSequence

if TYPE_CHECKING:
    import torch

_FILLER_TOKENS = 1024
"""Longest filler sequence: attention is quadratic, so padding up to `pad_to` goes into many short fillers."""

_PER_TOKEN = ("policy_weight", "lm_weight", "advantages", "old_logprobs", "rollout_logprobs")


def pack(
    sequences: Sequence[TrainSequence],
    *,
    cp_rank: int = 0,
    cp_size: int = 1,
    tp_size: int = 1,
    token_multiple: int = 1,
    pad_to: int | None = None,
    pad_token_id: int = 0,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lay sequences end to end as one context-parallel rank sees them.

    Each sequence is padded to a multiple of 2 * cp (when cp is above 1). What is missing to the multiple of the whole
    pack is added to the last sequence's padding. What is missing to `pad_to` becomes filler sequences behind the real
    ones: they predict nothing, have no name, and count as unpadded in `cu_seqlens`. Without any sequence the pack is
    one filler.

    Args:
        sequences: what to pack, in the token frame; may be empty.
        cp_rank, cp_size: which zig-zag share to return.
        tp_size: tensor parallel size under sequence parallelism; each rank's T becomes a multiple of it.
        token_multiple: T, divided by that, becomes a multiple of this (products in FP8 need it).
        pad_to: number of tokens over the context-parallel group that the pack must have, for fixed shapes.
        pad_token_id: token of padding and fillers; any valid id does, nothing looks at it.
        device: where the tensors go.

    Returns:
        The rank's share; `cu_seqlens_padded` covers exactly T * cp tokens.

    Raises:
        ValueError: a sequence whose arrays disagree or whose entry 0 has a weight, or a `pad_to` that is too small
            or does not divide.
    """
    import torch  # here, so that what only plans packs does without it

    for sequence in sequences:
        _check(sequence)
    whole = pack_multiple(cp_size, tp_size, token_multiple)
    lengths, padded = _lengths([len(s.token_ids) for s in sequences], cp_size, whole, pad_to)
    unpadded_offsets, offsets = _offsets(lengths), _offsets(padded)
    total = int(offsets[-1])

    token_ids = np.full(total, pad_token_id, dtype=np.int64)
    labels = np.full(total, IGNORED_LABEL, dtype=np.int64)
    per_token = {name: np.zeros(total, dtype=np.float32) for name in _PER_TOKEN}
    for start, sequence in zip(offsets, sequences, strict=False):
        stretch = slice(start, start + len(sequence.token_ids))
        token_ids[stretch] = sequence.token_ids
        labels[stretch] = to_prediction_frame(sequence.token_ids, last=IGNORED_LABEL)
        for name, values in per_token.items():
            values[stretch] = to_prediction_frame(getattr(sequence, name), last=0)
    position_ids = np.arange(total, dtype=np.int64) - np.repeat(offsets[:-1], padded)

    held = zigzag_indices(offsets, cp_rank, cp_size)

    def share(values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values[held]).to(device)

    return PackedBatch(
        token_ids=share(token_ids),
        labels=share(labels),
        position_ids=share(position_ids),
        cu_seqlens=torch.from_numpy(unpadded_offsets.astype(np.int32)).to(device),
        cu_seqlens_padded=torch.from_numpy(offsets.astype(np.int32)).to(device),
        max_seqlen=int(padded.max()),
        policy_weight=share(per_token["policy_weight"]),
        lm_weight=share(per_token["lm_weight"]),
        advantages=share(per_token["advantages"]),
        old_logprobs=share(per_token["old_logprobs"]),
        rollout_logprobs=share(per_token["rollout_logprobs"]),
        sequence_ids=tuple(s.sequence_id for s in sequences),
    )


def unpack(
    shards: Sequence[torch.Tensor], batch: PackedBatch, lengths: Sequence[int] | None = None
) -> list[FloatArray]:
    """Put per-position results of all context-parallel ranks back into one array per sequence, in the token frame.

    Args:
        shards: values [T] of every context-parallel rank, in rank order; entry t speaks of `labels[t]`.
        batch: the pack that they belong to, as any of the ranks holds it.
        lengths: tokens of each sequence, if known; checked against the pack.

    Returns:
        One float32 [L] per sequence in the order of packing, fillers left out; entry 0 is 0.

    Raises:
        ValueError: the shards or the lengths are not those of this pack.
    """
    offsets = batch.cu_seqlens_padded.cpu().numpy().astype(np.int64)
    num_sequences = len(batch.sequence_ids)
    packed_lengths = np.diff(batch.cu_seqlens.cpu().numpy().astype(np.int64))[:num_sequences]
    if lengths is not None and list(lengths) != packed_lengths.tolist():
        raise ValueError(f"the pack holds sequences of {packed_lengths.tolist()} tokens, not of {list(lengths)}")
    whole = np.zeros(int(offsets[-1]), dtype=np.float32)
    for rank, shard in enumerate(shards):
        held = zigzag_indices(offsets, rank, len(shards))
        if shard.shape != held.shape:
            raise ValueError(f"cp rank {rank} brings values of shape {tuple(shard.shape)}, must be {held.shape}")
        whole[held] = shard.detach().cpu().float().numpy()
    return [
        to_token_frame(whole[start : start + length])
        for start, length in zip(offsets[:num_sequences], packed_lengths, strict=True)
    ]


def _check(sequence: TrainSequence) -> None:
    """Refuse what the shift would lose or misplace without a word."""
    length = len(sequence.token_ids)
    if length == 0:
        raise ValueError(f"sequence {sequence.sequence_id} has no tokens")
    for name in _PER_TOKEN:
        shape = getattr(sequence, name).shape
        if shape != (length,):
            raise ValueError(f"sequence {sequence.sequence_id}: {name} has shape {shape}, must be ({length},)")
    if sequence.policy_weight[0] != 0 or sequence.lm_weight[0] != 0:
        raise ValueError(f"sequence {sequence.sequence_id}: entry 0 is never predicted, so its weights must be 0")


def _lengths(lengths: list[int], cp_size: int, whole: int, pad_to: int | None) -> tuple[IntArray, IntArray]:
    """Unpadded and padded lengths of the sequences and of the fillers behind them."""
    unpadded = np.array(lengths, dtype=np.int64)
    padded = round_up(unpadded, sequence_multiple(cp_size))
    if lengths:
        padded[-1] += -padded.sum() % whole
    elif pad_to is None:
        pad_to = whole
    if pad_to is None:
        return unpadded, padded
    missing = pad_to - int(padded.sum())
    if missing < 0 or pad_to % whole:
        raise ValueError(
            f"pad_to is {pad_to}; it must be a multiple of {whole} and at least {int(padded.sum())} for these sequences"
        )
    full = int(round_up(np.array([_FILLER_TOKENS]), whole)[0])
    fillers = np.array([full] * (missing // full) + [missing % full] * (missing % full > 0), dtype=np.int64)
    return np.concatenate([unpadded, fillers]), np.concatenate([padded, fillers])


def _offsets(lengths: IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
