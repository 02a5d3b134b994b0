"""Plans against figures worked out by hand, and against the count of operations that runs are accounted with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from megatron_klear.config import Settings
from megatron_klear.observe.datasheets import datasheet_fp8_rate, datasheet_rate
from megatron_klear.observe.flops import forward_flops, training_flops
from megatron_klear.packing import attention_share, plan_packs
from megatron_klear.planning import DEVICES, Assumptions, best_layouts, make_plan, memory
from megatron_klear.planning.assumptions import assumptions_in_words
from megatron_klear.planning.estimate import step_flops
from megatron_klear.planning.evenness import scoring_evenness
from megatron_klear.planning.memory import kv_bytes_per_token, whole_model_bytes
from megatron_klear.planning.traffic import spread_rate
from megatron_klear.planning.workload import Workload, lognormal_lengths, workload

Make = Callable[..., Settings]
PARAMETERS = 8_190_735_360
"""Of Qwen3-8B, as published: 36 layers, and two matrices of 151,936 words."""


def test_an_8b_has_the_published_number_of_parameters(settings_for: Make) -> None:
    assert whole_model_bytes(settings_for()) == 2 * PARAMETERS
    assert kv_bytes_per_token(settings_for().architecture) == 2 * 36 * 8 * 128 * 2  # 147,456


def test_memory_that_stays_by_hand(settings_for: Make) -> None:
    """2 bytes of weights, 4 of gradients, and 12 of the optimizer over the ranks that share it."""
    for overrides, held, shards in (
        ((), PARAMETERS, 8),
        (("parallel.distributed_optimizer=false",), PARAMETERS, 1),
        (("parallel.cp=4",), PARAMETERS, 8),
    ):
        plan = make_plan(settings_for(*overrides), entry="sft", gpus=8, device_name="h100")
        state = plan.stages[0].state
        assert (state.weights, state.gradients) == (2 * held, 4 * held)
        assert state.optimizer == pytest.approx(12 * held / shards, rel=1e-6)
    tp2 = make_plan(settings_for("parallel.tp=2"), entry="sft", gpus=8, device_name="h100").stages[0].state
    vectors = 36 * (2 * 4096 + 2 * 128) + 4096  # norms, which every rank holds
    assert tp2.weights == 2 * ((PARAMETERS - vectors) // 2 + vectors)


def test_the_first_stage_keeps_the_most_microbatches_and_the_last_holds_the_head(settings_for: Make) -> None:
    settings = settings_for("parallel.pp=4", "parallel.tp=2", "parallel.sequence_parallel=true")
    plan = make_plan(settings, entry="sft", gpus=8, device_name="h100")
    assert [stage.in_flight for stage in plan.stages] == [4, 3, 2, 1]
    assert [stage.head_chunk > 0 for stage in plan.stages] == [False, False, False, True]
    assert plan.stages[0].activations > 3.9 * plan.stages[3].activations * 0.9
    assert plan.bubble_share == 3 / (plan.microbatches + 3)


def test_a_step_counts_the_operations_that_runs_are_accounted_with(settings_for: Make) -> None:
    settings = settings_for()
    lengths = [1000, 7000, 32768, 12]
    mean, square = sum(lengths) / 4, sum(n * n for n in lengths) / 4
    work = Workload(sequences=4, mean_tokens=mean, mean_square=square, updates=1, scored=False, longest=32768)
    for backward, exact in ((True, training_flops), (False, forward_flops)):
        planned, counted = step_flops(settings, work, backward=backward), exact(settings.architecture, lengths)
        for part in ("projections", "attention", "head"):
            assert getattr(planned, part) == pytest.approx(getattr(counted, part), rel=1e-12)


def test_lengths_have_the_mean_that_was_asked_for_and_end_at_the_longest() -> None:
    for mean in (200.0, 10_000.0, 30_000.0):
        lengths = lognormal_lengths(mean, 32768)
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=1e-6)
        assert max(lengths) <= 32768
    assert max(lognormal_lengths(10_000.0, 32768)) == 32768
    assert lognormal_lengths(64.0, 64) == pytest.approx([64.0] * 512)


def test_the_longest_sequence_is_one_that_a_run_can_train_on(settings_for: Make) -> None:
    """Positions are the model's, and YaRN's 2.5 times as many where it is trained with; the budget bounds them."""
    shared = ("packing.token_budget=98304", "model.max_position_embeddings=32768")
    yarn = (*shared, "yarn.factor=2.5", "yarn.original_positions=32768")
    longest = [
        workload(settings_for(*overrides), "sft").longest
        for overrides in (shared, yarn, (*yarn, "yarn.apply_to=everything"))
    ]
    assert longest == [32768, 32768, 81920]
    bounded = settings_for(*yarn, "yarn.apply_to=everything", "packing.token_budget=65536")
    assert workload(bounded, "sft").longest == 65536


def test_an_rl_step_scores_first_and_updates_by_minibatch(settings_for: Make) -> None:
    work = workload(settings_for(entry="rl"), "rl", 8000.0)
    assert (work.sequences, work.updates, work.scored, work.longest) == (1024, 8, True, 32768)
    plan = make_plan(
        settings_for(entry="rl"), entry="rl", gpus=8, device_name="h100", assumptions=Assumptions(mean_tokens=8000.0)
    )
    sft = step_flops(plan.settings, work, backward=True) + step_flops(plan.settings, work, backward=False)
    assert plan.flops == sft


def test_the_scoring_pass_waits_for_its_own_slowest_rank(settings_for: Make) -> None:
    """128 sequences of an update are two for each of 64 ranks; the 1,024 of the step, packed at once, are sixteen."""
    plan = make_plan(settings_for(entry="rl", gpus=64), entry="rl", gpus=64, device_name="h100")
    assert plan.scoring is not None
    assert plan.even.slowest > 1.1
    assert 1.0 < plan.scoring.slowest < 1.02
    trained, scored = (step_flops(plan.settings, plan.work, backward=backward).total for backward in (True, False))
    by_hand = (trained * plan.even.slowest + scored * plan.scoring.slowest) / (64 * 0.6 * 989.4e12)
    assert plan.time.compute == pytest.approx(by_hand, rel=1e-12)
    assert plan.flops.total == pytest.approx(trained + scored, rel=1e-12)
    # Fewer and fuller microbatches than those of eight updates together.
    assert plan.scoring.microbatches < 8 * plan.even.microbatches
    assert plan.scoring.slots_used > plan.even.slots_used
    assert any("old logprobs are computed over the whole step at once" in line for line in assumptions_in_words(plan))
    sft = make_plan(settings_for(), entry="sft", gpus=8, device_name="h100")
    assert sft.scoring is None


def test_the_whole_step_is_packed_as_the_trainer_packs_it(settings_for: Make) -> None:
    """By brute force over drawn lengths: each rank's cost summed sequence by sequence."""
    settings = settings_for(entry="rl")
    work = workload(settings, "rl")
    found = scoring_evenness(settings, work, 8)
    share = attention_share(settings.architecture)
    quantiles = np.array(lognormal_lengths(round(work.mean_tokens, 3), work.longest))
    drawn = np.maximum(1, np.random.default_rng(0).choice(quantiles, size=6 * 1024)).astype(np.int64)
    slowest, counts = [], []
    for step in range(6):
        lengths = drawn[1024 * step : 1024 * (step + 1)].tolist()
        packed = plan_packs(lengths, token_budget=32768, dp_size=8, multiple=1, share=share)
        cost = []
        for rank in packed.microbatches:
            assert all(sum(lengths[i] for i in members) <= 32768 for members in rank)
            cost.append(sum(lengths[i] + share * lengths[i] ** 2 for members in rank for i in members))
        slowest.append(max(cost) / (sum(cost) / 8))
        counts.append(packed.num_microbatches)
    assert found.slowest == pytest.approx(np.mean(slowest), rel=1e-9)
    assert found.microbatches == np.mean(counts)


