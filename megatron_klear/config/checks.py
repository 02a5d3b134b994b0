"""Checks that need more than one setting, or the file system; every problem is found in one pass."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_klear.config.architecture import (
    Architecture,
    contradictions,
    padded_vocab_size,
    read_hf_architecture,
    read_hf_yarn,
    resolve_architecture,
    without_absent_weights,
)
from megatron_klear.config.data import BIN_MULTIPLE, dali_installed, entry_problems, file_problems
from megatron_klear.config.placement import check_placement
from megatron_klear.config.precision import check_precision
from megatron_klear.config.profiling import check_profile
from megatron_klear.config.server_checks import check_least, check_serving
from megatron_klear.config.yarn import check_yarn
from megatron_klear.errors import ConfigError

if TYPE_CHECKING:
    from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
    from megatron_klear.config.schema import Entry, Settings


@dataclass
class Problems:
    """Collects problems, leaving out those that only follow from a setting already known to be bad.

    Attributes:
        broken: dotted paths whose value was replaced by a default because it was unusable.
        texts: the problems found, each starting with the dotted path to change.
    """

    broken: frozenset[str] = frozenset()
    texts: list[str] = field(default_factory=list)

    def add(self, path: str, text: str, *involved: str) -> None:
        """Note that `path` is wrong, unless it or one of the `involved` paths is broken."""
        if self.broken.isdisjoint((path, *involved)):
            self.texts.append(f"{path}: {text}")

    def divides(self, path: str, value: int, divisor: int, named: str, *involved: str) -> None:
        """Note a problem with `path` unless `value` is a multiple of `divisor`, which is described by `named`."""
        if value % divisor:
            self.add(path, f"got {value}, must be a multiple of {named} = {divisor}", *involved)


def find_problems(
    settings: Settings,
    *,
    entry: Entry,
    world_size: int,
    broken: frozenset[str],
    inputs: bool = True,
    ranks_per_machine: int | None = None,
) -> list[str]:
    """Return all problems that show only when settings are seen together, as `path: text`.

    Args:
        settings: values that are valid one by one (broken ones replaced by defaults).
        entry: which entry is to run; sections that it does not use are not checked against others.
        world_size: number of ranks.
        broken: dotted paths already reported.
        inputs: whether the files and directories that settings name must be there, and fit; a plan needs none.
        ranks_per_machine: None for what torchrun says of this one.
    """
    problems, has_weights = Problems(broken=broken), settings.model.hf_dir is not None
    if not inputs:
        settings = dataclasses.replace(settings, model=without_absent_weights(settings.model))
    architecture = _architecture(settings, problems)
    _check_layout(settings, world_size, problems)
    if architecture is not None:
        _check_split(settings, architecture, problems)
        _check_lengths(settings, architecture, entry, problems)
        in_weights = None if settings.model.hf_dir is None else read_hf_yarn(settings.model.hf_dir)
        check_yarn(settings, architecture, entry, in_weights, problems)
    _check_backends(settings, problems)
    check_precision(settings, architecture, problems)
    _check_training(settings, entry, problems)
    check_profile(settings, world_size, settings.rl.steps if entry == "rl" else settings.sft.steps, problems)
    _check_rewards(settings, problems)
    if entry == "rl":
        _check_scheduling(settings, problems)
    if settings.rollout.engine == "sglang" and settings.needs_engine(entry):
        check_serving(settings, architecture, problems, has_weights=has_weights)
        check_least(settings, entry, world_size, problems, ranks_per_machine=ranks_per_machine)
        check_placement(settings, entry, world_size, problems, ranks_per_machine=ranks_per_machine)
    if inputs:
        _check_environment(settings, entry, problems)
        _check_files(settings, entry, architecture, problems)
    return problems.texts


def find_data_problems(settings: Settings, *, broken: frozenset[str]) -> list[str]:
    """Return the problems that matter for tokenizing `data.sft`, which needs neither a model nor ranks."""
    problems = Problems(broken=broken)
    _check_sft_files(settings, problems)
    _check_tokenizer(settings, None, problems)
    return problems.texts


def _architecture(settings: Settings, problems: Problems) -> Architecture | None:
    """Resolve the architecture; None when it is unknown, its problems noted."""
    model = settings.model
    if any(path.startswith("model.") for path in problems.broken):
        return None
    try:
        if model.hf_dir is not None:
            found = contradictions(model, read_hf_architecture(model.hf_dir))
            if found:
                raise ConfigError(found)
        return resolve_architecture(model)
    except ConfigError as error:
        problems.texts.extend(error.problems)
        return None


def _check_layout(settings: Settings, world_size: int, problems: Problems) -> None:
    parallel = settings.parallel
    size = parallel.tp * parallel.pp * parallel.cp
    if world_size % size:
        problems.add(
            "parallel",
            f"the world size is {world_size}, which is no multiple of tp * pp * cp = "
            f"{parallel.tp} * {parallel.pp} * {parallel.cp} = {size}; start another number of ranks or change them",
            "parallel.tp",
            "parallel.pp",
            "parallel.cp",
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.add("parallel.sequence_parallel", "got true, needs parallel.tp above 1", "parallel.tp")
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        problems.add(
            "parallel.overlap_param_gather",
            "got true, needs parallel.distributed_optimizer=true and parallel.overlap_grad_reduce=true",
            "parallel.distributed_optimizer",
            "parallel.overlap_grad_reduce",
        )
    step, reason = 2 * parallel.cp, "2 * parallel.cp"
    sharded, named = parallel.cp, "parallel.cp"
    if parallel.sequence_parallel:
        sharded, named = parallel.cp * parallel.tp, "parallel.cp * parallel.tp"
    if settings.fp8.on:
        sharded, named = sharded * settings.fp8.multiple, f"{settings.fp8.multiple} (fp8.recipe) * {named}"
    if step % sharded:
        step, reason = math.lcm(step, sharded), f"lcm({reason}, {named})"
    problems.divides("packing.token_budget", settings.packing.token_budget, step, reason, "parallel.cp", "parallel.tp")


def _check_split(settings: Settings, architecture: Architecture, problems: Problems) -> None:
    """Check that every size is a multiple of the number of ranks that share it."""
    parallel, tp = settings.parallel, "parallel.tp"
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        problems.divides(f"model.{name}", getattr(architecture, name), parallel.tp, tp, tp)
    problems.divides("model.num_layers", architecture.num_layers, parallel.pp, "parallel.pp", "parallel.pp")
    padded = padded_vocab_size(architecture.vocab_size, settings.model.vocab_multiple)
    if padded % parallel.tp:
        problems.add(
            "model.vocab_multiple",
            f"got {settings.model.vocab_multiple}, which pads the vocabulary of {architecture.vocab_size} to {padded}, "
            f"no multiple of parallel.tp = {parallel.tp}; set it to a multiple of parallel.tp",
            tp,
        )


def _check_lengths(settings: Settings, architecture: Architecture, entry: Entry, problems: Problems) -> None:
    """Check that the longest prompt and response fit into a microbatch and into the model's positions."""
    prompt, limit = settings.data.max_prompt_tokens, settings.yarn.training_positions(architecture)
    budget = settings.packing.token_budget
    if entry == "rl":
        longest = prompt + settings.rollout.max_response_tokens
        sum_text = f"with data.max_prompt_tokens = {prompt} a sequence has up to {longest} tokens, more than"
        path, got = "rollout.max_response_tokens", f"got {settings.rollout.max_response_tokens}"
        if longest > budget:
            text = f"{got}; {sum_text} packing.token_budget = {budget}"
            problems.add(path, text, "data.max_prompt_tokens", "packing.token_budget")
        if longest > limit:
            text = f"{got}; {sum_text} {_named(limit, architecture)}"
            problems.add(path, text, "data.max_prompt_tokens")
    if settings.evaluates:
        own = settings.evaluation.max_response_tokens
        response = settings.rollout.max_response_tokens if own is None else own
        path = "rollout.max_response_tokens" if own is None else "evaluation.max_response_tokens"
        limit = settings.yarn.evaluation_positions(architecture)
        if prompt + response > limit and not (own is None and entry == "rl"):
            problems.add(
                path,
                f"got {response}; with data.max_prompt_tokens = {prompt} an evaluated sequence has up to "
                f"{prompt + response} tokens, more than {_named(limit, architecture)}",
                "data.max_prompt_tokens",
                "data.heldout",
            )


