"""Splitting prompts over processes and putting their groups together again, by prompt_id and never by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from megatron_klear.errors import RolloutError
from megatron_klear.records import Prompt, RolloutGroup

_SHOWN = 8


def shard_prompts(prompts: Sequence[Prompt], rank: int, size: int) -> list[Prompt]:
    """This rank's share of the prompts: every `size`-th, so shares differ by one prompt at most.

    Raises:
        RolloutError: a rank outside 0 .. size-1, or a prompt_id that occurs twice.
    """
    if not 0 <= rank < size:
        raise RolloutError(f"cannot shard prompts for rank {rank} of {size}: the rank must be from 0 to {size - 1}")
    require_unique_ids(prompts)
    return list(prompts[rank::size])


def merge_groups(
    prompts: Sequence[Prompt], parts: Iterable[Sequence[RolloutGroup]], *, num_responses: int | None = None
) -> list[RolloutGroup]:
    """Put the groups that several processes generated into the order of `prompts`.

    Args:
        prompts: all prompts that were sharded.
        parts: one sequence of groups per process, in any order.
        num_responses: where given, every group must hold this many responses.

    Raises:
        RolloutError: a group that is missing, duplicated, of another prompt, or of the wrong size; names the prompts.
    """
    require_unique_ids(prompts)
    expected = {prompt.prompt_id: prompt for prompt in prompts}
    found: dict[str, RolloutGroup] = {}
    problems: dict[str, list[str]] = {"duplicated": [], "never asked for": [], "of the wrong size": [], "missing": []}
    for group in (group for part in parts for group in part):
        name = group.prompt.prompt_id
        if name not in expected or group.prompt.token_ids.tolist() != expected[name].token_ids.tolist():
            problems["never asked for"].append(name)
        elif name in found:
            problems["duplicated"].append(name)
        else:
            found[name] = group
            if num_responses is not None and len(group.rollouts) != num_responses:
                problems["of the wrong size"].append(f"{name} ({len(group.rollouts)} of {num_responses})")
    problems["missing"] = [name for name in expected if name not in found]
    if any(problems.values()):
        texts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        raise RolloutError("the generated groups are not those of the prompts: " + "; ".join(texts))
    return [found[name] for name in expected]


def require_unique_ids(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that share a prompt_id.

    Raises:
        RolloutError: names the repeated ids.
    """
    counts = Counter(prompt.prompt_id for prompt in prompts)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise RolloutError(f"prompt ids must be unique within a batch (data.prompts); repeated: {_some(repeated)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
