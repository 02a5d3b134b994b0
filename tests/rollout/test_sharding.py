from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Prompt, Rollout, RolloutGroup
from megatron_klear.rollout import merge_groups, shard_prompts

MakePrompts = Callable[..., list[Prompt]]


def answer(prompt: Prompt, count: int = 2) -> RolloutGroup:
    """A group whose tokens tell which prompt it belongs to."""
    rollout = Rollout(
        response_ids=np.array([int(prompt.prompt_id[1:])]),
        rollout_logprobs=np.zeros(1, np.float32),
        finish_reason="stop",
        policy_versions=((0, 1),),
    )
    return RolloutGroup(prompt=prompt, rollouts=(rollout,) * count)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11])
def test_shards_are_balanced_and_cover_every_prompt_once(make_prompts: MakePrompts, size: int) -> None:
    prompts = make_prompts(*[3] * 7)
    shards = [shard_prompts(prompts, rank, size) for rank in range(size)]
    assert sorted(p.prompt_id for shard in shards for p in shard) == [p.prompt_id for p in prompts]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("size", [1, 3, 9])
def test_merge_restores_the_order_whatever_order_parts_arrive_in(make_prompts: MakePrompts, size: int) -> None:
    prompts = make_prompts(*range(1, 8))
    parts = [[answer(p) for p in reversed(shard_prompts(prompts, rank, size))] for rank in range(size)]
    merged = merge_groups(prompts, pickle.loads(pickle.dumps(parts[::-1])), num_responses=2)
    assert [g.prompt.prompt_id for g in merged] == [p.prompt_id for p in prompts]
    assert [g.rollouts[0].response_ids[0] for g in merged] == list(range(7))


def test_merge_names_what_is_missing_duplicated_foreign_or_short(make_prompts: MakePrompts) -> None:
    prompts = make_prompts(2, 2, 2, 2)
    stranger = make_prompts(2, 2, 2, 2, 2)[4]
    parts = [[answer(prompts[0]), answer(prompts[1])], [answer(prompts[1]), answer(prompts[2], 1), answer(stranger)]]
    with pytest.raises(RolloutError) as caught:
        merge_groups(prompts, parts, num_responses=2)
    text = str(caught.value)
    for part in ("1 missing: p3", "1 duplicated: p1", "1 never asked for: p4", "1 of the wrong size: p2 (1 of 2)"):
        assert part in text


def test_merge_refuses_an_id_whose_tokens_are_of_another_prompt(make_prompts: MakePrompts) -> None:
    prompts = make_prompts(4, 4)
    other = make_prompts(4, 4, seed=1)
    with pytest.raises(RolloutError, match="1 never asked for: p1; 1 missing: p1"):
        merge_groups(prompts, [[answer(prompts[0]), answer(other[1])]])


def test_repeated_ids_and_bad_ranks_are_refused(make_prompts: MakePrompts) -> None:
    prompts = make_prompts(2, 2)
    with pytest.raises(RolloutError, match=r"data\.prompts.*p0"):
        shard_prompts([*prompts, prompts[0]], 0, 2)
    with pytest.raises(RolloutError, match="from 0 to 1"):
        shard_prompts(prompts, 2, 2)