def _named(limit: int, architecture: Architecture) -> str:
    scaled = limit != architecture.max_position_embeddings
    return (
        f"the positions that YaRN gives the model = {limit}"
        if scaled
        else f"the model's max_position_embeddings = {limit}"
    )


def _check_backends(settings: Settings, problems: Problems) -> None:
    model, device = settings.model, settings.run.device
    if model.attention == "flash" and model.dtype == "float32":
        problems.add("model.attention", "got flash, which computes in bfloat16 only; set model.dtype=bfloat16")
    if model.attention in ("te", "cudnn") and model.layer_spec == "local":
        problems.add("model.attention", f"got {model.attention}, needs model.layer_spec=te or auto")
    if model.attention in ("sdpa", "cpu") and model.layer_spec == "te":
        problems.add(
            "model.attention", f"got {model.attention}, which only the local layers have; set auto, te, flash or cudnn"
        )
    if device == "cpu" and model.attention in ("te", "flash", "cudnn"):
        problems.add("model.attention", f"got {model.attention}, which needs a GPU, and run.device is cpu")
    if device == "cpu" and model.layer_spec == "te":
        problems.add("model.layer_spec", "got te, which needs a GPU, and run.device is cpu")
    if device == "cuda" and model.attention == "cpu":
        problems.add("model.attention", "got cpu, and run.device is cuda; set auto, te, flash, cudnn or sdpa")


