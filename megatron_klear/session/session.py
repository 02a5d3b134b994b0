"""A training run from start to end on this rank: model, checkpoints, metrics, and what happens between steps."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.checkpoint import CheckpointStore, layout, load_weights
from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.checkpoint.conversion import HF_FILES
from megatron_klear.config import Entry, Settings, dump_settings
from megatron_klear.data import ChatTokenizer
from megatron_klear.errors import CheckpointError, ConfigError
from megatron_klear.model import build_qwen3, load_hf_weights, open_hf_directory
from megatron_klear.model.layer_ranges import StageRanges
from megatron_klear.model.layer_spec import describe_attention
from megatron_klear.observe import (
    Heartbeat,
    Metrics,
    Phases,
    Progress,
    StallWatch,
    append_examples,
    memory_metrics,
    open_metrics,
    utilization_metrics,
    write_report,
)
from megatron_klear.observe.names import phase_seconds
from megatron_klear.observe.replace import replace_file
from megatron_klear.session.agreement import Agreement
from megatron_klear.session.device_rates import device_rates
from megatron_klear.session.launch import Preempted, StopRequest
from megatron_klear.session.profiling import ProfileWindow
from megatron_klear.session.replaying import checkpoint_before, last_step, steps_before
from megatron_klear.session.run_lock import RunLock
from megatron_klear.trainer import Trainer, make_trainable

log = logging.getLogger(__name__)

_TITLES: dict[Entry, str] = {"sft": "SFT", "rl": "RL"}


class Session:
    """Everything a training loop needs; a context manager.

    On entry: joins the process groups, builds the model, takes its weights from the newest checkpoint, else from
    `checkpoint.start_from`, else from `model.hf_dir`, else at random, and opens metrics and progress.

    Args:
        entry: `sft` or `rl`.
        settings: the run's settings.
        stop: set when the run is asked to stop.
        chat: the tokenizer, checked already; the model's vocabulary must cover it.
        total_steps: steps of the whole run, also by the learning rate; `scheduling.replay_last_step` may end it before.
        updates_per_step: optimizer updates of a full step; the learning rate schedule counts these.

    Raises:
        ConfigError: the run directory holds a run and `run.resume` is false, or the vocabulary is too small.
        CheckpointError: checkpoints are there and none is whole, or weights do not fit.
    """

    def __init__(
        self,
        entry: Entry,
        settings: Settings,
        stop: StopRequest,
        *,
        chat: ChatTokenizer,
        total_steps: int,
        updates_per_step: int = 1,
    ) -> None:
        self.entry, self.settings, self.stop, self.chat = entry, settings, stop, chat
        self.total_steps, self.updates_per_step = total_steps, updates_per_step
        self.arch = settings.architecture
        self.root = Path(settings.run.dir)
        if chat.num_tokens > self.arch.vocab_size:
            raise ConfigError(
                [f"model.vocab_size: is {self.arch.vocab_size}, but tokenizer.dir has {chat.num_tokens} tokens"]
            )
        self.context = parallel.start(settings.parallel, device=settings.run.device, seed=settings.run.seed)
        if self.context.device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // self.context.world.size))
        self._lock: RunLock | None = None  # on the first rank
        self.is_first = self.context.world.rank == 0
        torch.manual_seed(settings.run.seed)
        self.model = build_qwen3(
            self.arch,
            settings.model,
            settings.parallel,
            self.context,
            yarn=settings.yarn.in_training(self.arch),
            fp8=settings.fp8,
        )
        checkpoints = self.root / "checkpoints"
        is_fresh = not self._prepare_directory(checkpoints)
        replayed = checkpoint_before(settings, entry, self.context) if is_fresh else None
        hf_files = self._first_weights() if is_fresh and replayed is None else None
        trainable = make_trainable(
            self.model, settings.optimizer, settings.parallel, total_updates=total_steps * updates_per_step
        )
        self.trainer = Trainer(trainable, self.arch, settings, self.context)
        self.store = CheckpointStore(
            checkpoints,
            ddp=trainable.ddp,
            optimizer=trainable.optimizer,
            schedule=trainable.schedule,
            context=self.context,
            keep=settings.checkpoint.keep,
            settings_yaml=dump_settings(settings),
        )
        self.store.hf_files = hf_files
        self.resumed = self.store.resume()
        self.step = steps_before(settings, entry) if self.resumed is None else int(self.resumed["step"])
        self.total_steps = total_steps = last_step(settings, entry, total_steps)
        if replayed is not None:
            self.store.take_over(replayed)
            if self.is_first:
                log.info("as before step %d of the recorded run: %s", self.step + 1, replayed)
        elif self.resumed is None:
            self.trainer.advance_schedule_to(self.step * updates_per_step)
        self.saved_step = self.step
        self.was_done = self.step >= total_steps
        self.phases = Phases(synchronize=torch.cuda.synchronize if self.context.device.type == "cuda" else None)
        together("open the files of the run", self._open_files, self.context)
        self.profile = ProfileWindow(settings.profile, self.root, self.context.world.rank)
        if self.profile.wanted:
            self.model.ranges = StageRanges(self.model)
        self.rates = device_rates(self.root, self.context, self.model.config.params_dtype)
        self.progress = Progress(
            _TITLES[entry],
            total_steps,
            done_steps=self.step,
            enabled=self.is_first,
            interactive=None if settings.observe.progress else False,
        )
        self.cursor: Any = None  # the entry's data cursor; its place is part of every checkpoint
        self.ledger_position: Callable[[], Any] = lambda: None  # the rollout ledger's; rank 0's is stored
        self.around_save: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.noted: dict[str, float] = {}  # metrics that come up in the middle of a step
        self.agreement: Agreement | None = None  # engine and trainer compute alike; of the newest step that shows it

    def _prepare_directory(self, checkpoints: Path) -> list[int]:
        """Make the run directory; returns the steps of the checkpoints in it, the same on every rank."""
        together("make the run directory", lambda: checkpoints.mkdir(parents=True, exist_ok=True), self.context,
                 only_first=True)  # fmt: skip
        together("see the run directory", lambda: layout.require_shared(checkpoints), self.context)
        holder = agree("lock the run directory", self._lock_directory, self.context)
        if holder:
            raise ConfigError([f"run.dir: {self.root} is in use by {holder}; wait for it, end it, or choose another"])
        steps = agree("list the checkpoints of the run", lambda: layout.finished_steps(checkpoints), self.context)
        if steps and not self.settings.run.resume:
            raise ConfigError(
                [f"run.resume: is false and {self.root} already holds checkpoints; choose another run.dir or resume"]
            )
        return steps

    def _lock_directory(self) -> str:
        self._lock = RunLock(self.root)
        return self._lock.holder

    def _open_files(self) -> None:
        if self.is_first:
            replace_file(self.root / "config.yaml", dump_settings(self.settings))
        world = self.context.world
        self.heartbeat = Heartbeat(self.root, world.rank)
        self._stall_watch = StallWatch(
            self.heartbeat,
            self.root,
            rank=world.rank,
            world_size=world.size,
            limit_seconds=self.settings.parallel.timeout_seconds,
        )
        self.metrics: Metrics = open_metrics(
            self.root,
            rank=self.context.world.rank,
            tensorboard=self.settings.observe.tensorboard,
            resume_step=None if self.resumed is None else self.step,
        )

    def _first_weights(self) -> Path | None:
        """Fill the model; returns where the config and tokenizer files that belong to the weights lie, if anywhere."""
        hf_files = None
        start_from, hf_dir = self.settings.checkpoint.start_from, self.settings.model.hf_dir
        setting = "model.hf_dir" if start_from is None else "checkpoint.start_from"
        try:
            if start_from is not None:
                hf_files = load_weights(Path(start_from), self.model, self.context) / HF_FILES
            elif hf_dir is not None:
                reader = open_hf_directory(Path(hf_dir), self.arch)
                load_hf_weights(self.model, self.arch, self.context, reader)
                hf_files = Path(hf_dir)
        except CheckpointError as error:  # nothing has begun: the setting names weights that cannot be used
            raise ConfigError([f"{setting}: {error}"]) from error
        origin = start_from or hf_dir or "random numbers (seed run.seed)"
        if self.is_first:
            log.info("first weights from %s", origin)
        return hf_files

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stall_watch.close()
        self.progress.__exit__(kind, error, trace)
        self.profile.close(self.step)
        self.metrics.close()
        if self._lock is not None:
            self._lock.release()
        if kind is None:
            parallel.stop()

    def steps(self) -> Iterator[int]:
        """Numbers of the steps still to do, counting from 1."""
        while self.step < self.total_steps:
            self.profile.begin_step(self.step + 1)
            yield self.step + 1

    def end_at(self, step: int) -> None:
        """Let a run that is resumed end where its data do.

        That is `total_steps`, unless settings were changed on the way (sft.epochs, sft.batch_sequences). The learning
        rate goes by the steps that a run with these settings has from its start.
        """
        if step == self.total_steps:
            return
        if self.is_first:
            text = "settings were changed on the way: the run ends at step %d and not at %d, so that every row is "
            log.info(text + "trained as often", step, self.total_steps)
        self.total_steps = self.progress.total_steps = step
        self.was_done = self.step >= step

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Any]:
        """A timed and shown phase of a step; yields `advance(count)`."""
        self.heartbeat.beat(self.step + 1, name)
        with self.phases.time(name), self.progress.phase(name, total) as advance:
            yield advance

    def finish_step(self, step: int, values: Mapping[str, float]) -> None:
        """End a step: log, save when due, stop when asked to.

        Raises:
            Preempted: after saving, when any rank was asked to stop.
        """
        self.heartbeat.beat(step, "finish")
        self.profile.end_step(step)
        self.step = step
        by_phase = self.phases.take()
        seconds = {phase_seconds(name): spent for name, spent in by_phase.items()}
        tokens = float(values.get("throughput/tokens", 0.0))
        busy = sum(seconds.values())  # evaluation and saving are not in it: see set_aside_phases
        used = utilization_metrics(self.trainer.take_flops(), by_phase, self.rates)
        everything = {**values, **used, **self.noted, **seconds, **memory_metrics()}
        self.noted = {}
        everything.pop("throughput/tokens", None)
        if busy > 0 and tokens:
            everything["throughput/tokens_per_second"] = tokens / busy
        self.metrics.log(step, self.entry, everything)
        self.progress.step(step, everything)
        every = self.settings.checkpoint.every_steps
        stopping = self.is_asked_to_stop()
        if step >= self.total_steps or stopping or (every and step % every == 0):
            self.save()
        if stopping and step < self.total_steps:
            raise Preempted(f"stopped after step {step} of {self.total_steps}; start again on {self.root} to resume")

    def stop_if_asked(self, before: str | None = None) -> None:
        """Stop in a step that only waits so far; the checkpoint is that of the step before.

        Args:
            before: what comes next; by default the next step.

        Raises:
            Preempted: after saving, when any rank was asked to stop.
        """
        if self.is_asked_to_stop():
            self.save()
            raise Preempted(f"stopped before {before or f'step {self.step + 1}'}; start again on {self.root} to resume")

    @contextlib.contextmanager
    def set_aside_phases(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, saving) out of the step's times and throughput."""
        step_phases = self.phases
        self.phases = Phases()
        try:
            yield
        finally:
            self.phases = step_phases

    def save(self) -> None:
        """Save a checkpoint of the current step, unless there is one."""
        if self.saved_step == self.step:
            return
        cursor = None if self.cursor is None else self.cursor.state_dict()
        with self.set_aside_phases(), self.phase("save"), self.around_save():
            self.trainer.memory.require("weights", "optimizer")
            ledger = agree("read the rollout ledger", self.ledger_position, self.context)
            state = {"entry": self.entry, "step": self.step, "cursor": cursor, "ledger": ledger}
            self.store.save(self.step, state)
        self.saved_step = self.step

    def describe(self, data: str) -> None:
        """Say on the first rank what is about to be trained, on what, and how."""
        if not self.is_first:
            return
        context, arch = self.context, self.arch
        steps = f"steps {self.step + 1} to {self.total_steps}"
        if self.was_done:
            steps = f"all {self.total_steps} steps are done already, up to step {self.step}"
        count = sum(p.numel() for p in self.model.parameters())
        log.info(
            "%s on %s: %s; %d layers, hidden %d, %s parameters on this rank; %s layers on %s",
            _TITLES[self.entry], self.root, data, arch.num_layers, arch.hidden_size, f"{count:,}",
            self.model.layer_kind, context.device,
        )  # fmt: skip
        attention = describe_attention(self.settings.model, self.model.layer_kind, context.device)
        precision = f", products in FP8 ({self.settings.fp8.recipe})" if self.settings.fp8.on else ""
        log.info("attention: %s%s", attention, precision)
        log.info(
            "%d processes: tp %d, pp %d, cp %d, dp %d; %s",
            context.world.size, context.tp.size, context.pp.size, context.cp.size, context.dp.size, steps,
        )  # fmt: skip

    def keep_examples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Add responses for people to read to the run's examples."""
        if self.is_first and rows:
            append_examples(self.root, rows)

    def restore_cursor(self, cursor: Any) -> None:
        """Hand over the entry's data cursor: it goes on from the checkpoint's place, and is saved from now on."""
        self.cursor = cursor
        if self.resumed is not None and self.resumed.get("cursor") is not None:
            cursor.load_state(self.resumed["cursor"])
        elif self.resumed is None:
            for _ in range(
                self.step
            ):  # of a replay that begins later: what the weights have learned is not drawn again
                cursor.next_batch()

    def export(self) -> None:
        """With `checkpoint.export_hf`, write the final weights as a Hugging Face directory, `hf` below the run's.

        Raises:
            CheckpointError: on every rank, when it cannot be written; the checkpoints are untouched.
        """
        if self.settings.checkpoint.export_hf:
            together("export (checkpoint.export_hf)", self._export, self.context, only_first=True)

    def _export(self) -> None:
        from megatron_klear.checkpoint.convert_to_hf import megatron_to_hf

        out, fresh = self.root / "hf", self.root / ".hf_new"
        shutil.rmtree(fresh, ignore_errors=True)
        megatron_to_hf(self.root, fresh, tokenizer=Path(self.settings.tokenizer.dir))
        shutil.rmtree(out, ignore_errors=True)  # of an earlier end of this run, before more steps were asked for
        fresh.rename(out)
        log.info("exported: %s", out)

    def write_report(self) -> None:
        """Write report.html and report.png on the first rank; a report that fails does not fail the run."""
        if not self.is_first or not self.settings.observe.report:
            return
        start_from = self.settings.checkpoint.start_from
        sft_run = Path(start_from) if start_from and (Path(start_from) / "metrics.jsonl").is_file() else None
        try:
            log.info("report: %s", write_report(self.root, sft_run))
        except Exception as error:  # drawing is the last thing a finished run does; its results are all on disk
            log.warning("no report (%s: %s); try python -m megatron_klear.observe %s",
                        type(error).__name__, error, self.root)  # fmt: skip

    def is_asked_to_stop(self) -> bool:
        """Whether any rank is; the same on all of them (a collective)."""
        told = torch.tensor([float(self.stop.received)], device=self.context.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())
