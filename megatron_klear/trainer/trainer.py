"""Trains a sharded model on weighted sequences: logprobs of a batch, or one optimizer update from it.

Every rank passes the same sequences in the same order. Which rank computes which is decided here by a plan that
all ranks derive alike, so callers never see the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_klear.algorithm import ClipRegions, PolicyObjective, clip_regions
from megatron_klear.config import Architecture, Settings
from megatron_klear.errors import TrainingError
from megatron_klear.model import HeadResult
from megatron_klear.observe.flops import FlopCount, causal_pairs, forward_flops, training_flops_of_sums
from megatron_klear.packing import attention_share, pack, plan_packs, sequence_multiple, unpack
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.records import FloatArray, PackedBatch, ParallelContext, TrainSequence
from megatron_klear.trainer.microbatches import run_microbatches
from megatron_klear.trainer.offload import PARTS, TrainerMemory
from megatron_klear.trainer.optimizer import TrainableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one optimizer update did; sums and means over the whole minibatch, the same on every rank.

    Attributes:
        loss, policy_loss, lm_loss: the training loss and its two parts.
        grad_norm: global L2 norm before clipping.
        lr: learning rate of this update.
        tokens: tokens in the minibatch, prompts included, padding not.
        predicted_tokens: tokens with a weight.
        entropy: mean entropy of the policy at the tokens with a weight, in nats.
        regions: tokens and gradient mass in each of the four clip regions; add up over updates, then `.fractions()`.
        microbatches: forward and backward passes per data-parallel rank.
        slots_used: share of packed positions that hold a token.
        budget_used: share of the microbatches' token budgets that holds a token; packs end where their tokens do, so
            that this one alone shows packs that are short or empty.
        flops_max_over_mean: model operations of the data parallel rank with the most over their mean; 1 is even.
    """

    loss: float
    policy_loss: float
    lm_loss: float
    grad_norm: float
    lr: float
    tokens: int
    predicted_tokens: int
    entropy: float
    regions: ClipRegions
    microbatches: int
    slots_used: float
    budget_used: float
    flops_max_over_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """A minibatch as this rank has it.

    Attributes:
        packs: this data-parallel rank's microbatches, on the device; every rank has equally many.
        sequence_ids: names of the sequences of the whole minibatch.
        tokens: tokens of the whole minibatch, padding left out.
    """

    packs: Sequence[PackedBatch]
    sequence_ids: Sequence[str]
    tokens: int