def _check_training(settings: Settings, entry: Entry, problems: Problems) -> None:
    optimizer, sft, rl = settings.optimizer, settings.sft, settings.rl
    if optimizer.schedule == "cosine" and optimizer.min_lr > optimizer.lr:
        text = f"got {optimizer.min_lr}, must not be above optimizer.lr = {optimizer.lr}"
        problems.add("optimizer.min_lr", text, "optimizer.lr")
    if sft.steps is not None and sft.epochs is not None:
        problems.add("sft.steps", f"got {sft.steps} beside sft.epochs = {sft.epochs}; give exactly one", "sft.epochs")
    if entry == "sft":
        _check_batches(settings, problems)
    if entry == "sft" and sft.steps is None and sft.epochs is None:
        problems.add("sft.steps", "give exactly one of sft.steps and sft.epochs", "sft.epochs")
    if entry == "rl":
        problems.divides(
            "rl.prompts_per_step",
            rl.prompts_per_step,
            rl.minibatch_prompts,
            "rl.minibatch_prompts",
            "rl.minibatch_prompts",
        )
        if settings.correction.kind != "none" and settings.rollout.top_p < 1:
            problems.add(
                "correction.kind",
                f"got {settings.correction.kind}, and rollout.top_p = {settings.rollout.top_p} samples from other "
                "probabilities than the ones reported; set rollout.top_p=1 or correction.kind=none",
                "rollout.top_p",
            )
    if settings.evaluation.every_steps and not settings.data.heldout:
        text = f"got {settings.evaluation.every_steps}, but data.heldout names no file; set one of them"
        problems.add("evaluation.every_steps", text, "data.heldout")


def _check_batches(settings: Settings, problems: Problems) -> None:
    """Check how SFT rows become batches, and that what is to read them is there."""
    cp, data = settings.parallel.cp, settings.data
    if settings.sft.batch_bins is not None and BIN_MULTIPLE % (2 * cp):
        text = (
            f"got {settings.sft.batch_bins}; sequences lie in bins at multiples of {BIN_MULTIPLE} tokens, which "
            f"2 * parallel.cp = {2 * cp} does not divide: set sft.batch_bins=null, or another parallel.cp"
        )
        problems.add("sft.batch_bins", text, "parallel.cp")
    if data.loader == "dali" and not dali_installed():
        problems.add("data.loader", "got dali, and nvidia-dali-cuda130 is not installed; install it, or set auto")


def _check_rewards(settings: Settings, problems: Problems) -> None:
    reward, start, end = settings.reward, settings.tokenizer.think_start, settings.tokenizer.think_end
    if start in end or end in start:
        text = f"got {end!r} beside tokenizer.think_start = {start!r}; they must differ, neither inside the other"
        problems.add("tokenizer.think_end", text, "tokenizer.think_start")
    check_rewards(reward, settings.code_reward, problems)


