"""train_rl whose engine takes its time on some ranks, from the second step on.

KLEAR_SLOW_RANKS=RANK,... KLEAR_SECONDS_PER_TOKEN=SECONDS python slow_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

import os
import time
from typing import Any

from megatron_klear import train_rl
from megatron_klear.session.launch import leave, run_entry


def main(settings: Any, stop: Any) -> None:
    from megatron_klear.rollout import decoding
    from megatron_klear.rollout.local import LocalEngine

    generate, sample = LocalEngine.generate, decoding.sample_tokens
    seconds = float(os.environ["KLEAR_SECONDS_PER_TOKEN"])
    is_slow = os.environ["RANK"] in os.environ["KLEAR_SLOW_RANKS"].split(",")
    version = 0

    def noted(self: LocalEngine, *prompts: Any, **how: Any) -> Any:
        nonlocal version
        version = self.policy_version
        return generate(self, *prompts, **how)

    def slowly(*logits: Any, **how: Any) -> Any:
        if is_slow and version:
            time.sleep(seconds)
        return sample(*logits, **how)

    LocalEngine.generate, decoding.sample_tokens = noted, slowly  # type: ignore[method-assign]
    train_rl.main(settings, stop)


if __name__ == "__main__":
    leave(run_entry("rl", main))
