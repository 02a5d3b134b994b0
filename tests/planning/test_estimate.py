"""Plans against figures worked out by hand, and against the count of operations that runs are accounted with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from megatron_klear.config import Settings
from megatron_klear.observe.flops import forward_flops, training_flops
from megatron_klear.planning import DEVICES, Assumptions, best_layouts, make_plan, memory
from megatron_klear.planning.estimate import step_flops
from megatron_klear.planning.memory import kv_bytes_per_token, whole_model_bytes
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


def test_an_rl_step_scores_first_and_updates_by_minibatch(settings_for: Make) -> None:
    work = workload(settings_for(entry="rl"), "rl", 8000.0)
    assert (work.sequences, work.updates, work.scored, work.longest) == (1024, 8, True, 32768)
    plan = make_plan(
        settings_for(entry="rl"), entry="rl", gpus=8, device_name="h100", assumptions=Assumptions(mean_tokens=8000.0)
    )
    sft = step_flops(plan.settings, work, backward=True) + step_flops(plan.settings, work, backward=False)
    assert plan.flops == sft


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
    # A ring over 64 ranks of 8 nodes: 50 GB/s at 80 %; float32 gradients there, bfloat16 weights back.
    assert plain.time.data == pytest.approx(63 / 64 * (4 + 2) * numel / 40e9, rel=1e-3)
    hidden = make_plan(
        settings_for("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", gpus=64),
        entry="sft", gpus=64, device_name="h100",
    )  # fmt: skip
    assert hidden.time.data < plain.time.data


def test_uneven_lengths_make_ranks_wait(settings_for: Make) -> None:
    """With one sequence per rank the longest decides; with many the mean."""
    for gpus, factor in ((128, 32768 / 10_000), (8, 1.0)):
        settings = settings_for("sft.batch_sequences=128", "packing.token_budget=32768", gpus=gpus)
        plan = make_plan(settings, entry="sft", gpus=gpus, device_name="h100")
        ideal = plan.flops.total / (gpus * 0.6 * 989.4e12)
        assert plan.time.compute == pytest.approx(factor * ideal, rel=1e-9)


def test_an_engine_in_the_training_process_takes_a_copy_and_its_cache(settings_for: Make) -> None:
    settings = settings_for("rollout.batch_responses=2", "parallel.tp=8", "parallel.sequence_parallel=true", entry="rl")
    plan = make_plan(settings, entry="rl", gpus=8, device_name="h100")
    assert plan.stages[0].engine_weights == 2 * PARAMETERS
    assert plan.stages[0].kv_cache == 2 * 32768 * 147_456
    assert make_plan(settings, entry="sft", gpus=8, device_name="h100").stages[0].engine_weights == 0.0


def test_engines_that_take_turns_find_optimizer_and_gradients_away(
    settings_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache takes what is left of the device, not more than is asked for, and never less than one response."""
    monkeypatch.setattr(memory, "is_colocated", lambda settings: True)
    shared = ("rollout.engine=sglang", "parallel.tp=4", "parallel.sequence_parallel=true", "sglang.server_tp=2")
    plan = make_plan(settings_for(*shared, entry="rl"), entry="rl", gpus=8, device_name="h100")
    stage = plan.stages[0]
    assert stage.engine_weights == PARAMETERS
    assert stage.kv_cache == pytest.approx(80e9 - stage.state.weights - PARAMETERS - stage.publish - 3e9)
    assert stage.host_while_generating == stage.state.optimizer
    assert stage.while_generating == pytest.approx(80e9)
    assert stage.while_generating <= 80e9
    few = make_plan(
        settings_for(*shared, "rollout.batch_responses=1", entry="rl"), entry="rl", gpus=8, device_name="h100"
    )
    assert few.stages[0].kv_cache == 32768 * 147_456 / 2
    assert few.stages[0].while_training == stage.while_training < stage.state.total + 70e9


def test_the_host_that_gathers_a_checkpoint_holds_the_optimizers_state(settings_for: Make) -> None:
    """Three float32 buffers, one bucket's parts and their concatenation, and this rank's share of all three."""
    plan = make_plan(settings_for(), entry="sft", gpus=8, device_name="h100")
    assert plan.stages[0].host_at_save == pytest.approx(4 * (3 + 2 + 3 / 8) * PARAMETERS, rel=1e-6)


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


def test_devices_are_what_their_data_sheets_say() -> None:
    for name, device in DEVICES.items():
        assert device.source
        assert device.flops > 0
        if device.fp8_flops is not None:
            assert device.fp8_flops == pytest.approx(2 * device.flops, rel=1e-3), name
        assert device.link_rate > device.network_rate
