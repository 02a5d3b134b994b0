"""Saving and resuming with real gloo processes: nothing is lost, in any layout, whatever happens to disk or process."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.convert_from_hf import hf_to_megatron

WORKER = Path(__file__).with_name("store_ranks.py")
Answers = list[list[Any]]
TWO = {"world": 2}


class Ranks:
    """Launches groups of processes; see store_ranks.py."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.launches = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def launch(self, root: Path, steps: list[list[Any]], processes: dict[str, Any] = TWO, **job: Any) -> dict[str, Any]:
        """Run steps and return exit codes and the directory with the answers."""
        self.launches += 1
        directory = self.directory / f"launch{self.launches}"
        directory.mkdir()
        job = {"directory": str(directory), "root": str(root), "layout": processes, "steps": steps, **job}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return {**json.loads(self.process.stdout.readline()), "directory": directory}

    def __call__(self, root: Path, steps: list[list[Any]], processes: dict[str, Any] = TWO, **job: Any) -> list[Any]:
        """Run steps that no process may die in, and return rank 0's answers; the others' must be the same."""
        done = self.launch(root, steps, processes, **job)
        logs = [(done["directory"] / f"rank{rank}.log").read_text() for rank in range(processes["world"])]
        assert not any(done["codes"]), "\n".join([str(done["codes"]), *logs])
        answers: Answers = [
            json.loads((done["directory"] / f"rank{rank}.json").read_text()) for rank in range(processes["world"])
        ]
        for other in answers[1:]:
            for step, one, two in zip(steps, answers[0], other, strict=True):
                if step[0] == "take_warnings":  # only rank 0 tells the user
                    assert two == []
                elif step[0] == "update":  # a random number of each rank's own is among them
                    assert {**one, "noise": 0} == {**two, "noise": 0}
                else:
                    assert one == two
        answers[0].append(done["directory"])
        return answers[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("launches"))
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    try:
        started.process.wait(20)
    finally:
        started.process.kill()
        started.process.wait()


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on two data-parallel ranks: five updates, saved after each of the first three."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    steps = [s for n in (1, 2, 3) for s in (["update", n], ["save", n])]
    answers = ranks(
        root, [*steps, ["weights"], ["update", 4], ["update", 5], ["weights"], ["keep_weights", "end.pt"]], keep=3
    )
    return {
        "root": root,
        "saved": answers[6],
        "continued": answers[7:9],
        "end": answers[9],
        "end_weights": torch.load(answers[-1] / "end.pt"),
    }


@pytest.fixture
def copy(run: dict[str, Any], tmp_path: Path) -> Path:
    """The run's checkpoints, to be damaged."""
    return Path(shutil.copytree(run["root"], tmp_path / "checkpoints"))


def newest(root: Path) -> Path:
    return layout.step_directory(root, layout.finished_steps(root)[0])


CONTINUE = [["resume"], ["weights"], ["update", 4], ["update", 5], ["weights"], ["take_warnings"]]


def test_a_resumed_run_continues_bit_for_bit(ranks: Ranks, run: dict[str, Any]) -> None:
    state, loaded, *updates, end, warned, _ = ranks(run["root"], CONTINUE)
    assert state == {"step": 3, "cursor": {"epoch": 3, "place": [3]}}
    assert loaded == run["saved"]
    assert updates == run["continued"]  # losses, gradient norms, learning rates and each rank's random numbers
    assert end == run["end"]
    assert len(set(end.values())) == len(end)
    assert warned == []


@pytest.mark.parametrize(
    ("kind", "job"),
    [
        ("bfloat16", {"model": {"dtype": "bfloat16"}}),
        ("plain optimizer", {"layout_more": {"distributed_optimizer": False}}),
        (
            "bfloat16, plain optimizer",
            {"model": {"dtype": "bfloat16"}, "layout_more": {"distributed_optimizer": False}},
        ),
        ("tied embeddings in two stages", {"model": {"tie_embeddings": True}, "layout_more": {"pp": 2}}),
        ("sequence parallel", {"layout_more": {"tp": 2, "sequence_parallel": True}}),
    ],
)
def test_other_kinds_of_runs_continue_bit_for_bit(ranks: Ranks, tmp_path: Path, kind: str, job: dict[str, Any]) -> None:
    processes = {"world": 2, **job.pop("layout_more", {})}
    *_, saved, fourth, fifth, end, _ = ranks(
        tmp_path,
        [["update", 1], ["update", 3], ["save", 3], ["weights"], ["update", 4], ["update", 5], ["weights"]],
        processes,
        **job,
    )
    state, loaded, *updates, resumed_end, warned, _ = ranks(tmp_path, CONTINUE, processes, **job)
    assert state["step"] == 3
    assert (loaded, updates, resumed_end, warned) == (saved, [fourth, fifth], end, [])


