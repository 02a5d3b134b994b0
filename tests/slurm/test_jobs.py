"""tools/sft.slurm and tools/gppo.slurm on a real Slurm: what they run, what they refuse, and how they come back."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

STEPS = 150
TWO_RANKS = {"KLEAR_RANKS_PER_NODE": "2"}


def weights(run: Path) -> bytes:
    return (run / "hf" / "model.safetensors").read_bytes()


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for_steps(job, run: Path, count: int) -> None:
    job.until(
        lambda _: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= count
    )


@pytest.fixture(scope="session")
def undisturbed(slurm, sft_arguments, tmp_path_factory) -> Path:
    """A run of two ranks on one node, through `sbatch --wait`, that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = folder / "run"
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={folder}/slurm-%j.out", "tools/sft.slurm", *sft_arguments(run)],
        cwd=Path(__file__).parents[2], env=slurm.environment | TWO_RANKS, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = "\n".join(p.read_text() for p in [*folder.glob("*.out"), *run.glob("logs/*.log")])
    assert done.returncode == 0, done.stdout + done.stderr + told
    assert logged_steps(run) == list(range(1, STEPS + 1))
    return run


def test_a_job_trains_and_leaves_one_log_per_step(undisturbed):
    logs = {path.name.split("-")[0]: path.read_text() for path in (undisturbed / "logs").glob("*.log")}
    assert logs.keys() == {"job", "check", "train"}
    assert "layout: 2 ranks: tp 1, pp 1, cp 1, dp 2" in logs["check"]
    assert "2 processes" in logs["train"]
    assert logs["job"].splitlines()[-1].endswith("attempt 0: done")
    assert not list((undisturbed / "logs").glob(".*")), "notes between steps are cleared away"


def test_warned_job_saves_requeues_and_ends_with_the_same_bits(slurm, undisturbed, sft_arguments, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit("sft.slurm", sft_arguments(run), tmp_path, **TWO_RANKS)
    wait_for_steps(job, run, 5)
    job.warn()
    job.restarted()
    stopped_after = logged_steps(run)[-1]
    assert stopped_after < STEPS
    assert (run / "checkpoints" / f"step_{stopped_after:08d}" / "manifest.json").is_file()
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), job.story()
    assert logged_steps(run) == list(range(1, STEPS + 1)), "every step is logged once"
    assert {path.name for path in (run / "logs").glob("*.log")} >= {
        f"train-{job.number}-0.log",
        f"train-{job.number}-1.log",
    }
    assert f"start: resume step_{stopped_after:08d}" in (run / "logs" / f"check-{job.number}-1.log").read_text()
    assert weights(run) == weights(undisturbed)


def test_preempted_job_ends_with_the_same_bits(slurm, undisturbed, sft_arguments, tmp_path):
    """Twice: with a grace time, in which it saves and requeues itself, and without one, where Slurm requeues it."""
    run = tmp_path / "run"
    job = slurm.submit("sft.slurm", sft_arguments(run), tmp_path, ["--nodes=2"], KLEAR_RANKS_PER_NODE="1")
    wait_for_steps(job, run, 5)
    urgent = slurm.preempt()
    job.restarted()
    stopped_after = logged_steps(run)[-1]
    assert stopped_after < STEPS
    assert (run / "checkpoints" / f"step_{stopped_after:08d}" / "manifest.json").is_file()
    assert "asked to stop" in (run / "logs" / f"train-{job.number}-0.log").read_text()
    assert "stopped and saved; requeued to go on" in job.story()
    assert urgent.ended()["JobState"] == "COMPLETED"

    slurm.call("scontrol", "update", "PartitionName=tests", "GraceTime=0")
    try:
        wait_for_steps(job, run, stopped_after + 5)
        urgent = slurm.preempt()
        job.restarted(times=2)
    finally:
        slurm.call("scontrol", "update", "PartitionName=tests", "GraceTime=60")
    assert logged_steps(run)[-1] < STEPS
    assert "DUE TO PREEMPTION" in job.story()
    assert urgent.ended()["JobState"] == "COMPLETED"

    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "2"), job.story()
    assert job.story().count("requeued to go on") == 1, "Slurm itself did the second time"
    checks = [(run / "logs" / f"check-{job.number}-{attempt}.log").read_text() for attempt in (1, 2)]
    assert f"start: resume step_{stopped_after:08d}" in checks[0]
    assert "start: resume step_" in checks[1]
    assert logged_steps(run) == list(range(1, STEPS + 1)), "every step is logged once"
    assert weights(run) == weights(undisturbed)