def test_a_pipeline_is_filled_for_each_update_and_once_to_score(settings_for: Make) -> None:
    settings = settings_for("parallel.pp=4", "parallel.tp=2", "parallel.sequence_parallel=true", entry="rl")
    plan = make_plan(settings, entry="rl", gpus=8, device_name="h100")
    alone = make_plan(settings, entry="sft", gpus=8, device_name="h100")
    assert alone.scoring is None
    assert plan.scoring is not None
    updates, scored = 8, plan.scoring.whole_microbatches
    hidden = 32768 * 4096 * 2 / 2  # what a ring of two sends of a microbatch's hidden states
    # Nine layers of a stage gather and scatter twice each, forward; the last stage's head gathers once more.
    per_microbatch = 9 * 2 * hidden * 2
    trained = 9 * 2 * hidden * (2 + 3) * updates * plan.microbatches
    ends = max(
        hidden * (2 * updates * plan.microbatches + scored),  # embedding: forward and backward, and to score
        hidden * (3 * updates * plan.microbatches + scored),
    )  # head: its gradient is summed in float32
    assert plan.traffic.tensor == pytest.approx(trained + scored * per_microbatch + ends)
    between = 32768 / 2 * 4096 * 2
    # The stages between send hidden states forward and gradients back, and forward only when they score.
    assert plan.traffic.pipeline == pytest.approx(between * (2 * updates * plan.microbatches + scored))
    rate = 0.6 * 989.4e12 * 8
    seconds = []
    for backward, even, count, fills in ((True, plan.even, plan.microbatches * updates, updates),
                                         (False, plan.scoring, scored, 1)):  # fmt: skip
        flops = step_flops(settings, plan.work, backward=backward)
        compute = (flops.projections + flops.attention + 4 * flops.head) * even.slowest / rate
        tensor = count * (9 * 2 * hidden * (5 if backward else 2) + hidden * (3 if backward else 1)) / (450e9 * 0.8)
        pipeline = count * between * (2 if backward else 1) / (450e9 * 0.8)
        seconds.append(3 * fills * (compute + tensor + pipeline) / count)
    assert plan.time.bubble == pytest.approx(sum(seconds), rel=1e-9)


