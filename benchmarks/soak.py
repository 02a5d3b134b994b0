"""An asynchronous run with real SGLang servers on two cores, while engines, trainer and disk fail at random.

    python benchmarks/soak.py --minutes 30 [--kills 20] [--seed 0] [--servers 1] [--work DIR] [--venv .venv-sglang]
    python benchmarks/soak.py --transport distributed [...]
    python benchmarks/soak.py --fixed-order --minutes 10 [...]

Two trainer ranks train a tiny model from what the rollout manager draws, with partial rollouts. Meanwhile, at random
moments decided by the seed: processes of a server are killed with SIGKILL; one or both trainer ranks are; a server is
stopped (SIGSTOP) for longer than `scheduling.stall_seconds` and goes on (SIGCONT); all packets to and from a server's
port are dropped for as long (iptables, where there is root to use it), so that its connections time out while it lives;
or the disk is full for a life of the trainer: `run.dir` is then on a small tmpfs that runs out of space, or, where
there is no root to mount one, files may not grow beyond a small size (RLIMIT_FSIZE). A trainer that has ended is
started again. A server counts as killed where the signal met a living process; what became of each stands in the
result. In the end the run is finished undisturbed, and the ledger is asked how often each prompt was trained, and
whether all of the walk over the data was, but for what may be in flight.

With --fixed-order the run is synchronous, prompts are trained in the order of the data, and tokens follow from seeds
(`sglang.deterministic`). A second run of as many steps is then left in peace, and both are compared bit by bit.

Writes benchmarks/results/soak.json, or soak_fixed_order.json; exit status 1 when a prompt was not trained exactly once,
or was skipped, a process is left, the two runs differ, or the time was too short for what the soak is to show: as many
kills as were asked for and, but for --fixed-order, each kind of fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.origin import origin  # noqa: E402
from benchmarks.run_comparison import compare, is_equal  # noqa: E402
from benchmarks.small_disk import nearly_full  # noqa: E402
from benchmarks.soak_kills import Kills, number_of  # noqa: E402
from benchmarks.soak_ledger import NOT_ONCE, TIMES, is_whole, walk_of_ledger  # noqa: E402
from benchmarks.soak_network import can_silence, silence  # noqa: E402
from benchmarks.soak_trainer import Trainer, left_in_peace, with_children  # noqa: E402
from megatron_klear.rollout.ledger import LedgerReader  # noqa: E402

RESULTS = Path(__file__).with_name("results")
SILENCE = "network silent"
FAULTS = {
    "server killed": 0.45, "trainer killed": 0.25, "server stopped": 0.1, SILENCE: 0.1, "disk full": 0.1,
}  # fmt: skip
FULL = ("too large", "disk is full", "disk I/O error", "File too large", "No space left", "cannot grow", "cannot write")
"""Words by which a trainer tells that it could not write."""
STALL_SECONDS, STOPPED_SECONDS = 20.0, 35.0
PER_STEP, EVERY_STEPS, STALENESS = 8, 3, 3


class Soak:
    """Disturbs a trainer until the time is over.

    Args:
        trainer: to be disturbed.
        rng: decides what happens when.
        shares: of the kinds of faults.
    """

    def __init__(self, trainer: Trainer, rng: random.Random, shares: dict[str, float]) -> None:
        self.trainer, self.rng, self.shares = trainer, rng, shares
        self.faults: Counter[str] = Counter()
        self.endings: list[str] = []
        self.full_disks: list[dict[str, object]] = []
        self.server_kills = Kills(trainer.output)
        self.restarts = 0

    def disturb(self, minutes: float, kills: int) -> None:
        """Let faults happen, each after the run has gone on for a step or, now and then, while it still recovers.

        Args:
            minutes: how long.
            kills: processes of servers and trainers are killed so often at least, as far as the pace can be held.
        """
        begin = time.monotonic()
        end = begin + 60.0 * minutes
        self.trainer.start(10**6)
        while time.monotonic() < end:
            late = self.kills() < (kills + 2) * (time.monotonic() - begin) / (end - begin) - 1
            recovers = self.rng.random() < (0.5 if late else 0.2)
            patience = self.rng.uniform(1.0, 30.0) if recovers else 180.0
            self._go_on(min(end, time.monotonic() + patience))
            if time.monotonic() >= end:
                return
            if not self.trainer.is_alive():
                self._start_again()
                continue
            kinds = [kind for kind in self.shares if not late or kind.endswith("killed")]
            # One that has not happened yet comes sooner: a soak is to have met them all.
            weights = [self.shares[kind] * (1.0 if self.faults[kind] else 4.0) for kind in kinds]
            kind = self.rng.choices(kinds, weights)[0]
            print(f"{time.strftime('%H:%M:%S')} step {self.trainer.step()}: {kind}", flush=True)
            self._cause(kind)

    def _go_on(self, end: float) -> None:
        """Wait for a step more, and some random seconds."""
        before = self.trainer.step()
        while time.monotonic() < end and self.trainer.is_alive() and self.trainer.step() <= before:
            self.server_kills.look()
            time.sleep(0.2)
        pause = time.monotonic() + self.rng.uniform(0.0, 10.0)
        while time.monotonic() < min(pause, end) and self.trainer.is_alive():
            self.server_kills.look()
            time.sleep(0.1)

    def _start_again(self) -> None:
        """After an end that is not a kill of ours: it is noted, and the run goes on."""
        statuses = self.trainer.wait(90.0)
        self.end_life("the trainer ended by itself")
        last = [line for line in self.trainer.output().splitlines() if line.strip()][-1:]
        self.endings.append(f"life {self.trainer.lives}: statuses {statuses}, {(last or [''])[0][:300]}")
        print(self.endings[-1], flush=True)
        self.trainer.start(10**6)

    def kills(self) -> int:
        """Times that SIGKILL met a server or was sent to a trainer."""
        return self.faults["server killed"] + self.faults["trainer killed"]

    def unmet(self, kills: int, kinds: Iterable[str]) -> list[str]:
        """What was to happen and did not, in words."""
        found = [f"{self.kills()} kills of {kills}"] if self.kills() < kills else []
        return found + [f"no {kind}" for kind in kinds if not self.faults[kind]]

    def end_life(self, why: str) -> None:
        """Count what the life that has ended says of restarts.

        Args:
            why: it has ended.
        """
        self.server_kills.end_life(why)
        self.restarts += self.trainer.output().count("is back with the current weights")

    def _cause(self, kind: str) -> None:
        trainer, rng = self.trainer, self.rng
        if kind in ("server killed", "server stopped", SILENCE):
            servers = trainer.servers()
            if not servers:  # they start some time after the trainer
                self.faults[f"not {kind}: there was no server yet"] += 1
                return
            server = rng.choice(servers)
            processes = with_children(server)
            if kind == SILENCE:
                kind = kind if silence(server, STOPPED_SECONDS) else "network could not be silenced"
                self.faults[kind] += 1
                return
            if kind == "server killed":
                chosen = rng.choice([[server], processes[-1:], processes])
                number, life, step = number_of(server), trainer.lives, trainer.step()
                if not self.server_kills.kill(chosen, server=number, life=life, step=step):
                    kind = "server had ended before it was killed"
            else:
                _signal(processes, signal.SIGSTOP)
                time.sleep(STOPPED_SECONDS)
                _signal(processes, signal.SIGCONT)
        else:
            trainer.kill(rng.choice([[0], [1], [0, 1]]))
            self.end_life("the trainer was killed")
            if kind == "disk full":
                kind = self._fill_disk(rng.randrange(100_000, 1_000_000))
            trainer.start(10**6)
        self.faults[kind] += 1

    def _fill_disk(self, spare: int) -> str:
        """Let the trainer live until so many bytes more have been written; returns what happened."""
        trainer = self.trainer
        with nearly_full(trainer.run, spare) as is_full:
            limit = None if is_full else (trainer.run / "ledger.sqlite").stat().st_size + spare
            trainer.start(10**6, file_limit=limit)
            statuses = trainer.wait(150.0)
            self.end_life("the trainer ended on a full disk")
            self._wait_for_servers_to_end()
        how = "ENOSPC: run.dir on a tmpfs" if is_full else "EFBIG: RLIMIT_FSIZE, as no tmpfs could be mounted"
        met = [line for line in trainer.output().splitlines() if any(reason in line for reason in FULL)]
        self.endings.append(f"life {trainer.lives}: statuses {statuses}, {(met or ['no word of it'])[-1][:300]}")
        self.full_disks.append({"life": trainer.lives, "how": how, "spare_bytes": spare, "met": bool(met)})
        print(self.endings[-1], flush=True)
        return "disk full" if met else "disk limit not met"

    def _wait_for_servers_to_end(self) -> None:
        """They write logs into the run's directory, and end with the trainer."""
        deadline = time.monotonic() + 60.0
        while self.trainer.servers() and time.monotonic() < deadline:
            time.sleep(0.5)


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue  # it has ended