class Trainer:
    """The training side of a run on this rank.

    Args:
        trainable: model, optimizer and schedule.
        arch: sizes of the model.
        settings: the run's settings (packing, rollout temperature).
        context: the layout.

    Attributes:
        memory: moves what is trained off the device and back.
    """

    def __init__(
        self, trainable: TrainableModel, arch: Architecture, settings: Settings, context: ParallelContext
    ) -> None:
        self.trainable = trainable
        self.arch = arch
        self.settings = settings
        self.context = context
        self.memory = TrainerMemory(trainable)
        self._flops = FlopCount()

    def take_flops(self) -> FlopCount:
        """Operations that the model needed since the last call, over all ranks."""
        flops, self._flops = self._flops, FlopCount()
        return flops

    def token_logprobs(self, sequences: Sequence[TrainSequence], *, temperature: float = 1.0) -> list[FloatArray]:
        """Log-probability of every token under the current weights, in the token frame.

        Args:
            sequences: what to score; the same list on every rank.
            temperature: divides the logits.

        Returns:
            One float32 [L] per sequence, in order, on every rank; entry 0 is 0.
        """
        self.memory.require("weights")
        plan, packs = self._packs(sequences)
        self._flops += forward_flops(self.arch, [len(s.token_ids) for s in sequences])
        results = run_microbatches(self.trainable, packs, None, self.context, temperature=temperature)
        mine: dict[int, FloatArray] = {}
        for number, (indices, batch) in enumerate(zip(plan, packs, strict=True)):
            local = results[number].logprobs if results else torch.empty_like(batch.policy_weight)
            shards = self._share(local)
            members = [sequences[i] for i in indices]
            mine.update(zip(indices, unpack(shards, batch, [len(s.token_ids) for s in members]), strict=True))
        everyone: list[dict[int, FloatArray] | None] = [None] * self.context.dp.size
        dist.all_gather_object(everyone, mine, group=self.context.dp.group)
        merged = {index: values for part in everyone if part for index, values in part.items()}
        return [merged[i] for i in range(len(sequences))]

    def update(
        self, sequences: Sequence[TrainSequence], objective: PolicyObjective, *, step: int, temperature: float = 1.0
    ) -> UpdateReport:
        """One optimizer update on a minibatch.

        Args:
            sequences: the minibatch with its weights; the same list on every rank.
            objective: the policy loss (unused by sequences whose policy weights are 0).
            step: number of the step, for messages.
            temperature: sampling temperature of the rollouts.

        Raises:
            TrainingError: the loss or the gradient is not finite; the weights are as before.
        """
        self.memory.require(*PARTS)
        _, packs = self._packs(sequences)
        minibatch = Minibatch(
            packs=packs,
            sequence_ids=[s.sequence_id for s in sequences],
            tokens=sum(len(s.token_ids) for s in sequences),
        )
        return self.update_packed(minibatch, objective, step=step, temperature=temperature)

    def update_packed(
        self, minibatch: Minibatch, objective: PolicyObjective, *, step: int, temperature: float = 1.0
    ) -> UpdateReport:
        """One optimizer update on a minibatch that is packed already; see `update`."""
        self.memory.require(*PARTS)
        packs = minibatch.packs
        self.trainable.ddp.zero_grad_buffer()
        self.trainable.optimizer.zero_grad()
        results = run_microbatches(self.trainable, packs, objective, self.context, temperature=temperature)
        sums, regions, rank_flops = self._sums(packs, results, objective)
        self._require_finite_losses(packs, results, step)
        lr, grad_norm = self._step(step, minibatch.sequence_ids)
        tokens, predicted = minibatch.tokens, round(sums["predicted"])
        self._flops += training_flops_of_sums(
            self.arch, tokens=tokens, sequences=sums["sequences"], pairs=sums["pairs"], trained_tokens=predicted
        )
        return UpdateReport(
            loss=sums["policy_loss"] + sums["lm_loss"],
            policy_loss=sums["policy_loss"],
            lm_loss=sums["lm_loss"],
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            predicted_tokens=predicted,
            entropy=sums["entropy"] / max(sums["predicted"], 1.0),
            regions=regions,
            microbatches=len(packs),
            slots_used=tokens / sums["slots"],
            budget_used=tokens / (len(packs) * self.context.dp.size * self.settings.packing.token_budget),
            flops_max_over_mean=max(rank_flops) * len(rank_flops) / sum(rank_flops),
        )

    def advance_schedule_to(self, updates: int) -> None:
        """Count updates that a step could have made and did not, as when the filter leaves fewer groups.

        The learning rate schedule then depends on the step alone.
        """
        self.trainable.schedule.step(max(0, updates - self.trainable.schedule.num_steps))

    def _packs(self, sequences: Sequence[TrainSequence]) -> tuple[list[tuple[int, ...]], list[PackedBatch]]:
        """This data-parallel rank's microbatches: indices into `sequences`, and the packs."""
        context = self.context
        plan = plan_packs(
            [len(s.token_ids) for s in sequences],
            token_budget=self.settings.packing.token_budget,
            dp_size=context.dp.size,
            multiple=sequence_multiple(context.cp.size),
            share=attention_share(self.arch),
            names=[s.sequence_id for s in sequences],
        )
        mine = [tuple(indices) for indices in plan.microbatches[context.dp.rank]]
        sharded = context.tp.size if self.settings.parallel.sequence_parallel else 1
        packs = [
            pack(
                [sequences[i] for i in indices],
                cp_rank=context.cp.rank,
                cp_size=context.cp.size,
                tp_size=sharded,
                token_multiple=self.settings.fp8.multiple,
                device=context.device,
            )
            for indices in mine
        ]
        return mine, packs

    def _share(self, local: torch.Tensor) -> list[torch.Tensor]:
        """Values [T] of every context-parallel rank, from the last pipeline stage to all stages."""
        pp, cp = self.context.pp, self.context.cp
        local = local.contiguous()
        if pp.size > 1:
            dist.broadcast(local, src=dist.get_global_rank(pp.group, pp.size - 1), group=pp.group)
        if cp.size == 1:
            return [local.cpu()]
        shards = [torch.empty_like(local) for _ in range(cp.size)]
        dist.all_gather(shards, local, group=cp.group)
        return [shard.cpu() for shard in shards]

    def _sums(
        self, packs: Sequence[PackedBatch], results: Sequence[HeadResult], objective: PolicyObjective
    ) -> tuple[dict[str, float], ClipRegions, list[float]]:
        """Statistics of the minibatch summed over microbatches and ranks, and the model operations of each data
        parallel rank; the same on every rank."""
        names = ("policy_loss", "lm_loss", "predicted", "entropy", "slots", "sequences", "pairs")
        totals = dict.fromkeys(names, 0.0)
        regions = ClipRegions(torch.zeros(10, dtype=torch.float64))
        totals["slots"] = float(sum(batch.token_ids.numel() for batch in packs))
        tokens = 0.0
        for batch in packs:  # every context parallel rank knows the lengths of all, and is summed over
            count = len(batch.sequence_ids)
            lengths = batch.cu_seqlens.diff()[:count].tolist()
            tokens += sum(lengths) / self.context.cp.size
            totals["sequences"] += count / self.context.cp.size
            totals["pairs"] += causal_pairs(lengths) / self.context.cp.size
        for batch, result in zip(packs, results, strict=bool(results)):
            predicted = (batch.policy_weight != 0) | (batch.lm_weight != 0)
            totals["policy_loss"] += float(result.policy_loss)
            totals["lm_loss"] += float(result.lm_loss)
            totals["predicted"] += float(predicted.sum())
            totals["entropy"] += float(result.entropy[predicted].double().sum())
            regions += clip_regions(
                result.logprobs, batch.old_logprobs, batch.advantages, batch.policy_weight, objective
            )
        rank_flops = [0.0] * self.context.dp.size
        rank_flops[self.context.dp.rank] = training_flops_of_sums(  # linear: the context parallel ranks' parts add up
            self.arch,
            tokens=tokens,
            sequences=totals["sequences"],
            pairs=totals["pairs"],
            trained_tokens=totals["predicted"],
        ).total
        summed = iter(self._sum_over_ranks([*totals.values(), *regions.sums.tolist(), *rank_flops]))
        named = {name: next(summed) for name in names}
        found = ClipRegions(torch.tensor([next(summed) for _ in regions.sums], dtype=torch.float64))
        return named, found, list(summed)

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sums over data and context parallel ranks of what the last pipeline stage holds, on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.context.device)
        dist.all_reduce(total, group=self.context.dp_cp.group)
        if self.context.pp.size > 1:
            pp = self.context.pp
            dist.broadcast(total, src=dist.get_global_rank(pp.group, pp.size - 1), group=pp.group)
        return [float(v) for v in total]

    def _require_finite_losses(self, packs: Sequence[PackedBatch], results: Sequence[HeadResult], step: int) -> None:
        bad = [
            name
            for batch, result in zip(packs, results, strict=bool(results))
            if not bool(torch.isfinite(result.loss))
            for name in batch.sequence_ids
        ]
        count = torch.tensor([float(len(bad))], device=self.context.device)
        dist.all_reduce(count)
        if float(count) == 0:
            return
        everyone: list[list[str] | None] = [None] * self.context.world.size
        dist.all_gather_object(everyone, bad)
        names = sorted({name for part in everyone if part for name in part})
        raise TrainingError(
            f"step {step}: the loss is not finite in microbatches with {_shortened(names)}; no update was made. "
            "Look at these sequences, or lower optimizer.lr and restart from the last checkpoint."
        )

    def _step(self, step: int, sequence_ids: Sequence[str]) -> tuple[float, float]:
        """Check the gradient, advance the schedule, update the weights; returns learning rate and gradient norm."""
        optimizer = self.trainable.optimizer
        with cuda_means_cpu():
            optimizer.prepare_grads()
            grad_norm = float(optimizer.get_grad_norm())
            if not math.isfinite(grad_norm):
                raise TrainingError(
                    f"step {step}: the gradient is not finite (norm {grad_norm}) in the minibatch of "
                    f"{_shortened(sequence_ids)}; no update was made. "
                    "Look at these sequences, or lower optimizer.lr and restart from the last checkpoint."
                )
            self.trainable.schedule.step(1)
            optimizer.step()
        return float(optimizer.param_groups[0]["lr"]), grad_norm


def _shortened(names: Sequence[str], limit: int = 20) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
