"""Checkpoint directories on disk: names, manifests, damage, and that none is lost between two renames."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest

from megatron_klear.checkpoint import layout
from megatron_klear.errors import CheckpointError

FILES = {".metadata": b"m" * 50, "__0_0.distcp": bytes(range(256)) * 40, "sub/part.bin": b"", "run_state.json": b"{}"}


def write(root: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    """A checkpoint under its hidden name, with its manifest."""
    directory = layout.writing_directory(root, step)
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    layout.write_manifest(directory, layout.checksums(directory, layout.files_of(directory)))
    return directory


def make(root: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    """A finished checkpoint."""
    write(root, step, files)
    return layout.publish(root, step)


def damage(directory: Path) -> list[str]:
    """What is wrong with a finished checkpoint."""
    return layout.damage(directory, layout.read_manifest(directory))


def test_a_checkpoint_is_invisible_until_it_is_published(tmp_path: Path) -> None:
    hidden = write(tmp_path, 7)
    assert layout.finished_steps(tmp_path) == []
    assert layout.publish(tmp_path, 7) == tmp_path / "step_00000007"
    assert layout.finished_steps(tmp_path) == [7]
    assert not hidden.exists()
    assert damage(tmp_path / "step_00000007") == []


def test_steps_are_listed_newest_first_and_nothing_else_is(tmp_path: Path) -> None:
    for step in (2, 100, 31):
        make(tmp_path, step)
    for other in ("step_7", "step_000000001", ".writing_step_00000200", "old_step_00000300"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_00000400").write_text("a file")
    assert layout.finished_steps(tmp_path) == [100, 31, 2]
    assert layout.finished_steps(tmp_path / "absent") == []


def test_the_manifest_has_size_and_crc_of_every_file(tmp_path: Path) -> None:
    directory = make(tmp_path, 1)
    stored = json.loads((directory / layout.MANIFEST).read_text())["files"]
    assert stored == {name: [len(data), zlib.crc32(data)] for name, data in FILES.items()}
    assert layout.read_manifest(directory) == {name: (len(d), zlib.crc32(d)) for name, d in FILES.items()}


def test_checksum_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    data = os.urandom((1 << 22) + 17)
    (tmp_path / "big").write_bytes(data)
    assert layout.checksum(tmp_path / "big") == (len(data), zlib.crc32(data))


@pytest.mark.parametrize("position", [0, 5000, 10239])
def test_one_flipped_bit_is_found(tmp_path: Path, position: int) -> None:
    directory = make(tmp_path, 1)
    data = bytearray(FILES["__0_0.distcp"])
    data[position] ^= 1
    (directory / "__0_0.distcp").write_bytes(data)
    assert damage(directory) == ["__0_0.distcp has another checksum than when it was written"]


def test_truncated_and_missing_files_are_named_together(tmp_path: Path) -> None:
    directory = make(tmp_path, 1)
    os.truncate(directory / "__0_0.distcp", 10239)
    (directory / ".metadata").unlink()
    (directory / "sub" / "part.bin").write_bytes(b"x")
    assert damage(directory) == [
        ".metadata is missing",
        "__0_0.distcp has 10239 bytes, must have 10240",
        "sub/part.bin has 1 bytes, must have 0",
    ]


def test_a_file_that_the_system_cannot_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path, 1)

    def fail(file: Path) -> tuple[int, int]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(layout, "checksum", fail)
    expected = layout.read_manifest(directory)
    assert layout.damage(directory, {".metadata": expected[".metadata"]}) == [
        ".metadata cannot be read (Input/output error)"
    ]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"a": 1}}',
        '{"files": {"a": [1, "x"]}}',
        '{"files": {}}',
        "\x00\xff",
    ],
)
def test_an_unreadable_manifest_is_an_error_that_names_it(tmp_path: Path, text: str | None) -> None:
    directory = make(tmp_path, 1)
    (directory / layout.MANIFEST).unlink()
    if text is not None:
        (directory / layout.MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"step_00000001: no readable manifest\.json"):
        layout.read_manifest(directory)


def test_publishing_a_step_again_replaces_it(tmp_path: Path) -> None:
    make(tmp_path, 3)
    directory = make(tmp_path, 3, {".metadata": b"new"})
    assert damage(directory) == []
    assert (directory / ".metadata").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["step_00000003"]


@pytest.mark.parametrize("kill_before", ["replace 1", "replace 2", "fsync", "rmtree"])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_before: str
) -> None:
    make(tmp_path, 3)
    write(tmp_path, 3, {".metadata": b"new"})
    calls = 0

    class Killed(BaseException):
        """Stands for SIGKILL at this instant."""

    def killed(*arguments: object, **keywords: object) -> None:
        raise Killed

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if kill_before == f"replace {calls}":
            raise Killed
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(layout.os, "replace", replace)
        if kill_before == "fsync":
            patched.setattr(layout, "flush_to_disk", killed)
        if kill_before == "rmtree":
            patched.setattr(layout.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            layout.publish(tmp_path, 3)
    layout.clean(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000003"]
    assert damage(tmp_path / "step_00000003") == []
    is_new = (tmp_path / "step_00000003" / ".metadata").read_bytes() == b"new"
    assert is_new == (kill_before in ("fsync", "rmtree"))


def test_cleaning_removes_what_is_half_written_or_half_deleted_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 3)
    write(tmp_path, 4)
    (tmp_path / ".deleting_step_00000001" / "sub").mkdir(parents=True)
    (tmp_path / ".hidden_by_the_user").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    layout.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden_by_the_user", "notes.txt", "step_00000003"]
    layout.clean(tmp_path / "absent")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 20, 100):
        make(tmp_path, step)
    assert layout.remove_old(tmp_path, 2) == [5, 1]
    assert sorted(os.listdir(tmp_path)) == ["step_00000020", "step_00000100"]
    assert layout.remove_old(tmp_path, 2) == []


def test_a_directory_that_another_machine_made_must_be_seen_here(tmp_path: Path) -> None:
    directory = write(tmp_path, 1)
    layout.require_shared(directory)
    with pytest.raises(OSError, match=r"storage that all machines share"):
        layout.require_shared(layout.writing_directory(tmp_path, 2))