def settings(work: Path, venv: Path, servers: int, *, fixed_order: bool) -> list[str]:
    """Overrides that shrink the quickstart, and make it asynchronous, or repeatable."""
    data = work / "data"
    scheduling = ["scheduling.mode=async", f"scheduling.max_staleness={STALENESS}", "scheduling.order=completion"]
    if fixed_order:
        scheduling = ["scheduling.mode=sync", "scheduling.order=fixed", "sglang.deterministic=true"]
    return [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.head_dim=8",
        "reward.workers=2", "reward.malformed=-2.0", "reward.require_think=false", "observe.tensorboard=false",
        "observe.report=false", f"tokenizer.dir={data / 'tokenizer'}",
        f"data.prompts=[{data / 'prompts.jsonl'}]", "data.heldout=[]", "evaluation.at_end=false",
        "checkpoint.start_from=null", f"checkpoint.every_steps={EVERY_STEPS}", "checkpoint.keep=2",
        f"rl.prompts_per_step={PER_STEP}",
        "rl.minibatch_prompts=4", "rollout.responses_per_prompt=4", "rollout.max_response_tokens=72",
        "optimizer.schedule=constant", "optimizer.warmup_steps=0", "rollout.engine=sglang", f"sglang.venv={venv}",
        f"sglang.servers={servers}", "sglang.stream_interval=4", "sglang.start_seconds=240", "sglang.idle_seconds=120",
        *scheduling, f"scheduling.stall_seconds={STALL_SECONDS}", "scheduling.start_seconds=240",
        "scheduling.outage_seconds=400", "weight_sync.timeout_seconds=60", "parallel.timeout_seconds=300",
    ]  # fmt: skip


