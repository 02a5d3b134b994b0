"""Sets of weights in files: which of them stay, and what the disk must hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_klear.weight_sync import WeightFiles
from megatron_klear.weight_sync.buckets import Bucket

ROOT = Path(__file__).parents[2]


def test_the_newest_set_is_kept_whatever_lay_there_from_a_later_step(tmp_path: Path) -> None:
    """A run that resumes before its last publish finds sets of higher versions, and broken ones."""
    for left_over in ("version_00000007", "version_00000009.new"):
        (tmp_path / left_over).mkdir()
    files = WeightFiles(tmp_path, {}, keep=1)
    assert files.newest is None
    for version in (5, 6):
        files.begin(version)
        files.write(Bucket(names=("a",), tensors=(torch.ones(2),)))
        assert files.complete() == tmp_path / f"version_{version:08d}"
        files.remove_old()
    assert [p.name for p in tmp_path.iterdir()] == ["version_00000006"]
    assert files.newest == tmp_path / "version_00000006"


WRITE = """
import shutil, sys
from pathlib import Path
import torch
from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync import WeightFiles
from megatron_klear.weight_sync.buckets import Bucket

directory = Path(sys.argv[1])
MIB = 2**20

def write(files, version, tensors=4):
    files.begin(version)
    for i in range(tensors):
        files.write(Bucket(names=(f"w{i}",), tensors=(torch.ones(MIB, dtype=torch.uint8),)))
    files.complete()
    files.remove_old()

def there():
    return sorted(path.name for path in directory.iterdir())

write(WeightFiles(directory, {}, keep=1), 7)
(directory / "version_00000009.new").mkdir()  # as of a life that was killed
(directory / "version_00000009.new/model-00001.safetensors").write_bytes(bytes(4 * MIB))
second = WeightFiles(directory, {}, keep=1)
second.begin(3)
assert there() == ["version_00000003.new", "version_00000007", "version_00000009.new"]
assert sorted(path.name for path in directory.glob("version_*/*")) == ["config.json", "model.safetensors.index.json"]
write(second, 3)
assert there() == ["version_00000003"]
free = shutil.disk_usage(directory).free
try:
    write(second, 4, tensors=8)
except WeightSyncError as error:
    print(error)
assert there() == ["version_00000003"]
assert shutil.disk_usage(directory).free == free
write(second, 4)
assert there() == ["version_00000004"]
"""


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_a_disk_of_two_sets_is_enough_and_what_does_not_fit_is_removed(tmp_path: Path) -> None:
    """Whatever an earlier life of the run has left; a server may name one of its sets as its model, by config.json."""
    done = subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", "--size", str(10 * 2**20), "--tmpfs", str(tmp_path),
         sys.executable, "-W", "ignore", "-c", WRITE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot write the weights of version 4 in ")
    assert "No space left on device" in done.stdout
