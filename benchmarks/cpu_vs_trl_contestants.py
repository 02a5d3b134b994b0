"""One process of a contestant of benchmarks/cpu_vs_trl.py: trains when told to, and says how long it took.

Usage: python cpu_vs_trl_contestants.py NAME TASK INPUTS OPTIONS COMMANDS ANSWERS; the last two are open file
descriptors. It does a first step, answers, and then waits for numbers of steps to do, one line each.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cpu_vs_trl_inputs import END, reward, words_of

warnings.filterwarnings("ignore")


class Starter:
    """Waits for the word to begin, and takes the time of every block of steps."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands), os.fdopen(answers, "w")
        self.remaining = 1  # the first step is for warming up
        self.ready_rss = 0.0
        self._begin()

    def ready(self) -> None:
        """Note the memory of libraries, model and optimizer, before any training."""
        self.ready_rss = _peak_rss_mib()

    def _begin(self) -> None:
        self.tokens, self.checks = 0, {}
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def finish_step(self, tokens: int = 0, **checks: float) -> None:
        """Count a step; at the end of a block answer, and wait for the next. Ends the process at the end of input."""
        self.tokens += tokens
        self.checks |= checks
        self.remaining -= 1
        if self.remaining:
            return
        answer = {
            "seconds": time.perf_counter() - self._wall,
            "processor_seconds": time.process_time() - self._processor,
            "tokens": self.tokens,
            "ready_rss_mib": self.ready_rss,
            "peak_rss_mib": _peak_rss_mib(),
            **self.checks,
        }
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
        line = self._commands.readline()
        if not line.strip():
            os._exit(0)
        self.remaining = int(line)
        self._begin()


def _peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(task: str, inputs: Path, work: dict[str, Any], options: dict[str, Any], starter: Starter) -> None:
    """megatron_klear on data-parallel gloo processes: the calls that train_sft and train_rl make."""
    import torch

    from megatron_klear import parallel
    from megatron_klear.config import (
        ModelSettings,
        OptimizerSettings,
        PackingSettings,
        ParallelSettings,
        RunSettings,
        Settings,
        TokenizerSettings,
        resolve_architecture,
    )
    from megatron_klear.model import build_qwen3, load_hf_weights, open_hf_directory
    from megatron_klear.trainer import Trainer, make_trainable

    torch.set_num_threads(options["threads"])
    layout = ParallelSettings()
    context = parallel.start(layout)
    settings = ModelSettings(hf_dir=str(inputs / "hf"), dtype="float32")
    arch = resolve_architecture(settings)
    model = build_qwen3(arch, settings, layout, context)
    load_hf_weights(model, arch, context, open_hf_directory(inputs / "hf", arch))
    optimizer = OptimizerSettings(lr=work["learning_rate"], weight_decay=0.0, adam_beta2=0.999)
    trainable = make_trainable(model, optimizer, layout, total_updates=10**6)
    whole = Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        packing=PackingSettings(token_budget=options["token_budget"]),
    )
    trainer = Trainer(trainable, arch, whole, context)
    starter.ready()
    if task == "sft":
        _our_sft(inputs, work, trainer, starter)
    else:
        _our_rl(inputs, work, trainer, starter)


def _our_sft(inputs: Path, work: dict[str, Any], trainer: Any, starter: Starter) -> None:
    from megatron_klear.algorithm import PolicyObjective
    from megatron_klear.trainer import sft_minibatch

    sequences = [np.array(ids) for ids in json.loads((inputs / "sft.json").read_text())]
    for step in range(work["steps"]):
        batch = sequences[step * work["sft_sequences"] :][: work["sft_sequences"]]
        rows = [(str(i), ids, np.arange(len(ids)) > 0) for i, ids in enumerate(batch)]
        report = trainer.update(sft_minibatch(rows, "token"), PolicyObjective(), step=step)
        tokens = sum(len(ids) for ids in batch) if trainer.context.world.rank == 0 else 0
        starter.finish_step(tokens, loss=report.loss)


