"""`python -m megatron_klear.observe RUN_DIR`: writes the report of a run, also of one that is going or was killed.

With `--where` it says instead what each rank is doing: for a run that seems to hang.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    """Writes the report and prints its path; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_klear.observe", description="Write report.html and report.png of a run directory."
    )
    parser.add_argument("run_dir", type=Path, help="the run directory")
    parser.add_argument("--sft", type=Path, metavar="RUN_DIR", help="SFT run to show in the same report")
    parser.add_argument(
        "--where",
        action="store_true",
        help="only say what each rank does: step, phase, since when; dead and silent ones first",
    )
    options = parser.parse_args(argv)
    for folder in (options.run_dir, options.sft):
        if folder is not None and not folder.is_dir():
            print(f"{folder} is not a directory; name the run directory (the setting run.dir)", file=sys.stderr)
            return EXIT_BAD_INPUT
        if folder is not None and not any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
            print(f"{folder} holds no run: neither metrics.jsonl nor config.yaml is there", file=sys.stderr)
            return EXIT_BAD_INPUT
    if options.where:
        return _say_where(options.run_dir)
    from megatron_klear.observe.report import write_report

    try:
        print(write_report(options.run_dir, options.sft))
    except OSError as error:
        print(f"the report cannot be written: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _say_where(run_dir: Path) -> int:
    from megatron_klear.observe.heartbeat import ranks_that_reported, whereabouts

    count = ranks_that_reported(run_dir)
    if not count:
        print(f"no rank of {run_dir} has reported yet: it may be starting; look at what it prints", file=sys.stderr)
        return EXIT_BAD_INPUT
    print("\n".join(whereabouts(run_dir, count)))
    print(f"servers, where the run has started any, write to {run_dir}/logs/engine_*.log")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