def report(soak: Soak, minutes: float, seed: int, servers: int, statuses: list[int]) -> dict[str, object]:
    """What happened, and what the ledger says."""
    trainer = soak.trainer
    with sqlite3.connect(f"file:{trainer.run / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        not_once = ledger.execute(NOT_ONCE).fetchall()
        times = {str(number): count for number, count in ledger.execute(TIMES)}
        per_step = ledger.execute("SELECT step, COUNT(*) FROM groups WHERE state = 'trained' GROUP BY step").fetchall()
        rolled_back = ledger.execute("SELECT COUNT(*) FROM events WHERE event = 'rolled back'").fetchone()[0]
    with LedgerReader(trainer.run / "ledger.sqlite") as reader:
        groups = [group for step in range(1, trainer.step() + 1) for group in reader.groups_of_step(step)]
        versions = [len(rollout.policy_versions) for group in groups for rollout in group.rollouts.values()]
    whole = sorted(per_step) == [(step, PER_STEP) for step in range(1, trainer.step() + 1)]
    return {
        "minutes": minutes,
        "seed": seed,
        "servers": servers,
        "faults": dict(soak.faults),
        "kills": soak.kills(),
        "lives_of_the_trainer": trainer.lives,
        "servers_restarted_in_a_life": soak.restarts,
        "servers_killed": soak.server_kills.told(),
        "what_became_of_them": dict(Counter(_kind(kill["outcome"]) for kill in soak.server_kills.told())),
        "full_disks": soak.full_disks,
        "ended_by_itself": soak.endings,
        "last_exit": statuses,
        "steps": trainer.step(),
        "every_step_has_its_prompts": whole,
        "prompts_trained": sum(times.values()),
        "times_trained": times,
        "rolled_back_and_trained_again": rolled_back,
        "responses_trained": len(versions),
        "of_several_versions": sum(count > 1 for count in versions),
        "most_versions_of_a_response": max(versions, default=0),
        "not_trained_exactly_once": not_once,
        "walk": walk(trainer),
        "server_processes_left": len(trainer.left()),
    }


def _kind(outcome: object) -> str:
    """An outcome without its seconds."""
    return re.sub(r" \d+ s later,", ",", str(outcome))


def walk(trainer: Trainer) -> dict[str, object]:
    """How the ledger compares with the walk over the data.

    A killed life may have reserved ahead of steps that the next one has to train again, up to a checkpoint's distance.
    """
    used = yaml.safe_load((trainer.run / "config.yaml").read_text())
    ahead = STALENESS if used["scheduling"]["mode"] == "async" else 0
    return walk_of_ledger(
        trainer.run / "ledger.sqlite",
        [json.loads(line)["id"] for line in (trainer.work / "data" / "prompts.jsonl").read_text().splitlines()],
        seed=used["run"]["seed"],
        per_step=PER_STEP,
        most_in_flight=(EVERY_STEPS + ahead + 1) * PER_STEP,
    )


def main() -> int:
    """Disturb, finish, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kills", type=int, default=20, help="least number of SIGKILLs, as far as time allows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak")
    parser.add_argument("--venv", type=Path, default=Path(os.environ.get("KLEAR_SGLANG_VENV", ROOT / ".venv-sglang")))
    parser.add_argument("--transport", default="auto", help="weight_sync.transport: auto, disk, distributed, tensor")
    parser.add_argument("--fixed-order", action="store_true", help="repeatable, compared with an undisturbed run")
    parser.add_argument("--without-network", action="store_true", help="where there is no root, or no iptables")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not given.without_network and not can_silence():
        parser.error("no packets can be dropped here (iptables, as root); --without-network leaves that fault out")
    out = given.out or RESULTS / ("soak_fixed_order.json" if given.fixed_order else "soak.json")
    work = given.work.resolve()
    if (work / "run").exists():
        parser.error(f"--work {work}: it holds a run already; name another directory")
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart_data.py"), "--out", str(work / "data"), "--sft-rows", "8",
         "--prompts", "200", "--heldout", "8"],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    venv = given.venv.resolve()
    overrides = settings(work, venv, given.servers, fixed_order=given.fixed_order)
    overrides.append(f"weight_sync.transport={given.transport}")
    told = origin(venv) | {"transport": given.transport}
    shares = {kind: share for kind, share in FAULTS.items() if not (given.without_network and kind == SILENCE)}
    soak = Soak(Trainer(work, overrides), random.Random(given.seed), shares)
    trainer = soak.trainer
    try:
        soak.disturb(given.minutes, given.kills)
        for rank in trainer.ranks:
            rank.terminate()
        trainer.wait(120.0)
        soak.end_life("the trainer was stopped at the end of the disturbance")
        trainer.start(trainer.step() + 3)
        statuses = trainer.wait(600.0)
        soak.end_life("the run was complete")
    finally:
        trainer.kill([0, 1])
    time.sleep(2.0)
    unmet = soak.unmet(given.kills, () if given.fixed_order else shares)
    told |= report(soak, given.minutes, given.seed, given.servers, statuses) | {"unmet": unmet}
    same = True
    if given.fixed_order:
        peaceful = left_in_peace(work, overrides, trainer.step())
        compared = compare(trainer.run, peaceful.run)
        told, same = told | {"against_an_undisturbed_run": compared}, is_equal(compared)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))
    sound = told["every_step_has_its_prompts"] and set(told["times_trained"]) == {"1"}  # type: ignore[call-overload]
    sound = sound and is_whole(told["walk"])  # type: ignore[arg-type]
    clean = not told["not_trained_exactly_once"] and not told["server_processes_left"] and statuses == [0, 0]
    return 0 if sound and clean and same and not unmet else 1


if __name__ == "__main__":
    sys.exit(main())
