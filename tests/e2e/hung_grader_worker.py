"""train_rl with stand-ins for servers; the graders of the second machine take every response and grade none.

python hung_grader_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

import os
import time
from typing import Any

from megatron_klear.session.launch import leave, run_entry
from tests.e2e import stand_in_worker


def main(settings: Any, stop: Any) -> None:
    from megatron_klear.session.grading import Graders

    if os.environ["RANK"] == "1":
        Graders.grade_many = lambda self, requests: time.sleep(3600)  # type: ignore[assignment,return-value]
    stand_in_worker.main(settings, stop)


if __name__ == "__main__":
    leave(run_entry("rl", main))
