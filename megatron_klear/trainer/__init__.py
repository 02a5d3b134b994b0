"""Microbatch loop, loss scaling, optimizer and schedule around Megatron-Core."""

from megatron_klear.trainer.loading import SftBatch, SftLoader, open_loader
from megatron_klear.trainer.offload import PARTS, TrainerMemory
from megatron_klear.trainer.optimizer import TrainableModel, make_trainable
from megatron_klear.trainer.sequences import policy_minibatch, rollout_logprobs, sft_minibatch, to_score
from megatron_klear.trainer.sft_batches import PackLayout, SftReader, deal_step
from megatron_klear.trainer.trainer import Minibatch, Trainer, UpdateReport

__all__ = [
    "PARTS",
    "Minibatch",
    "PackLayout",
    "SftBatch",
    "SftLoader",
    "SftReader",
    "TrainableModel",
    "Trainer",
    "TrainerMemory",
    "UpdateReport",
    "deal_step",
    "make_trainable",
    "open_loader",
    "policy_minibatch",
    "rollout_logprobs",
    "sft_minibatch",
    "to_score",
]
