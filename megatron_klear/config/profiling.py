"""Settings of profiling: which steps of which ranks are recorded, and by what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.fields import SECTION, Steps, Unit

if TYPE_CHECKING:
    from megatron_klear.config.checks import Problems
    from megatron_klear.config.schema import Settings


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ProfileSettings:
    """A recording of some steps, with named ranges for phases, layers and microbatches."""

    tool: Literal["none", "nsys", "torch"] = "none"
    """nsys opens its window (cudaProfilerStart and Stop) around the steps, for tools/profile.sh; torch writes a trace
    of its own profiler to `profile` in `run.dir`, and works on a CPU too."""

    first_step: Steps = 3
    """First step to record; the first ones load and compile kernels."""

    num_steps: Steps = 1
    """How many steps to record; a trace of torch's profiler grows by some 100 MB for a step of a large model."""

    ranks: Annotated[tuple[int, ...], Unit("ranks"), Field(min_length=1)] = (0,)
    """Ranks that record."""

    @property
    def last_step(self) -> int:
        """Last step that is recorded."""
        return self.first_step + self.num_steps - 1


def check_profile(settings: Settings, world_size: int, total_steps: int | None, problems: Problems) -> None:
    """Check that there is something to record, and something to record it with.

    Args:
        settings: the settings as a whole.
        world_size: number of ranks.
        total_steps: steps of the run, None where that depends on the data.
        problems: collects what is wrong.
    """
    profile = settings.profile
    if profile.tool == "none":
        return
    if profile.tool == "nsys" and settings.run.device == "cpu":
        problems.add("profile.tool", "got nsys, which records a GPU, and run.device is cpu; set torch")
    outside = [rank for rank in profile.ranks if not 0 <= rank < world_size]
    if outside:
        text = f"got {list(profile.ranks)}, and the run has ranks 0 to {world_size - 1}"
        problems.add("profile.ranks", text)
    if total_steps is not None and profile.last_step > total_steps:
        text = f"got {profile.first_step}; with profile.num_steps = {profile.num_steps} the last recorded step is "
        problems.add(
            "profile.first_step",
            f"{text}{profile.last_step}, and the run has {total_steps}",
            "profile.num_steps",
            "sft.steps",
            "rl.steps",
        )
