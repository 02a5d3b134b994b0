"""Engine nodes: who starts where, and what the trainer is told; trainer and engine are stand-ins that record it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

TRAINER = """#!/bin/bash
# As python in the trainer's environment: the settings check, then torchrun, which asks both engines for a page.
case " $* " in
    *" --check "*) echo "run.dir: $RUN"; echo "model.hf_dir: /models/a b"
        echo 'engine options: --context-length 99 --json-model-override-args {"a":{"b":4.0}}' ;;
    *" torch.distributed.run "*)
        echo "$SLURMD_NODENAME" "$@" >>"$CALLS.trainer"
        for url in $(grep -o 'http://[0-9.:]*' <<<"$*"); do
            until $PYTHON -c "import urllib.request; urllib.request.urlopen('$url')" 2>/dev/null; do sleep 0.2; done
        done
        echo 0 >"$KLEAR_STATUS_FILE" ;;
esac
"""

ENGINE = """#!/bin/bash
# As python in SGLang's environment: the first one fails, all others serve pages.
echo "$SLURMD_NODENAME" "$@" >>"$CALLS.engine"
[[ ${SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN:-} == 1 ]] || exit 4
mkdir "$CALLS.failed" 2>/dev/null && { echo "out of luck"; exit 3; }
for port in "$@"; do :; done
exec $PYTHON -m http.server --bind 127.0.0.1 "$port"
"""


def stand_in(folder: Path, text: str) -> str:
    program = folder / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(text)
    program.chmod(0o755)
    return str(folder)


def two_free_ports() -> int:
    """The first of two neighbouring ports that nobody listens on."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def test_engines_run_beside_the_trainer_and_end_with_it(slurm, tmp_path):
    port = two_free_ports()
    run, calls = tmp_path / "run", tmp_path / "calls"
    job = slurm.submit(
        "gppo.slurm",
        ["config.yaml", "rl.steps=3"],
        tmp_path,
        ["--nodes=2"],
        KLEAR_VENV=stand_in(tmp_path / "trainer", TRAINER),
        KLEAR_SGLANG_VENV=stand_in(tmp_path / "sglang", ENGINE),
        KLEAR_ENGINE_NODES="1",
        KLEAR_ENGINES_PER_NODE="2",
        KLEAR_ENGINE_PORT=str(port),
        KLEAR_ENGINE_OPTIONS="--mem-fraction-static 0.8",
        CALLS=str(calls),
        RUN=str(run),
        PYTHON=sys.executable,
    )
    fields = job.ended()
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), job.story()

    urls = f"sglang.urls=[http://127.0.0.1:{port},http://127.0.0.1:{port + 1}]"
    (trainer,) = (tmp_path / "calls.trainer").read_text().splitlines()
    assert trainer.startswith("n1 -m torch.distributed.run --nnodes 1 --nproc-per-node 1 --node-rank 0 ")
    waits = "sglang.connect_seconds=1800"  # engines start when it does, and take longer
    asks = f"sglang.restart_requests={run}/logs/.restart-engines-{job.number}-0"
    assert trainer.endswith(
        f" -m megatron_klear.train_rl config.yaml rl.steps=3 rollout.engine=sglang {urls} {waits} {asks}"
    )

    engines = (tmp_path / "calls.engine").read_text().splitlines()
    served = "n2 -m sglang.launch_server --model-path /models/a b --context-length 99 "
    served += '--json-model-override-args {"a":{"b":4.0}} '
    served += "--mem-fraction-static 0.8 --tp-size 1 --host 0.0.0.0"
    assert len(engines) == 3, "one of the two was started again"
    assert set(engines) == {f"{served} --port {port}", f"{served} --port {port + 1}"}
    assert not list((run / "logs").glob(".*")), "nothing is left of what trainer and engines told each other"
    log = (run / "logs" / f"engines-{job.number}-0.log").read_text()
    assert "out of luck" in log
    assert "on n2 ended with status 3; 10 restarts left" in log

    for number in (port, port + 1):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", number)) != 0, "an engine outlived its job"
