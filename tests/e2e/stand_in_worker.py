"""train_rl with stand-ins for servers, which hold no weights: what they would tell of them is taken as right.

python stand_in_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

from megatron_klear import train_rl
from megatron_klear.config import Settings
from megatron_klear.session.launch import StopRequest, leave, run_entry


def main(settings: Settings, stop: StopRequest) -> None:
    from megatron_klear.weight_sync import publisher, restoring

    publisher.verify = restoring.verify = lambda engines, expected: True
    train_rl.main(settings, stop)


if __name__ == "__main__":
    leave(run_entry("rl", main))
