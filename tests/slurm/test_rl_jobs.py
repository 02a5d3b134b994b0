"""tools/gppo.slurm on a real Slurm: reinforcement learning over the end of a job's time, and without its engines."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_klear.rollout.ledger import LedgerReader

CONFIG = "examples/quickstart_rl.yaml"
PER_STEP = 4


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_job_whose_time_is_over_goes_on_and_trains_every_prompt_once(slurm, rl_arguments, tmp_path):
    """A real limit: Slurm warns by itself, within the one minute that is the shortest it knows."""
    run, steps = tmp_path / "run", tmp_path / "steps.yaml"
    steps.write_text("rl: {steps: 100000}\n")
    limits = ["--time=1", "--signal=B:USR1@30"]
    job = slurm.submit(
        "gppo.slurm", [CONFIG, str(steps), *rl_arguments(run)], tmp_path, limits, KLEAR_RANKS_PER_NODE="2"
    )
    job.until(lambda f: f["Restarts"] == "1" and f["JobState"] == "PENDING", seconds=150.0)
    assert "told that the job is about to end" in job.story()
    assert "stopped and saved; requeued to go on" in job.story()
    stopped_after = logged_steps(run)[-1]
    assert (run / "checkpoints" / f"step_{stopped_after:08d}" / "manifest.json").is_file()

    last = stopped_after + 3  # now it may come to its end
    steps.write_text(f"rl: {{steps: {last}}}\n")
    slurm.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    job.restarted()
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), job.story()
    assert f"start: resume step_{stopped_after:08d}" in (run / "logs" / f"check-{job.number}-1.log").read_text()
    assert logged_steps(run) == list(range(1, last + 1)), "every step is logged once"
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        assert reader.states() == {"trained": last * PER_STEP}
        groups = [group for step in reader.steps() for group in reader.groups_of_step(step)]
    assert len({(group.epoch, group.prompt.prompt_id) for group in groups}) == last * PER_STEP
    rows = 48
    assert {group.epoch for group in groups} == set(range(-(-last * PER_STEP // rows)))


def test_engines_that_all_give_up_end_the_job_with_the_end_of_their_log(slurm, rl_arguments, tmp_path):
    """The trainer is the real one, and would wait half an hour for them."""
    run = tmp_path / "run"
    job = slurm.submit(
        "gppo.slurm", [CONFIG, *rl_arguments(run), "rl.steps=3"], tmp_path, ["--nodes=2"],
        KLEAR_ENGINE_NODES="1", KLEAR_ENGINE_MODEL="/models/a", KLEAR_SGLANG_VENV=str(tmp_path / "nowhere"),
    )  # fmt: skip
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0"), job.story()
    told = job.output.read_text()
    assert f"the end of {run}/logs/engines-{job.number}-0.log" in told
    assert f"KLEAR_SGLANG_VENV on n2: there is no {tmp_path}/nowhere/bin/python" in told
    assert "the engines gave up" in told
    trainer = (run / "logs" / f"train-{job.number}-0.log").read_text()
    assert "no engine is left" in trainer
    assert "stopped before step 1" in trainer, "it ends by itself"
