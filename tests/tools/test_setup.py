"""What setup.py builds: the CUDA part where nvcc and a CUDA torch are there, and nowhere an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STUB = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext

CUDA_HOME = {home!r}

def CUDAExtension(name, sources, **keywords):
    keywords["extra_compile_args"] = keywords["extra_compile_args"]["nvcc"]
    return Extension(name, sources, **keywords)

class BuildExtension(build_ext):
    def run(self):
        for extension in self.extensions:
            print("building", extension.name, *extension.sources, *extension.extra_compile_args, extension.optional)
        {then}
"""


def run_setup(directory: Path, *arguments: str, cuda: str | None = None, home: str | None = None, then: str = "pass"):
    """setup.py under a torch that only has what setup.py asks for."""
    package = directory / "torch" / "utils"
    package.mkdir(parents=True)
    (directory / "torch" / "__init__.py").write_text(f"class version:\n    cuda = {cuda!r}\n")
    (package / "__init__.py").write_text("")
    (package / "cpp_extension.py").write_text(STUB.format(home=home, then=then))
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def toolkit(tmp_path: Path) -> str:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    return str(tmp_path / "cuda")


def test_a_cpu_torch_builds_nothing_and_says_so(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "build_ext", "--build-lib", str(tmp_path / "lib"))
    assert result.returncode == 0, result.stderr
    assert "klear_kernels._cuda is not built: torch is built without CUDA" in result.stderr
    assert "building" not in result.stdout


def test_a_cuda_torch_without_a_toolkit_builds_nothing(tmp_path: Path) -> None:
    for number, home in enumerate((None, str(tmp_path / "nowhere"))):
        directory = tmp_path / str(number)
        result = run_setup(directory, "build_ext", "--build-lib", str(tmp_path / "lib"), cuda="13.0", home=home)
        assert result.returncode == 0, result.stderr
        assert "not built: there is no nvcc" in result.stderr


def test_nvcc_and_a_cuda_torch_build_it_for_hopper(tmp_path: Path, toolkit: str) -> None:
    result = run_setup(tmp_path, "build_ext", "--build-lib", str(tmp_path / "lib"), cuda="13.0", home=toolkit)
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("building"))
    words = line.split()
    assert words[1] == "klear_kernels._cuda"
    sources = [ROOT / word for word in words if word.endswith((".cpp", ".cu"))]
    assert {source.name for source in sources} == {"bindings.cpp", "products.cpp", "row_pass.cu"}
    assert all(source.is_file() for source in sources)
    assert "-gencode=arch=compute_90a,code=sm_90a" in words
    assert words[-1] == "True"
    assert "not built" not in result.stderr


def test_a_build_that_fails_does_not_fail_the_installation(tmp_path: Path, toolkit: str) -> None:
    result = run_setup(
        tmp_path,
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        cuda="13.0",
        home=toolkit,
        then="raise RuntimeError('nvcc: no space left')",
    )
    assert result.returncode == 0, result.stderr
    assert "not built: the build failed (nvcc: no space left)" in result.stderr