def test_time_by_hand_where_nothing_is_sent(settings_for: Make) -> None:
    """One rank, full recomputation: products once, layers once more, and the optimizer's 30 bytes a number."""
    settings = settings_for("model.recompute=full", "model.num_layers=null", "sft.batch_sequences=4", gpus=1)
    assumed = Assumptions(efficiency=0.5, link_efficiency=1.0, mean_tokens=32768.0)
    plan = make_plan(settings, entry="sft", gpus=1, device_name="h200", assumptions=assumed)
    layers = forward_flops(settings.architecture, [32768] * 4)
    speed = 0.5 * 989.4e12
    assert plan.time.compute == pytest.approx(training_flops(settings.architecture, [32768] * 4).total / speed)
    assert plan.time.again == pytest.approx((layers.projections + layers.attention) / speed)
    assert plan.time.optimizer == pytest.approx(30 * PARAMETERS / 4.8e12)
    for part in ("bubble", "tensor", "context", "pipeline", "data", "publish"):
        assert getattr(plan.time, part) == 0.0
    assert plan.mfu == pytest.approx(0.5 * plan.time.compute / plan.time.total)


def test_overlap_hides_what_the_backward_pass_is_long_enough_for(settings_for: Make) -> None:
    plain = make_plan(settings_for(gpus=64), entry="sft", gpus=64, device_name="h100")
    numel = PARAMETERS
    # A ring over 64 ranks of 8 nodes: 8 adapters of 50 GB/s at 80 %; float32 gradients there, bfloat16 weights back.
    assert plain.time.data == pytest.approx(63 / 64 * (4 + 2) * numel / 320e9, rel=1e-3)
    hidden = make_plan(
        settings_for("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", gpus=64),
        entry="sft", gpus=64, device_name="h100",
    )  # fmt: skip
    assert hidden.time.data < plain.time.data


