"""YaRN: sequences longer than those that a model was trained on, by other rotary frequencies (Peng et al., 2024).

One checkpoint serves both ways: nothing of YaRN is in the weights. What changes is the arithmetic of whoever computes
the model, of the trainer, of engines, and of programs that read an exported config.json.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.fields import SECTION, Positive, Unit

if TYPE_CHECKING:
    from megatron_klear.config.architecture import Architecture
    from megatron_klear.config.checks import Problems
    from megatron_klear.config.schema import Entry, Settings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """A scaled rotary embedding, with the method's default constants (32 and 1 rotations, temperature 0.1 ln s + 1).

    Attributes:
        factor: s, by which the number of positions grows.
        original_positions: positions that the model was trained on.
    """

    factor: float
    original_positions: int

    @property
    def positions(self) -> int:
        """Positions that can be used."""
        return int(self.factor * self.original_positions)

    def hf_scaling(self) -> dict[str, Any]:
        """`rope_scaling` of a Hugging Face config.json."""
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_positions,
        }


@dataclass(frozen=True, kw_only=True, config=SECTION)
class YarnSettings:
    """YaRN, for sequences longer than those of training; it is also written into exported config.json files."""

    factor: Annotated[float | None, Field(gt=1)] = None
    """Positions grow by this (the paper: 2.5, for 64K after training at 32K); null leaves YaRN out."""

    original_positions: Annotated[int | None, Unit("tokens"), Positive] = None
    """Positions that the model was trained on; null takes `model.max_position_embeddings`."""

    apply_to: Literal["evaluation", "everything"] = "evaluation"
    """evaluation leaves training as it is, its rollouts too, since engine and trainer must compute the same policy;
    everything uses YaRN in training, rollouts and evaluation alike."""

    def scaling(self, arch: Architecture) -> Yarn | None:
        """What is asked for, wherever it applies."""
        if self.factor is None:
            return None
        return Yarn(factor=self.factor, original_positions=self.original_positions or arch.max_position_embeddings)

    def in_training(self, arch: Architecture) -> Yarn | None:
        """What trainer and rollouts compute with."""
        return self.scaling(arch) if self.apply_to == "everything" else None

    def in_servers(self, arch: Architecture, entry: Entry) -> Yarn | None:
        """What servers compute with, who have one rotary embedding: in RL the trainer's, after SFT evaluation's."""
        return self.in_training(arch) if entry == "rl" else self.scaling(arch)

    def training_positions(self, arch: Architecture) -> int:
        """Longest sequence that can be trained on."""
        yarn = self.in_training(arch)
        return arch.max_position_embeddings if yarn is None else max(yarn.positions, arch.max_position_embeddings)

    def evaluation_positions(self, arch: Architecture) -> int:
        """Longest sequence that an evaluation can have."""
        yarn = self.scaling(arch)
        return arch.max_position_embeddings if yarn is None else max(yarn.positions, arch.max_position_embeddings)


def yarn_of_hf_config(config: dict[str, Any]) -> Yarn | None:
    """The YaRN that a config.json asks for; None for another rotary embedding, or one with constants of its own."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "yarn":
            continue
        known = {"rope_type", "type", "factor", "original_max_position_embeddings", "rope_theta"}
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        if set(rope) <= known and isinstance(factor, int | float) and factor > 1 and isinstance(original, int):
            return Yarn(factor=float(factor), original_positions=original)
    return None


def check_yarn(
    settings: Settings, arch: Architecture, entry: Entry, in_weights: Yarn | None, problems: Problems
) -> None:
    """Check that everyone who must compute the same policy has the same rotary embedding.

    Args:
        settings: the settings as a whole.
        arch: the model.
        entry: which entry is to run.
        in_weights: what the config.json in `model.hf_dir` asks for.
        problems: collects what is wrong.
    """
    yarn, wanted = settings.yarn, settings.yarn.scaling(arch)
    if in_weights is not None and wanted != in_weights:
        problems.add(
            "yarn.factor",
            f"got {'null' if yarn.factor is None else yarn.factor}, and config.json in model.hf_dir asks for YaRN; set "
            f"yarn.factor={in_weights.factor:g} yarn.original_positions={in_weights.original_positions}, and "
            "yarn.apply_to=everything to train with it",
            "yarn.original_positions",
            "model.hf_dir",
        )
        return
    if wanted is None:
        if yarn.original_positions is not None:
            problems.add("yarn.original_positions", f"got {yarn.original_positions}, needs yarn.factor", "yarn.factor")
        return
    if wanted.original_positions > arch.max_position_embeddings:
        problems.add(
            "yarn.original_positions",
            f"got {wanted.original_positions}, must not be above the model's max_position_embeddings = "
            f"{arch.max_position_embeddings}",
        )
    if yarn.apply_to == "everything" or settings.rollout.engine != "sglang":
        return
    if entry == "rl" and settings.evaluates:
        problems.add(
            "yarn.apply_to",
            "got evaluation, and SGLang's servers have one rotary embedding, which is the trainer's; set everything, "
            "rollout.engine=local, or evaluation.at_end=false evaluation.every_steps=0 and evaluate the export later",
            "rollout.engine",
        )
    elif entry == "sft" and settings.evaluates and settings.weight_sync.verify != "checksum":
        problems.add(
            "weight_sync.verify",
            f"got {settings.weight_sync.verify}, and servers that evaluate with YaRN (yarn.apply_to) give other "
            "log-probabilities than the trainer, which has none; set checksum",
            "yarn.apply_to",
        )
