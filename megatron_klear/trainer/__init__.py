"""Microbatch loop, loss scaling, optimizer and schedule around Megatron-Core."""

from megatron_klear.trainer.offload import PARTS, TrainerMemory
from megatron_klear.trainer.optimizer import TrainableModel, make_trainable
from megatron_klear.trainer.sequences import policy_minibatch, rollout_logprobs, sft_minibatch, to_score
from megatron_klear.trainer.trainer import Trainer, UpdateReport

__all__ = [
    "PARTS",
    "TrainableModel",
    "Trainer",
    "TrainerMemory",
    "UpdateReport",
    "make_trainable",
    "policy_minibatch",
    "rollout_logprobs",
    "sft_minibatch",
    "to_score",
]