def check_rewards(reward: RewardSettings, code: CodeRewardSettings, problems: Problems) -> None:
    """Note what keeps graders and their rewards from working; for all entries that grade."""
    sections: tuple[tuple[str, RewardSettings | CodeRewardSettings], ...] = (("reward", reward), ("code_reward", code))
    for name, section in sections:
        if section.wrong >= section.correct:
            text = f"got {section.wrong}, must be below {name}.correct = {section.correct}"
            problems.add(f"{name}.wrong", text, f"{name}.correct")
        if section.malformed > section.wrong:
            text = f"got {section.malformed}, must not be above {name}.wrong = {section.wrong}"
            problems.add(f"{name}.malformed", text, f"{name}.wrong")
    if code.wall_seconds < code.cpu_seconds:
        text = f"got {code.wall_seconds}, must not be below code_reward.cpu_seconds = {code.cpu_seconds}"
        problems.add("code_reward.wall_seconds", text, "code_reward.cpu_seconds")
    if code.allow_processes and code.sandbox == "rlimits":
        problems.add("code_reward.allow_processes", "got true, needs code_reward.sandbox=bubblewrap")
    for path in code.extra_paths:
        if not Path(path).is_absolute() or not Path(path).is_dir():
            problems.add("code_reward.extra_paths", f"{path} is no folder with an absolute path")
    for module in code.warm_modules:
        if not all(part.isidentifier() for part in module.split(".")):
            problems.add("code_reward.warm_modules", f"{module!r} is no name of a module, as in numpy or os.path")


def _check_scheduling(settings: Settings, problems: Problems) -> None:
    scheduling = settings.scheduling
    if scheduling.mode != "sync" and settings.rollout.engine == "local" and scheduling.replay_from is None:
        problems.add(
            "scheduling.mode",
            f"got {scheduling.mode}, and rollout.engine is local, which generates in the training processes and so "
            "cannot while they train; set sync, or serve from engines of their own",
            "rollout.engine",
        )
    if scheduling.start_seconds < scheduling.stall_seconds:
        text = (
            f"got {scheduling.start_seconds}, must not be below scheduling.stall_seconds = {scheduling.stall_seconds}"
        )
        problems.add("scheduling.start_seconds", text, "scheduling.stall_seconds")
    if scheduling.rollout_only and scheduling.mode != "sync":
        text = f"got true, and scheduling.mode is {scheduling.mode}; without training there is nothing to run ahead of"
        problems.add("scheduling.rollout_only", text + ": set sync", "scheduling.mode")
    if scheduling.rollout_only and scheduling.replay_from is not None:
        problems.add("scheduling.rollout_only", "got true beside scheduling.replay_from, which generates nothing")
    _check_replay(settings, problems)


def _check_replay(settings: Settings, problems: Problems) -> None:
    """Check which steps of another run are replayed."""
    scheduling, steps = settings.scheduling, settings.rl.steps
    first, last = scheduling.replay_first_step, scheduling.replay_last_step
    if scheduling.replay_from is None:
        for name, value in (("first", first if first > 1 else None), ("last", last)):
            if value is not None:
                text = f"got {value}, and nothing is replayed: set scheduling.replay_from"
                problems.add(f"scheduling.replay_{name}_step", text, "scheduling.replay_from")
        return
    if last is not None and last < first:
        text = f"got {last}, below scheduling.replay_first_step = {first}"
        problems.add("scheduling.replay_last_step", text, "scheduling.replay_first_step")
    for name, value in (("first", first), ("last", last)):
        if value is not None and value > steps:
            text = f"got {value}, beyond rl.steps = {steps}: set rl.steps as the recorded run had it"
            problems.add(f"scheduling.replay_{name}_step", text, "rl.steps")


