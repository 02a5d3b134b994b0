"""Curation: prompts and responses for fine-tuning, or problems for reinforcement learning, out of raw rows.

    python -m megatron_klear.curate CONFIG.yaml [section.field=value ...]

Starting again on the same `run.dir` resumes: what was finished is verified and kept.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_klear.config import parse_tool_arguments
from megatron_klear.config.curation import CURATION, CurationSettings, load_curation_settings
from megatron_klear.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, KlearError

_PURPOSE = "Curate data: exact dedup, 9-gram decontamination, then the paper's rules for SFT (3.1) or RL (3.2.1)."


def main(settings: CurationSettings) -> None:
    """Curate, and say what came of it."""
    from megatron_klear.curation import curate
    from megatron_klear.session.run_lock import alone_in

    with alone_in(Path(settings.run.dir), "run.dir"):
        result = curate(settings)
    for stage in result.stages:
        print(f"{stage.name:<14}{stage.audit.rows_in:>12,} rows in{stage.audit.rows_out:>12,} out")
    print(f"curation: rows={result.rows} files={len(result.files)} report={result.report}")


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, curate, and return the exit status: 0 done, 1 failed, 2 bad input, 75 stopped, resumable."""
    settings = parse_tool_arguments(
        argv, module="curate", purpose=_PURPOSE, schema=CURATION, load=load_curation_settings
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("torch", "transformers", "matplotlib", "httpx2", "httpcore2", "ray"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main(settings)
    except KeyboardInterrupt:
        print("stopped; start again on the same run.dir to go on", file=sys.stderr)
        return EXIT_RESUMABLE
    except KlearError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"run.dir = {settings.run.dir}: no space is left ({error}); free some and start again on it"
            print(f"{text}, what is finished is kept", file=sys.stderr)
            return EXIT_FAILED
        print(f"a file cannot be read or written: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_DONE


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
