"""The frame around an entry: arguments before torch, one clear message for every failure, the exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from megatron_klear.config import Entry, Settings, parse_command_line
from megatron_klear.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    CheckpointError,
    ConfigError,
    DataError,
    KlearError,
    TrainingError,
)
from megatron_klear.observe import note_failure, whereabouts
from megatron_klear.session.resuming import changes_at_resume

log = logging.getLogger(__name__)

_SHOWN_RANKS = 16
_MOST_FILES = 2**20

STATUS_FILE = "KLEAR_STATUS_FILE"
"""Environment variable: a file that rank 0 writes its exit status to. torchrun turns every status but 0 into 1; whoever
starts the run through it, such as a job script, learns here whether a run was refused, failed or can be resumed."""


class Preempted(Exception):
    """The run was asked to stop, has saved, and can be resumed."""


class StopRequest:
    """Remembers SIGTERM and SIGINT until the end of the step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            os.write(
                2,
                b"asked to stop: saving after this step, whose responses are not waited for, then leaving (Ctrl-C: at "
                b"once, without saving)\n",
            )
        self.received = True


def run_entry(
    entry: Entry,
    body: Callable[[Settings, StopRequest], None],
    argv: Sequence[str] | None = None,
    more_outlook: Callable[[Settings, int], str] | None = None,
) -> int:
    """Parse the command line, run the entry's body, and return the exit status.

    Settings are judged before `body` imports torch. The status also goes to the file named by `KLEAR_STATUS_FILE`, if
    any; a rank that is killed leaves no status there. Of errors made for people only the message is shown, by the first
    rank (of a machine, where machines may differ) when all ranks meet the same one.

    Args:
        entry: which entry runs.
        body: does the work; imports what it needs itself.
        argv: arguments; by default the process's.
        more_outlook: further lines for `--check`, of settings and number of ranks; no torch.

    Returns:
        0 done, 1 failed, 2 bad input, 75 stopped early and resumable.
    """
    try:
        status = _run(entry, body, sys.argv[1:] if argv is None else argv, more_outlook)
    except SystemExit as leaving:
        note_status(int(leaving.code or 0))
        raise
    note_status(status)
    return status


def status_of(error: BaseException) -> int:
    """The exit status of an entry that ends with this error."""
    if isinstance(error, KlearError):
        return error.exit_status
    return EXIT_RESUMABLE if isinstance(error, Preempted | KeyboardInterrupt) else EXIT_FAILED


def note_status(status: int) -> None:
    """Write rank 0's exit status to the file that was asked for; a full disk changes nothing about the run."""
    file = os.environ.get(STATUS_FILE)
    if file and os.environ.get("RANK", "0") == "0":
        try:
            Path(file).write_text(f"{status}\n")
        except OSError as error:
            print(f"{STATUS_FILE}={file}: {error.strerror or error}", file=sys.stderr)


def _run(
    entry: Entry,
    body: Callable[[Settings, StopRequest], None],
    argv: Sequence[str],
    more_outlook: Callable[[Settings, int], str] | None,
) -> int:
    settings = parse_command_line(argv, entry, more_outlook=more_outlook)
    rank = int(os.environ.get("RANK", "0"))
    # Megatron warns on import of every optional package that is not there; none of it is news to the user.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(ShardedTensor|_tensor|deprecat).*")
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    for noisy in ("megatron.core", "torch", "transformers", "matplotlib", "httpx2", "httpcore2"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    stop = StopRequest()
    try:
        _leave_the_compiler_out(settings.run.device)
        _raise_file_limit()
        for change in changes_at_resume(settings, entry):
            log.info("the run goes on with another %s", change)
        body(settings, stop)
    except Preempted as news:
        if rank == 0:
            print(f"{news}", file=sys.stderr)
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; start again to go on from the newest checkpoint, if there is one", file=sys.stderr)
        return EXIT_RESUMABLE
    except KlearError as error:
        # Failed checkpoints and diverged numbers are met by all ranks alike, wrong input by all of a machine; what one
        # rank alone meets, it must say itself.
        shared = isinstance(error, CheckpointError | TrainingError)
        shared_here = isinstance(error, ConfigError | DataError) and os.environ.get("LOCAL_RANK") != "0"
        if rank == 0 or not (shared or shared_here):
            print(f"[rank {rank}] {error}" if rank else str(error), file=sys.stderr)
        return error.exit_status
    except Exception:
        # Whatever went wrong here, the others may be waiting for: say where each of them was last seen.
        traceback.print_exc()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1:
            note_failure(settings.run.dir, rank)
            lines = whereabouts(settings.run.dir, world_size)[:_SHOWN_RANKS]
            print("\n".join([f"[rank {rank}] failed; where the ranks were last seen:", *lines]), file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _leave_the_compiler_out(device: str) -> None:
    """Keep torch's compiler from being imported where nothing is compiled: on a CPU.

    Megatron-Core decorates functions with `torch.compile` as it is imported, of which a run on a CPU calls none (the
    fusions are off there). The compiler costs every rank 1.4 s at its start, and 45 MB. Servers that a rank starts do
    not inherit this (`rollout/sglang/command.py`).
    """
    if device == "cuda":
        return
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _raise_file_limit() -> None:
    """As many open files as the system allows: each response in flight is a connection of the first rank.

    The usual soft limit is 1,024, for programs that use `select`; engines would seem to be gone beyond it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Not beyond: a container's limit may be 10^9, and there are programs that close as many when they start another.
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a sandbox may refuse what it names
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leave(status: int) -> None:
    """End the process with this status without waiting for threads of libraries that cannot be joined."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