def _check_environment(settings: Settings, entry: Entry, problems: Problems) -> None:
    """Check that what a run needs besides its data is there: recorded responses, and what servers are started from."""
    source = settings.scheduling.replay_from
    if entry == "rl" and source is not None and not (Path(source) / "ledger.sqlite").is_file():
        problems.add("scheduling.replay_from", f"{source} holds no ledger.sqlite; name a run directory of train_rl")
    if settings.rollout.engine == "sglang" and settings.needs_engine(entry) and not settings.sglang.urls:
        python = Path(settings.sglang.venv) / "bin" / "python"
        if not os.access(python, os.X_OK):
            text = f"no {python}; run tools/setup_sglang.sh (KLEAR_SGLANG_VENV says where), or set sglang.urls"
            if not settings.generates(entry):
                text += "; evaluation alone needs it: evaluation.at_end=false evaluation.every_steps=0 does without"
            problems.add("sglang.venv", text)


def _check_files(settings: Settings, entry: Entry, architecture: Architecture | None, problems: Problems) -> None:
    """Check that every input of the entry is there, and that the run directory may be written."""
    data, weights = settings.data, settings.model.hf_dir
    if weights is not None and Path(weights).is_dir() and not any(Path(weights).glob("*.safetensors")):
        problems.add("model.hf_dir", f"no *.safetensors file in {weights}")
    if entry == "sft":
        _check_sft_files(settings, problems)
    elif not data.prompts:
        problems.add("data.prompts", "names no file, and rl training needs one at least")
    for path, files in {"data.prompts": data.prompts if entry == "rl" else (), "data.heldout": data.heldout}.items():
        for text in file_problems(files):
            problems.add(path, text)
    run = Path(settings.run.dir)
    if run.exists() and not run.is_dir():
        problems.add("run.dir", f"{run} is a file, expected a directory")
    elif not _writable(run):
        problems.add("run.dir", f"{run} cannot be written by this user")
    elif not settings.run.resume and (run / "config.yaml").exists():
        problems.add("run.dir", f"{run} already holds a run; set run.resume=true to continue it, or another directory")
    start = settings.checkpoint.start_from
    if start is not None and not _checkpoints_in(run):  # a run that has begun does not need it any more
        if not Path(start).is_dir():
            problems.add("checkpoint.start_from", f"no directory {start}")
        elif not _checkpoints_in(Path(start)):
            problems.add("checkpoint.start_from", f"no checkpoint in {start}; name a run directory or a checkpoint")
    _check_tokenizer(settings, architecture, problems)


def _check_sft_files(settings: Settings, problems: Problems) -> None:
    if not settings.data.sft:
        problems.add("data.sft", "names no file, and sft training needs one at least")
    for text in entry_problems(settings.data.sft):
        problems.add("data.sft", text)


def _checkpoints_in(directory: Path) -> bool:
    """Whether a directory is a checkpoint, or has one in it or in its `checkpoints`; not whether that is whole."""
    if (directory / "manifest.json").is_file() or (directory / ".metadata").is_file():
        return True
    return any(any(place.glob("step_*")) for place in (directory, directory / "checkpoints"))


def _writable(directory: Path) -> bool:
    """Whether a directory, which may have to be made first, can be written to."""
    existing = next((p for p in (directory, *directory.absolute().parents) if p.exists()), Path("/"))
    return os.access(existing, os.W_OK | os.X_OK)


def _check_tokenizer(settings: Settings, architecture: Architecture | None, problems: Problems) -> None:
    """Check that the tokenizer is there and that the model has an embedding for each of its tokens."""
    directory = Path(settings.tokenizer.dir)
    file = directory / "tokenizer.json"
    if not directory.is_dir():
        problems.add("tokenizer.dir", f"no directory {directory}")
    elif file.exists():
        try:
            count = _num_tokens(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.add("tokenizer.dir", f"{file} is not a tokenizer: {type(error).__name__}: {error}")
            return
        if architecture is not None and count > architecture.vocab_size:
            problems.add(
                "model.vocab_size",
                f"the model has {architecture.vocab_size} tokens, fewer than the {count} of {file}",
                "tokenizer.dir",
            )
    elif not (directory / "vocab.json").exists():
        problems.add("tokenizer.dir", f"no tokenizer.json in {directory}")


def _num_tokens(file: Path) -> int:
    """Return 1 + the largest token id of a tokenizer.json."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    # Unigram models list [text, score] pairs, all others map text to id.
    largest = len(vocab) - 1 if isinstance(vocab, list) else max((int(i) for i in vocab.values()), default=-1)
    return 1 + max([largest, *(int(token["id"]) for token in content.get("added_tokens", []))])