@pytest.mark.parametrize(("tp", "adapters"), [(2, 4), (8, 1)])
def test_a_data_parallel_group_crosses_nodes_over_the_adapters_of_its_ranks(
    settings_for: Make, tp: int, adapters: int
) -> None:
    """64 ranks, tensor parallel: 64 / tp of them share a part of the weights, and 8 / tp of those are in a node."""
    settings = settings_for(f"parallel.tp={tp}", "parallel.sequence_parallel=true", "parallel.cp=2", gpus=64)
    plan = make_plan(settings, entry="sft", gpus=64, device_name="h100")
    group, vectors = 64 // tp, 36 * (2 * 4096 + 2 * 128) + 4096
    held = (PARAMETERS - vectors) / tp + vectors
    by_hand = (group - 1) / group * (4 + 2) * held / (adapters * 50e9 * 0.8)
    assert plan.time.data == pytest.approx(by_hand, rel=1e-3)
    (told,) = (line for line in assumptions_in_words(plan) if "(NCCL's rings, not measured)" in line)
    assert f"over {adapters} adapter" in told


def test_no_ring_is_quicker_than_a_nodes_own_links() -> None:
    """Eight adapters of 50 GB/s are 400 GB/s, under NVLink 4's 450; of a B200 they are under its 900; A100: 8 x 25."""
    rates = {name: spread_rate(DEVICES[name], 64, 1) for name in ("h100", "b200", "a100")}
    assert rates == {"h100": 400e9, "b200": 400e9, "a100": 200e9}
    fast = dataclasses.replace(DEVICES["h100"], network_rate=100e9)
    assert spread_rate(fast, 64, 1) == 450e9
    assert spread_rate(fast, 64, 16) == 100e9
    assert spread_rate(fast, 8, 1) == 450e9


def test_the_last_stage_has_the_head_and_the_others_wait_for_it(settings_for: Make) -> None:
    settings = settings_for("parallel.pp=4", "parallel.tp=2", "parallel.sequence_parallel=true")
    plan = make_plan(settings, entry="sft", gpus=8, device_name="h100")
    last = (plan.flops.projections + plan.flops.attention) / 4 + plan.flops.head
    # Two tensor parallel ranks share the stage, and there is one data-parallel rank, which waits for no other.
    assert plan.time.compute == pytest.approx(last / (2 * 0.6 * 989.4e12))


def test_uneven_lengths_make_ranks_wait(settings_for: Make) -> None:
    """With one sequence per rank the costliest decides; with many the mean; bins are even with few ranks, too."""
    slowest = {}
    for gpus in (128, 8):
        settings = settings_for("sft.batch_sequences=128", "packing.token_budget=32768", gpus=gpus)
        plan = make_plan(settings, entry="sft", gpus=gpus, device_name="h100")
        ideal = plan.flops.total / (gpus * 0.6 * 989.4e12)
        slowest[gpus] = plan.time.compute / ideal
        assert slowest[gpus] == pytest.approx(plan.even.slowest, rel=1e-12)
    share = attention_share(settings.architecture)
    work = workload(settings, "sft")
    mean = work.mean_tokens + share * work.mean_square
    # The costliest of 128 is nearly always one at the cut; drawn lengths have a mean of their own, hence the 15 %.
    assert slowest[128] == pytest.approx(32768 * (1 + share * 32768) / mean, rel=0.15)
    assert slowest[8] < 1.01
    bins = settings_for("sft.batch_bins=128", "packing.token_budget=32768", gpus=32)
    even = make_plan(bins, entry="sft", gpus=32, device_name="h100").even
    assert even.microbatches == 4
    assert even.slowest < 1.01
    assert even.slots_used > 0.98


