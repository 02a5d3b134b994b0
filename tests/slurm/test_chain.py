"""Fine-tuning and reinforcement learning as a chain of jobs on a real Slurm, by the commands of the README."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

SFT_STEPS, RL_STEPS = 150, 2
TWO_RANKS = {"KLEAR_RANKS_PER_NODE": "2"}


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def submit_rl_after(slurm, sft_job, arguments: list[str], folder: Path):
    options = [f"--dependency=afterok:{sft_job.number}", "--kill-on-invalid-dep=yes"]
    return slurm.submit("gppo.slurm", ["examples/quickstart_rl.yaml", *arguments], folder, options)


def test_rl_waits_for_a_requeued_sft_and_begins_from_its_last_checkpoint(slurm, sft_arguments, rl_arguments, tmp_path):
    sft_run, rl_run = tmp_path / "sft", tmp_path / "rl"
    sft = slurm.submit("sft.slurm", sft_arguments(sft_run), tmp_path, **TWO_RANKS)
    start = [f"checkpoint.start_from={sft_run}", f"rl.steps={RL_STEPS}"]
    rl = submit_rl_after(slurm, sft, [*rl_arguments(rl_run), *start], tmp_path)
    sft.until(lambda _: len(logged_steps(sft_run)) >= 5)
    sft.warn()
    sft.until(lambda f: f["Restarts"] == "1" and f["JobState"] == "PENDING")
    stopped_after = logged_steps(sft_run)[-1]
    assert stopped_after < SFT_STEPS
    # There is a checkpoint now, and both nodes are idle: nothing but the dependency holds the second job back.
    assert (sft_run / "checkpoints" / f"step_{stopped_after:08d}" / "manifest.json").is_file()
    waiting = rl.fields()
    assert (waiting["JobState"], waiting["Reason"]) == ("PENDING", "Dependency")
    sft.restarted()
    before = sft.ended()
    assert (before["JobState"], before["ExitCode"], before["Restarts"]) == ("COMPLETED", "0:0", "1"), sft.story()

    fields = rl.ended()
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), rl.story()
    assert fields["StartTime"] >= before["EndTime"], "ISO times of one clock"
    assert logged_steps(sft_run) == list(range(1, SFT_STEPS + 1))
    check = (rl_run / "logs" / f"check-{rl.number}-0.log").read_text()
    assert f"start: new, weights from {sft_run}" in check
    trained = (rl_run / "logs" / f"train-{rl.number}-0.log").read_text()
    assert f"weights from {sft_run}/checkpoints/step_{SFT_STEPS:08d}\n" in trained
    assert logged_steps(rl_run) == list(range(1, RL_STEPS + 1))


def test_an_sft_job_that_fails_cancels_the_rl_job(slurm, sft_arguments, rl_arguments, tmp_path):
    """Also where it leaves a checkpoint that RL could begin from."""
    sft_run, rl_run = tmp_path / "sft", tmp_path / "rl"
    arguments = [*sft_arguments(sft_run), "sft.steps=20000", "checkpoint.every_steps=2"]
    sft = slurm.submit("sft.slurm", arguments, tmp_path, **TWO_RANKS)
    rl = submit_rl_after(slurm, sft, [*rl_arguments(rl_run), f"checkpoint.start_from={sft_run}"], tmp_path)
    sft.until(lambda _: len(logged_steps(sft_run)) >= 5)
    torchrun = (sft_run / "logs" / f".torchrun-{sft.number}-0").read_text().strip()
    subprocess.run(["pkill", "-KILL", "--newest", "--parent", torchrun], check=True)
    fields = sft.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0"), sft.story()
    assert list((sft_run / "checkpoints").glob("step_*/manifest.json"))
    fields = rl.ended()
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), rl.story()
    assert not rl_run.exists(), "it was never started"
    assert not rl.output.exists()
