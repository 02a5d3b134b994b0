"""What a run would do with its settings, for `--check`: one `name: value` line each, no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_klear.config.schema import Entry, Settings
from megatron_klear.config.server_options import server_options

_CHECKPOINTS = "checkpoints/step_*/manifest.json"


def _checkpoint_of(step: int) -> str:
    return _CHECKPOINTS.replace("*", f"{step:08d}")


def outlook(settings: Settings, *, entry: Entry, world_size: int) -> str:
    """Describe the run that these settings would start.

    The lines `run.dir`, `model.hf_dir`, `engine options` and `profile` are read by scripts in `tools/`; the rest is for
    people.

    Args:
        settings: settings that were found good.
        entry: which entry would run.
        world_size: number of ranks.

    Returns:
        Lines `name: value`, ending in a newline.
    """
    parallel, arch = settings.parallel, settings.architecture
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    lines = {
        "run.dir": settings.run.dir,
        "model.hf_dir": settings.model.hf_dir or "",
        "start": _start(settings, entry),
        "layout": f"{world_size} ranks: tp {parallel.tp}, pp {parallel.pp}, cp {parallel.cp}, dp {dp}",
        "model": f"{arch.num_layers} layers, hidden {arch.hidden_size}, vocabulary {arch.vocab_size}, "
        f"{settings.model.dtype}",
        "training": _training(settings, entry, dp),
    }
    if settings.rollout.engine == "sglang" and settings.needs_engine(entry):
        lines["engine options"] = " ".join(server_options(settings, entry))
    if settings.fp8.on:
        stored = ", weights stored in FP8" if settings.fp8.parameters else ""
        lines["fp8"] = f"{settings.fp8.recipe} scaling{stored}"
    yarn = settings.yarn.scaling(arch)
    if yarn is not None:
        lines["yarn"] = f"factor {yarn.factor:g} from {yarn.original_positions} positions, {settings.yarn.apply_to}"
    profile = settings.profile
    if profile.tool != "none":
        ranks = ", ".join(map(str, profile.ranks))
        lines["profile"] = f"{profile.tool}, steps {profile.first_step} to {profile.last_step}, ranks {ranks}"
    return "".join(f"{name}: {value}\n" for name, value in lines.items())


def _start(settings: Settings, entry: Entry) -> str:
    saved = sorted(Path(settings.run.dir).glob(_CHECKPOINTS))
    if saved:
        return f"resume {saved[-1].parent.name}"
    replayed, before = settings.scheduling.replay_from, settings.scheduling.replay_first_step - 1
    if entry == "rl" and replayed is not None and (Path(replayed) / _checkpoint_of(before)).exists():
        return f"new, from step {before} of {replayed}"
    origin = settings.checkpoint.start_from or settings.model.hf_dir
    return f"new, weights from {origin}" if origin else f"new, random weights of run.seed {settings.run.seed}"


def _training(settings: Settings, entry: Entry, dp: int) -> str:
    if entry == "sft":
        sft = settings.sft
        length = f"{sft.steps} steps" if sft.steps is not None else f"{sft.epochs} epochs"
        batch = f"{sft.batch_sequences} sequences" if sft.batch_bins is None else _bins(sft.batch_bins, dp)
        return f"{length} of {batch} from {', '.join(settings.data.sft)}"
    rl, rollout = settings.rl, settings.rollout
    replayed = settings.scheduling.replay_from
    source = f"{rollout.engine} engine" if replayed is None else f"recorded in {replayed}"
    steps = f"{rl.steps} steps"
    if replayed is not None:
        first, last = settings.scheduling.replay_first_step, settings.scheduling.replay_last_step or rl.steps
        steps = f"steps {first} to {last}"
    return (
        f"{steps} of {rl.prompts_per_step} prompts x {rollout.responses_per_prompt} responses "
        f"({source}), {rl.minibatch_prompts} prompts per update, from {', '.join(settings.data.prompts)}"
    )


def _bins(bins: int, dp: int) -> str:
    """Bins of a step, and whether ranks get equally many, and several each: only then they are full and even."""
    if bins % dp:
        return f"{bins} bins (no multiple of dp {dp}: each step is packed anew, into microbatches that are less full)"
    each = bins // dp
    few = ": few, ranks may wait for one another" if dp > 1 and each < 4 else ""
    return f"{bins} bins ({each} to each data-parallel rank{few})"
