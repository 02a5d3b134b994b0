"""What importing the package costs: torch and nothing else of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

SCRIPT = """
import sys
import torch
from klear_kernels import linear_logprob, linear_policy_loss
from klear_kernels.linear_policy_loss.reference import reference_policy_loss
output = linear_logprob(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
assert torch.allclose(output.logprobs, torch.full((2,), 0.25).log()), output
assert callable(linear_policy_loss) and callable(reference_policy_loss)
print(sorted({name.split(".")[0] for name in sys.modules} & {"megatron_klear", "megatron", "transformers", "triton"}))
"""


def test_logprobs_need_nothing_but_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_folder_does_not_shadow_the_pypi_package_of_its_name() -> None:
    assert not (KERNELS / "__init__.py").exists()
