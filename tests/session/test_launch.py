"""Who says what when an entry fails, and with which exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megatron_klear.config import RunSettings, Settings, TokenizerSettings
from megatron_klear.errors import CheckpointError, ConfigError, DataError, RolloutError, TrainingError
from megatron_klear.session import launch


@pytest.fixture
def status(tmp_path, monkeypatch, capsys):
    """Exit status of an entry whose body raises, and what this rank printed."""
    settings = Settings(run=RunSettings(dir=str(tmp_path)), tokenizer=TokenizerSettings(dir="tokenizer"))
    monkeypatch.setattr(launch, "parse_command_line", lambda argv, entry, more_outlook: settings)
    monkeypatch.setattr(launch, "StopRequest", object)  # it would take the signals of the test run

    def call(error: BaseException | None, rank: int = 0, local_rank: int = 0) -> tuple[int, str]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

        def body(settings, stop):
            if error is not None:
                raise error

        return launch.run_entry("sft", body, []), capsys.readouterr().err

    return call


def test_exit_statuses(status):
    assert status(None) == (0, "")
    assert status(launch.Preempted("asked to stop")) == (75, "asked to stop\n")
    assert status(CheckpointError("no space")) == (1, "no space\n")
    assert status(DataError("a.jsonl:3")) == (2, "a.jsonl:3\n")
    code, text = status(ConfigError(["run.dir: no"]))
    assert code == 2
    assert "run.dir: no" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_request_to_stop_is_noted_and_answered(capfd, monkeypatch, number):
    monkeypatch.setenv("RANK", "0")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = launch.StopRequest()
        assert not stop.received
        signal.raise_signal(number)
        assert stop.received
        signal.raise_signal(signal.SIGTERM)  # changes nothing
        assert capfd.readouterr().err.count("saving after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_interrupted_at_once_can_be_resumed(status):
    code, text = status(KeyboardInterrupt())
    assert code == 75
    assert "newest checkpoint" in text
    assert "Traceback" not in text


def test_a_mistake_of_the_program_shows_its_trace(status):
    code, text = status(ZeroDivisionError("by zero"))
    assert code == 1
    assert "Traceback" in text


@pytest.mark.parametrize("error", [CheckpointError("the same"), TrainingError("the same")])
def test_what_all_ranks_meet_alike_is_said_once(status, error):
    assert status(error, rank=1, local_rank=1)[1] == ""
    assert status(error, rank=8, local_rank=0)[1] == ""


def test_wrong_input_is_said_once_per_machine(status):
    assert status(DataError("gone"), rank=9, local_rank=1) == (2, "")
    assert status(DataError("gone"), rank=8, local_rank=0) == (2, "[rank 8] gone\n")


def test_what_one_rank_alone_meets_it_says_itself(status):
    assert status(RolloutError("stuck"), rank=9, local_rank=1) == (1, "[rank 9] stuck\n")


def test_on_a_cpu_no_compiler_is_imported() -> None:
    script = (
        "import sys; from megatron_klear.session import launch; launch._leave_the_compiler_out('auto')\n"
        "import megatron_klear.trainer, megatron_klear.session.session\n"
        "assert 'megatron.core.fusions.fused_bias_swiglu' in sys.modules\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