def test_a_step_of_bins_has_the_sequences_that_fill_them(settings_for: Make) -> None:
    """Bins of an epoch that are packed here anew, first fit with the longest first: nearly full, and so the step."""
    settings = settings_for("sft.batch_bins=128", "packing.token_budget=32768", gpus=32)
    plan = make_plan(settings, entry="sft", gpus=32, device_name="h100")
    mean = 10_000.0
    drawn = np.random.default_rng(0).choice(np.array(lognormal_lengths(mean, 32768)), size=6 * 419)
    room: list[int] = []
    for length in sorted((32 * -(-int(n) // 32) for n in drawn), reverse=True):
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            room.append(32768 - length)
        else:
            room[place] -= length
    full = [left for left in room if left < 0.05 * 32768]  # the others are left for an epoch's last step
    assert len(full) >= 5 * 128
    slots = 1 - sum(full) / len(full) / 32768
    assert slots > 0.99
    # Padding to 32 costs 16 of a sequence's 10,000 tokens, and bins may be chosen otherwise than here.
    assert plan.work.sequences == pytest.approx(128 * 32768 * (slots - 0.0016) / mean, abs=1.0)
    assert plan.work.tokens / (128 * 32768) == pytest.approx(plan.even.slots_used, abs=0.5 * mean / (128 * 32768))
    # One sequence to a bin, and no room for another.
    whole = make_plan(settings, entry="sft", gpus=32, device_name="h100", assumptions=Assumptions(mean_tokens=32768.0))
    assert whole.work.sequences == 128


LAYER = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288
"""Numbers in the four matrices of a layer of the 8B."""


def test_fp8_takes_copies_of_weights_and_shortens_products_only(settings_for: Make) -> None:
    """By hand: half of the layers' products at 1,979 x 0.5 in place of 989 x 0.6 TFLOP/s, two bytes more per weight."""
    shared = ("parallel.distributed_optimizer=true", "parallel.tp=2", "parallel.sequence_parallel=true")
    plain = make_plan(settings_for(*shared), entry="sft", gpus=8, device_name="h100")
    fp8 = ("fp8.recipe=tensorwise", "fp8.first_layers_bf16=10", "fp8.last_layers_bf16=8")
    half = make_plan(settings_for(*shared, *fp8), entry="sft", gpus=8, device_name="h100")
    assert half.stages[0].fp8_copies == 18 * 2 * LAYER / 2  # two ranks share a layer
    # Of the two norms' results (a rank has half of the tokens) and of gate x up, one byte a number in place of two.
    saved_bytes = 18 * 32768 * (2 * 4096 / 2 + 12288 / 2)
    assert plain.stages[0].activations - half.stages[0].activations == saved_bytes
    products = plain.flops.projections / (8 * 0.6 * 989.4e12) * plain.even.slowest
    saved = 0.5 * products * (1 - 0.6 * 989.4 / (0.5 * 1978.9))
    assert plain.time.compute - half.time.compute == pytest.approx(saved, rel=1e-9)
    assert any(
        "no run has shown any of it yet" in line and "in memory along rows and along columns" in line
        for line in assumptions_in_words(half)
    )


@pytest.mark.parametrize(("device", "copies"), [("h100", 1), ("b200", 0)])
def test_weights_stored_in_fp8_are_half_as_many_bytes_and_are_gathered_so(
    settings_for: Make, device: str, copies: int
) -> None:
    shared = ("fp8.recipe=tensorwise", "fp8.first_layers_bf16=10", "fp8.last_layers_bf16=8")
    cast, stored = (
        make_plan(settings_for(*shared, *more), entry="sft", gpus=8, device_name=device)
        for more in ((), ("fp8.parameters=true",))
    )
    assert cast.stages[0].state.weights - stored.stages[0].state.weights == 18 * LAYER
    assert cast.stages[0].fp8_copies == 18 * LAYER * (copies + 1)
    assert stored.stages[0].fp8_copies == 18 * LAYER * copies
    # Eight ranks gather 7/8 of what is gathered; the largest values of 18 x 4 weights are reduced before.
    fewer = 7 / 8 * (18 * LAYER - 2 * 4 * 18 * 4)
    assert cast.traffic.data - stored.traffic.data == fewer
    rate = {"h100": 450e9, "b200": 900e9}[device] * 0.8
    assert cast.time.data - stored.time.data == pytest.approx(fewer / rate, rel=1e-9)


def test_an_engine_in_the_training_process_takes_a_copy_and_its_cache(settings_for: Make) -> None:
    settings = settings_for("rollout.batch_responses=2", "parallel.tp=8", "parallel.sequence_parallel=true", entry="rl")
    plan = make_plan(settings, entry="rl", gpus=8, device_name="h100")
    assert plan.stages[0].engine_weights == 2 * PARAMETERS
    assert plan.stages[0].kv_cache == 2 * 32768 * 147_456
    assert make_plan(settings, entry="sft", gpus=8, device_name="h100").stages[0].engine_weights == 0.0


def test_engines_that_take_turns_find_optimizer_and_gradients_away(
    settings_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache takes a share of what is left of the device, not more than is asked for, never less than one response.

    SGLang finds free what neither the trainer's weights, its 3 GB and buckets nor its own 3 GB take, and leaves 14/80.
    """
    monkeypatch.setattr(memory, "is_colocated", lambda settings: True)
    shared = ("rollout.engine=sglang", "parallel.tp=4", "parallel.sequence_parallel=true", "sglang.server_tp=2")
    plan = make_plan(settings_for(*shared, entry="rl"), entry="rl", gpus=8, device_name="h100")
    stage = plan.stages[0]
    assert stage.engine_weights == PARAMETERS
    per_token = 147_456 / 2
    free = 80e9 - stage.state.weights - stage.publish - 3e9 - 3e9
    assert stage.kv_tokens == int((66 / 80 * free - PARAMETERS) / per_token)
    assert stage.kv_cache == stage.kv_tokens * per_token
    assert stage.host_while_generating == stage.state.optimizer
    assert stage.while_generating == pytest.approx(80e9 - 14 / 80 * free, abs=per_token)
    away = make_plan(settings_for(*shared, entry="sft"), entry="sft", gpus=8, device_name="h100").stages[0]
    assert stage.while_training - away.while_training == pytest.approx(1e9)  # of the server's process
    few = make_plan(
        settings_for(*shared, "rollout.batch_responses=1", entry="rl"), entry="rl", gpus=8, device_name="h100"
    )
    assert few.stages[0].kv_cache == 32768 * 147_456 / 2
    assert few.stages[0].while_training == stage.while_training < stage.state.total + 70e9


def test_an_engine_that_takes_turns_has_the_memory_that_sglang_is_given(
    settings_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: half of what is free, a number of tokens, and layers' matrices as bytes in place of two."""
    monkeypatch.setattr(memory, "is_colocated", lambda settings: True)
    shared = ("rollout.engine=sglang", "parallel.tp=4", "parallel.sequence_parallel=true", "sglang.server_tp=2")

    def stage(*more: str) -> memory.StageMemory:
        settings = settings_for(*shared, *more, entry="rl")
        return make_plan(settings, entry="rl", gpus=8, device_name="h100").stages[0]

    half = stage("sglang.memory_fraction=0.5")
    free = 80e9 - half.state.weights - half.publish - 6e9
    assert half.kv_tokens == int((free / 2 - PARAMETERS) / (147_456 / 2))
    few = stage("sglang.max_total_tokens=50000")
    assert (few.kv_tokens, few.kv_cache) == (50_000, 50_000 * 147_456 / 2)
    assert stage("sglang.max_total_tokens=100").kv_tokens == 100
    fp8 = stage("sglang.quantization=fp8", "weight_sync.verify=checksum_or_logprobs")
    assert fp8.engine_weights == PARAMETERS - 36 * LAYER / 2
    default = stage()
    # Half of 36 layers' bytes (two GPUs share them) are tokens of the cache then.
    assert fp8.kv_tokens - default.kv_tokens == pytest.approx(36 * LAYER / 147_456, abs=1)
    wide = stage("sglang.dtype=float32", "sglang.memory_fraction=0.9")
    assert wide.engine_weights == 2 * PARAMETERS
    assert wide.kv_cache == wide.kv_tokens * 147_456


def test_the_host_that_gathers_a_checkpoint_holds_the_optimizers_state(settings_for: Make) -> None:
    """Three float32 buffers, one bucket's parts and their concatenation, and this rank's share of all three."""
    plan = make_plan(settings_for(), entry="sft", gpus=8, device_name="h100")
    assert plan.stages[0].host_at_save == pytest.approx(4 * (3 + 2 + 3 / 8) * PARAMETERS, rel=1e-6)


@pytest.mark.parametrize(
    ("gpus", "layout", "nodes"),
    [
        (8, ("parallel.tp=2", "parallel.cp=4"), [[0, 0]]),  # ranks 0 and 1
        (8, ("parallel.tp=2", "parallel.pp=2"), [[0, 0, 1, 1]]),  # 0 and 1, 4 and 5
        (32, ("parallel.tp=2", "parallel.pp=2"), [[0, 0], [1, 1]]),  # 0 and 1, 16 and 17
        (32, ("parallel.tp=8", "parallel.pp=4"), [[0] * 8, [1] * 8, [2] * 8, [3] * 8]),
        (16, ("parallel.tp=2", "parallel.pp=4"), [[0, 0, 1, 1], [2, 2, 3, 3]]),  # of 0, 4, 8 and 12 on
    ],
)
def test_a_nodes_host_holds_what_all_of_its_ranks_gather(
    settings_for: Make, gpus: int, layout: tuple[str, ...], nodes: list[list[int]]
) -> None:
    """The stages that the ranks which gather belong to, node by node."""
    settings = settings_for(*layout, "parallel.sequence_parallel=true", gpus=gpus)
    plan = make_plan(settings, entry="sft", gpus=gpus, device_name="h100")
    by_hand = max(sum(plan.stages[stage].host_at_save for stage in stages) for stages in nodes)
    assert plan.host_at_save_of_a_node == pytest.approx(by_hand, rel=1e-12)


def test_what_a_plan_takes_for_granted_without_being_asked_is_told(settings_for: Make) -> None:
    def told(*overrides: str, device: str = "h100", **assumed: float) -> str:
        settings = settings_for("packing.token_budget=16384", *overrides)
        assumptions = Assumptions(mean_tokens=assumed.get("mean"))
        plan = make_plan(settings, entry="sft", gpus=8, device_name=device, assumptions=assumptions)
        return "\n".join(assumptions_in_words(plan))

    assert "--mean-tokens 20,000 is more than the longest sequence has, so that all have 16,384" in told(mean=20_000.0)
    assert "--mean-tokens 20,000" not in told(mean=16_384.0)
    assert "a device has the 80 x 10^9 bytes of its name, which is conservative" in told()
    assert "bytes of its name" not in told(device="cpu")
    assert "MFU is a share of the bfloat16 rate" in told("fp8.recipe=tensorwise")
    assert "MFU is a share of" not in told()


def test_the_search_is_sorted_fits_and_passes_the_checks(settings_for: Make) -> None:
    settings = settings_for(gpus=16)
    found = best_layouts(settings, entry="sft", gpus=16, device_name="h100")
    times = [round(candidate.plan.time.total, 6) for candidate in found]
    assert times == sorted(times)
    assert all(candidate.plan.fits for candidate in found)
    sizes = {(c.parallel.tp, c.parallel.pp, c.parallel.cp, c.plan.dp) for c in found}
    assert all(tp * pp * cp * dp == 16 and 36 % pp == 0 and 8 % tp == 0 for tp, pp, cp, dp in sizes)
    assert len(sizes) > 8
    assert best_layouts(settings, entry="sft", gpus=16, device_name="a100")
    small = dataclasses.replace(settings.model, num_layers=720)
    assert best_layouts(dataclasses.replace(settings, model=small), entry="sft", gpus=1, device_name="h100") == []


def test_plans_and_runs_have_the_same_rates() -> None:
    """By the names that drivers give these devices."""
    names = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200",
             "a100": "NVIDIA A100-SXM4-80GB"}  # fmt: skip
    assert {*names, "cpu"} == set(DEVICES)
    for device, name in names.items():
        assert DEVICES[device].flops == datasheet_rate(name)
        assert DEVICES[device].fp8_flops == datasheet_fp8_rate(name)


def test_devices_are_what_their_data_sheets_say() -> None:
    for name, device in DEVICES.items():
        assert device.source
        assert device.flops > 0
        if device.fp8_flops is not None:
            assert device.fp8_flops == pytest.approx(2 * device.flops, rel=1e-3), name
        assert device.link_rate > device.network_rate