def _our_rl(inputs: Path, work: dict[str, Any], trainer: Any, starter: Starter) -> None:
    import torch
    import torch.distributed as dist

    from megatron_klear.algorithm import PolicyObjective, group_advantages
    from megatron_klear.config import AlgorithmSettings
    from megatron_klear.model import hf_named_tensors
    from megatron_klear.records import Grade, Prompt, RolloutGroup, ScoredGroup
    from megatron_klear.rollout import LocalEngine, SamplingParams, merge_groups, shard_prompts
    from megatron_klear.trainer import policy_minibatch, to_score

    context = trainer.context
    engine = LocalEngine(json.loads((inputs / "hf" / "config.json").read_text()))
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_response_tokens=work["longest_response"], stop_token_ids=(END,)
    )
    settings = AlgorithmSettings(kind="clip", normalizer="batch", lm_loss_weight=0.0)
    objective = PolicyObjective(kind="clip", epsilon_low=0.2, epsilon_high=0.28)
    everything = json.loads((inputs / "prompts.json").read_text())

    def score(group: RolloutGroup) -> ScoredGroup:
        rewards = np.array([reward(r.response_ids.tolist()) for r in group.rollouts], dtype=np.float32)
        graded = np.ones(len(rewards), dtype=np.bool_)
        return ScoredGroup(
            group=group,
            grades=tuple(Grade(outcome="correct" if r > 0 else "wrong", reward=float(r)) for r in rewards),
            rewards=rewards,
            is_correct=rewards > 0,
            graded=graded,
            advantages=group_advantages(torch.from_numpy(rewards).double(), torch.from_numpy(graded)).float().numpy(),
        )

    engine.update_weights(hf_named_tensors(trainer.trainable.model, trainer.arch, context), version=0)
    for step in range(work["steps"]):
        rows = everything[step * work["prompts"] :][: work["prompts"]]
        prompts = [
            Prompt(prompt_id=f"{step}-{i}", domain="math", token_ids=np.array(ids), reference="")
            for i, ids in enumerate(rows)
        ]
        start = time.perf_counter()
        mine = shard_prompts(prompts, context.world.rank, context.world.size)
        generated = engine.generate(mine, num_responses=work["responses"], sampling=sampling, seed=step)
        parts: list[Any] = [None] * context.world.size
        dist.all_gather_object(parts, generated)
        groups = [score(group) for group in merge_groups(prompts, parts)]
        generate_seconds = time.perf_counter() - start
        to_compute = to_score(groups)
        old = dict(zip([s.sequence_id for s in to_compute], trainer.token_logprobs(to_compute), strict=True))
        size = work["prompts"] // work["updates"]
        for first in range(0, len(groups), size):
            trainer.update(policy_minibatch(groups[first : first + size], old, settings), objective, step=step)
        engine.update_weights(hf_named_tensors(trainer.trainable.model, trainer.arch, context), version=step + 1)
        tokens = sum(len(r.response_ids) for group in generated for r in group.rollouts)
        starter.finish_step(tokens, generate_seconds=generate_seconds)


def trl(task: str, inputs: Path, work: dict[str, Any], options: dict[str, Any], starter: Starter) -> None:
    """TRL's SFTTrainer or GRPOTrainer."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, PrinterCallback, Qwen3ForCausalLM, TrainerCallback

    torch.set_num_threads(options["threads"])
    disable_progress_bars()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = Qwen3ForCausalLM.from_pretrained(inputs / "hf", dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "hf")
    updates = work["updates"] if task == "rl" else 1
    counts = {"tokens": 0, "loss": 0.0}

    class Blocks(TrainerCallback):
        """Makes the trainer wait between blocks."""

        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            if state.global_step % updates == 0:
                starter.finish_step(counts["tokens"], loss=counts["loss"])
                counts.update(tokens=0, loss=0.0)

    common: dict[str, Any] = {
        "output_dir": str(inputs / "trl_output"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "max_steps": work["steps"] * updates,
        "logging_steps": 10**9,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": work["seed"],
        "shuffle_dataset": False,
        "ddp_backend": "gloo" if world > 1 else None,
        "ddp_find_unused_parameters": False if world > 1 else None,
    }
    make = _trl_sft if task == "sft" else _trl_rl
    trainer = make(inputs, work, options, common, world, counts, (model, tokenizer, Dataset))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Blocks)
    starter.ready()
    trainer.train()


def _trl_sft(
    inputs: Path,
    work: dict[str, Any],
    options: dict[str, Any],
    common: dict[str, Any],
    world: int,
    counts: dict[str, float],
    parts: tuple[Any, Any, Any],
) -> Any:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, dataset = parts
    sequences = json.loads((inputs / "sft.json").read_text())
    per_device = options["batch"]
    config = SFTConfig(
        **common,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=work["sft_sequences"] // (per_device * world),
        padding_free=options["padding_free"],
        max_length=None,
        train_sampling_strategy="sequential",
    )

    class Counting(SFTTrainer):
        """Counts tokens, and keeps the loss of a step as it is."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            counts["tokens"] += (
                int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
            )
            loss = super().training_step(model, inputs, num_items_in_batch)
            counts["loss"] += float(loss)
            return loss

    return Counting(
        model, args=config, train_dataset=dataset.from_dict({"input_ids": sequences}), processing_class=tokenizer
    )


def _trl_rl(
    inputs: Path,
    work: dict[str, Any],
    options: dict[str, Any],
    common: dict[str, Any],
    world: int,
    counts: dict[str, float],
    parts: tuple[Any, Any, Any],
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer, dataset = parts
    prompts = [words_of(ids) for ids in json.loads((inputs / "prompts.json").read_text())]
    per_update = work["prompts"] * work["responses"] // work["updates"] // world
    per_device = min(options["batch"], per_update)
    accumulated = per_update // per_device
    config = GRPOConfig(
        **common,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=work["updates"] * accumulated,
        num_generations=work["responses"],
        max_completion_length=work["longest_response"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
    )

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        counts["tokens"] += sum(len(ids) for ids in completion_ids)
        return [reward(ids) for ids in completion_ids]

    return GRPOTrainer(
        model,
        reward_funcs=rewards,
        args=config,
        train_dataset=dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


CONTESTANTS: dict[str, Callable[..., None]] = {"ours": ours, "trl": trl}


if __name__ == "__main__":
    name, task, directory, options, commands, answers = sys.argv[1:]
    starter = Starter(int(commands), int(answers))
    work = json.loads((Path(directory) / "workload.json").read_text())
    CONTESTANTS[name](task, Path(directory), work, json.loads(options), starter)