def test_saved_before_the_first_update(ranks: Ranks, tmp_path: Path) -> None:
    *_, first, second, end, _ = ranks(tmp_path, [["save", 0], ["update", 1], ["update", 2], ["weights"]])
    assert ranks(tmp_path, [["resume"], ["update", 1], ["update", 2], ["weights"]])[1:4] == [first, second, end]


@pytest.mark.parametrize(
    "processes",
    [
        {"world": 1},
        {"world": 2, "tp": 2},
        {"world": 2, "pp": 2},
        {"world": 2, "cp": 2},
        {"world": 4, "tp": 2, "pp": 2, "sequence_parallel": True},
    ],
    ids=lambda p: "-".join(f"{k}{v}" for k, v in p.items()),
)
def test_another_layout_loads_the_same_weights_and_continues_alike(
    ranks: Ranks, run: dict[str, Any], processes: dict[str, Any]
) -> None:
    state, loaded, *updates, _, _, warned, directory = ranks(
        run["root"], [*CONTINUE[:-1], ["keep_weights", "end.pt"], ["take_warnings"]], processes
    )
    assert state["step"] == 3
    assert loaded == run["saved"]
    for found, expected in zip(updates, run["continued"], strict=True):
        assert found["lr"] == expected["lr"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    # Adam's moments came along: without them the two updates would move every weight by up to 2e-3.
    for name, tensor in torch.load(directory / "end.pt").items():
        assert (tensor - run["end_weights"][name]).abs().max() < 2e-5, name
    assert warned == []


def test_there_and_back_through_another_layout(ranks: Ranks, run: dict[str, Any], tmp_path: Path, copy: Path) -> None:
    processes = {"world": 2, "tp": 2}
    assert ranks(copy, [["resume"], ["save", 4]], processes)[1] == [4, 3, 2]
    state, loaded, fourth, _ = ranks(copy, [["resume"], ["weights"], ["update", 4]])
    assert (state["step"], loaded) == (4, run["saved"])
    assert fourth["loss"] == run["continued"][0]["loss"]


def flip(directory: Path) -> None:
    data = bytearray((directory / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 0x10
    (directory / "__0_0.distcp").write_bytes(data)


def truncate(directory: Path) -> None:
    os.truncate(directory / "__1_0.distcp", 100)


def lose(directory: Path) -> None:
    (directory / ".metadata").unlink()


def lose_manifest(directory: Path) -> None:
    (directory / layout.MANIFEST).unlink()


def empty_state(directory: Path) -> None:
    os.truncate(directory / layout.RUN_STATE, 0)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip, "__0_0.distcp has another checksum than when it was written"),
    "truncated file": (truncate, "__1_0.distcp has 100 bytes, must have "),
    "missing file": (lose, ".metadata is missing"),
    "missing manifest": (lose_manifest, "no readable manifest.json"),
    "empty run state": (empty_state, "run_state.json has 0 bytes, must have "),
}


def test_damaged_checkpoints_are_passed_over_with_a_warning(ranks: Ranks, copy: Path, tmp_path: Path) -> None:
    roots, steps = {}, []
    for name, (damage, _) in DAMAGES.items():
        roots[name] = Path(shutil.copytree(copy, tmp_path / name))
        damage(newest(roots[name]))
        steps += [["fresh", str(roots[name])], ["resume"], ["weights"], ["take_warnings"]]
    answers = ranks(copy, [["fresh", str(copy / "none")], ["resume"], *steps])
    assert answers[1] is None  # nothing there is nothing to resume
    for number, (name, (_, text)) in enumerate(DAMAGES.items()):
        _, state, weights, warned = answers[2 + 4 * number : 6 + 4 * number]
        assert state == {"step": 2, "cursor": {"epoch": 3, "place": [2]}}, name
        assert weights == answers[4], name
        assert len(warned) == 1, name
        assert "step_00000003 is damaged and is passed over" in warned[0]
        assert text in warned[0]


def test_no_whole_checkpoint_is_an_error_and_changes_nothing(ranks: Ranks, copy: Path) -> None:
    for step, damage in zip(layout.finished_steps(copy), (flip, lose, lose_manifest), strict=True):
        damage(layout.step_directory(copy, step))
    before = sorted(str(p) for p in copy.rglob("*"))
    result, warned, together, _ = ranks(copy, [["resume"], ["take_warnings"], ["world_stays_together"]])
    assert "none of the 3 checkpoints is whole" in result["error"]
    assert "run.dir" in result["error"]
    assert len(warned) == 3
    assert together == 2
    assert sorted(str(p) for p in copy.rglob("*")) == before


def test_half_written_directories_are_ignored_and_removed(ranks: Ranks, copy: Path) -> None:
    shutil.copytree(newest(copy), layout.writing_directory(copy, 9))
    (layout.writing_directory(copy, 9) / layout.MANIFEST).unlink()
    (copy / ".deleting_step_00000001").mkdir()
    shutil.move(newest(copy), copy / ".replaced_step_00000003")  # killed between two renames: it comes back
    state, warned, _ = ranks(copy, [["resume"], ["take_warnings"]])
    assert state["step"] == 3
    assert warned == []
    assert sorted(os.listdir(copy)) == ["step_00000001", "step_00000002", "step_00000003"]


def test_only_the_newest_are_kept_and_a_step_can_be_saved_again(ranks: Ranks, tmp_path: Path) -> None:
    kept = ranks(tmp_path, [["save", 1], ["save", 2], ["save", 3], ["update", 1], ["save", 3], ["weights"]], keep=2)
    assert kept[:3] == [[1], [2, 1], [3, 2]]
    assert kept[4] == [3, 2]
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000003"]
    assert ranks(tmp_path, [["resume"], ["weights"]])[1] == kept[5]


def test_a_changed_learning_rate_holds_after_resuming(ranks: Ranks, run: dict[str, Any]) -> None:
    settings = {"lr": 4e-4, "schedule": "constant", "adam_beta1": 0.5}
    *_, resumed, _ = ranks(run["root"], [["fresh", str(run["root"]), None, settings], ["resume"], ["update", 4]])
    assert resumed["lr"] == 4e-4
    assert resumed["loss"] == run["continued"][0]["loss"]


def test_the_checkpoint_of_another_model_is_refused(ranks: Ranks, run: dict[str, Any]) -> None:
    steps = [
        ["fresh", str(run["root"]), {"hidden_size": 32}],
        ["resume"],
        ["fresh", str(run["root"]), {"num_layers": 2}],
        ["resume"],
        ["fresh", str(run["root"]), {"hidden_size": 32}],
        ["load_weights", str(run["root"])],
        ["world_stays_together"],
    ]
    _, other_size, _, fewer_layers, _, other_weights, together, _ = ranks(run["root"], steps)
    for refused in (other_size, fewer_layers):
        assert "step_00000003 cannot be loaded into this model" in refused["error"]
    assert "wrong shape: decoder.final_layernorm.weight is [64], must be [32]" in other_weights["error"]
    assert together == 2


def test_the_state_of_another_kind_of_optimizer_is_refused(ranks: Ranks, run: dict[str, Any]) -> None:
    refused, *_ = ranks(run["root"], [["resume"]], {"world": 2, "distributed_optimizer": False})
    assert "change model settings and parallel.distributed_optimizer back" in refused["error"]


def test_a_full_disk_fails_on_all_ranks_and_loses_nothing(ranks: Ranks, copy: Path) -> None:
    before = {p: p.read_bytes() for p in sorted(copy.rglob("*")) if p.is_file()}
    disk = "[Errno 27] File too large"
    attempts: list[tuple[list[Any], str]] = [
        (["limit_files", 0, 1_000_000], f"rank 0: {disk}"),  # in the middle of the tensors
        (["limit_files", 0, 20_000], f"rank 0: {disk}"),
        (["limit_files", 0, 1000], f"rank 0: {disk}"),  # at the common part
        (["limit_files", 0, 0], f"rank 0: {disk}"),
        (["limit_files", 0, -1], ""),
        (["limit_files", 1, 3000], f"rank 1: {disk}"),
        (["limit_files", 1, 0], f"rank 1: {disk}"),
        (["limit_files", 1, -1], ""),
        (["report_full", 1, 5000], "are needed and 4.88 KiB are free"),
        (["report_full", 1, None], ""),
        (["hide_directory", 1], "storage that all machines share"),
    ]
    steps = [["resume"]]
    for hindrance, text in attempts:
        steps += [hindrance, *([["save", 4], ["world_stays_together"], ["files"]] if text else [])]
    answers = iter(ranks(copy, steps)[1:])
    for hindrance, text in attempts:
        next(answers)
        if text:
            saved, together, files = next(answers), next(answers), next(answers)
            assert text in saved["error"], hindrance
            assert "earlier checkpoints there are untouched" in saved["error"]
            assert together == 2
            assert files == ["step_00000001", "step_00000002", "step_00000003"]
    assert {p: p.read_bytes() for p in sorted(copy.rglob("*")) if p.is_file()} == before
    # With space again the same process would have saved; so does the next one.
    assert ranks(copy, [["resume"], ["limit_files", 0, 1000], ["save", 4], ["limit_files", 0, -1], ["save", 4]])[4] == [
        4,
        3,
        2,
    ]


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(ranks: Ranks, tmp_path: Path) -> None:
    last, wanted_kills = 10, 3
    *_, expected, directory = ranks(tmp_path / "whole", [["run", last], ["weights"]], keep=2, random_start=False)
    times = sorted(path.stat().st_mtime for path in directory.glob("saved_*"))
    step_seconds = (times[-1] - times[0]) / (last - 1)
    root, chance, kills = tmp_path / "killed", random.Random(20), 0
    for _ in range(20):
        # At any instant of the two steps that follow the beginning of the first save, most of which is saving.
        kill = [chance.randrange(2), chance.uniform(0.0, 2 * step_seconds)] if kills < wanted_kills else None
        done = ranks.launch(root, [["resume"], ["run", last], ["weights"]], keep=2, random_start=False, kill=kill)
        whole = layout.finished_steps(root)
        saved = [int(p.name.removeprefix("saved_")) for p in done["directory"].glob("saved_*")]
        assert not saved or max(saved) <= whole[0] <= max(saved) + 1, "a checkpoint that was saved is gone"
        for step in whole:
            directory = layout.step_directory(root, step)
            assert layout.damage(directory, layout.read_manifest(directory)) == []
        if done["codes"] == [0, 0]:
            break
        kills += 1
        assert kill is not None
        assert done["codes"][kill[0]] == -9
        assert done["codes"][1 - kill[0]] == 1, "the other rank must fail, and not wait"
        assert done["after"] < 20
    assert kills == wanted_kills
    assert done["codes"] == [0, 0]
    answers = json.loads((done["directory"] / "rank0.json").read_text())
    assert answers[2] == expected
    assert layout.finished_steps(root) == [last, last - 1]
    assert not [name for name in os.listdir(root) if name.startswith(".")]


def test_weights_alone_from_a_run_of_another_layout(
    ranks: Ranks, run: dict[str, Any], copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    step_2 = layout.step_directory(run["root"], 2)
    flip(newest(copy))
    steps = [
        ["load_weights", str(run["root"])],
        ["weights"],
        ["load_weights", str(step_2)],
        ["weights"],
        ["load_weights", str(copy.parent)],  # a run directory, whose newest checkpoint is damaged
        ["weights"],
        ["take_warnings"],
        ["load_weights", str(newest(copy))],
        ["load_weights", str(tmp_path / "empty")],
        ["load_weights", str(tmp_path / "absent")],
        ["weights"],
    ]
    answers = ranks(run["root"], steps, {"world": 2, "tp": 2})
    assert answers[0] == str(newest(run["root"]))
    assert answers[1] == run["saved"]
    assert answers[2] == str(step_2)
    assert answers[3] != run["saved"]
    assert answers[4] == str(layout.step_directory(copy, 2))
    assert answers[5] == answers[3]
    assert any("__0_0.distcp has another checksum" in text for text in answers[6])
    assert "__0_0.distcp has another checksum" in answers[7]["error"]
    assert "no checkpoints there" in answers[8]["error"]
    assert "no checkpoints there" in answers[9]["error"]
    assert answers[10] == answers[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_converted_weights_start_a_run(
    ranks: Ranks, make_hf: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    hf_to_megatron(make_hf(tmp_path / "hf", dtype=dtype), tmp_path)
    root = tmp_path / "checkpoints"
    steps = [
        ["load_weights", str(tmp_path)],
        ["weights"],
        ["update", 1],
        ["fresh", str(root)],
        ["resume"],
        ["weights"],
        ["update", 1],
        ["save", 1],
        ["weights"],
    ]
    model = {"dtype": str(dtype).removeprefix("torch.")}
    answers = ranks(root, steps, {"world": 2, "pp": 2}, model=model)
    assert answers[0] == str(root / "step_00000000")
    assert answers[4] is None  # no run has begun, but its weights are there,
    assert answers[5] == answers[1]
    assert {**answers[6], "noise": 0} == {**answers[2], "noise": 0}  # also in the optimizer's float32 copies
    state, weights, _ = ranks(root, [["resume"], ["weights"]], model=model)
    assert (state["step"], weights) == (1, answers[8])


def test_files_that_came_with_the_weights_outlive_the_first_checkpoint(
    ranks: Ranks, make_hf: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_hf(tmp_path / "hf")
    hf_to_megatron(source, tmp_path)
    root = tmp_path / "checkpoints"
    carried = {path.name: path.read_bytes() for path in (root / "step_00000000" / "hf_files").iterdir()}
    assert "config.json" in carried

    ranks(root, [["resume"], ["save", 1], ["save", 2]], keep=1)
    ranks(root, [["resume"], ["save", 3]], keep=1)
    assert layout.finished_steps(root) == [3]
    assert {path.name: path.read_bytes() for path in (newest(root) / "hf_files").iterdir()} == carried
    assert "hf_files/config.json" in layout.read_manifest(newest(root))
