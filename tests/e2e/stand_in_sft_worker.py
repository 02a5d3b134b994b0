"""train_sft with stand-ins for servers in its evaluations, as stand_in_worker.py is for train_rl.

python stand_in_sft_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

from megatron_klear import train_sft
from megatron_klear.config import Settings
from megatron_klear.session.launch import StopRequest, leave, run_entry


def main(settings: Settings, stop: StopRequest) -> None:
    from megatron_klear.weight_sync import publisher, restoring

    publisher.verify = restoring.verify = lambda engines, expected: True
    train_sft.main(settings, stop)


if __name__ == "__main__":
    leave(run_entry("sft", main))