def test_two_nodes_survive_the_failure_of_one_with_the_same_bits(slurm, undisturbed, sft_arguments, tmp_path):
    run = tmp_path / "run"
    arguments = [*sft_arguments(run), "checkpoint.every_steps=10"]
    job = slurm.submit("sft.slurm", arguments, tmp_path, ["--nodes=2"], KLEAR_RANKS_PER_NODE="1")
    wait_for_steps(job, run, 25)
    slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        job.restarted()
    finally:
        slurm.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), job.story()
    check = (run / "logs" / f"check-{job.number}-1.log").read_text()
    assert "start: resume step_" in check
    assert "layout: 2 ranks" in check
    assert logged_steps(run) == list(range(1, STEPS + 1))
    assert weights(run) == weights(undisturbed)


def test_out_of_restarts_ends_resumable(slurm, sft_arguments, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit("sft.slurm", sft_arguments(run), tmp_path, KLEAR_MAX_RESTARTS="0")
    wait_for_steps(job, run, 3)
    job.warn()
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "75:0", "0"), job.story()
    assert "KLEAR_MAX_RESTARTS" in job.story()


def test_killed_rank_fails_the_job_without_requeue(slurm, sft_arguments, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit("sft.slurm", sft_arguments(run), tmp_path, **TWO_RANKS)
    wait_for_steps(job, run, 3)
    torchrun = (run / "logs" / f".torchrun-{job.number}-0").read_text().strip()
    subprocess.run(["pkill", "-KILL", "--newest", "--parent", torchrun], check=True)
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0"), job.story()
    assert "failed; see the log" in job.story()


def test_cancelled_job_stays_cancelled(slurm, sft_arguments, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit("sft.slurm", [*sft_arguments(run), "sft.steps=20000"], tmp_path)
    wait_for_steps(job, run, 3)
    slurm.call("scancel", job.number)
    deadline = time.monotonic() + 30
    while slurm.call("squeue", "--noheader", "--jobs", job.number).strip() and time.monotonic() < deadline:
        time.sleep(0.2)
    fields = job.fields()
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), job.story()
    assert "requeued to go on" not in job.story()


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "words"),
    [
        ("sft.slurm", [], {}, ["CONFIG.yaml: the settings file must come first", "usage: sbatch"]),
        ("gppo.slurm", ["rl.steps=3"], {}, ["CONFIG.yaml: the settings file must come first", "tools/gppo.slurm"]),
        ("sft.slurm", ["nowhere.yaml"], {}, ["nowhere.yaml: cannot read the settings file"]),
        (
            "sft.slurm",
            ["examples/quickstart_sft.yaml", "optimizer.lrr=1", "parallel.tp=3"],
            TWO_RANKS,
            ["optimizer.lrr", "did you mean optimizer.lr", "the world size is 2"],
        ),
        ("gppo.slurm", ["a.yaml"], {"KLEAR_ENGINE_NODES": "1"}, ["KLEAR_ENGINE_NODES: got 1 of the job's 1 nodes"]),
        ("sft.slurm", ["a.yaml"], {"KLEAR_ENGINE_NODES": "1"}, ["KLEAR_ENGINE_NODES", "no rollouts"]),
        ("sft.slurm", ["a.yaml"], {"KLEAR_RANKS_PER_NODE": "two"}, ["KLEAR_RANKS_PER_NODE: got 'two'"]),
    ],
)
def test_bad_input_ends_with_2_and_is_not_requeued(slurm, tmp_path, script, arguments, variables, words):
    job = slurm.submit(script, arguments, tmp_path, **variables)
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), job.story()
    for word in words:
        assert word in job.story()


def test_malformed_data_ends_with_2_past_torchrun(slurm, sft_arguments, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "x"}\n')
    job = slurm.submit("sft.slurm", [*sft_arguments(tmp_path / "run"), f"data.sft=[{broken}]"], tmp_path, **TWO_RANKS)
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), job.story()
    assert "broken.jsonl:1" in job.story()
