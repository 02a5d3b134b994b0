"""Tokenizes the rows of `data.sft` before a run, on a machine without GPUs for instance.

    python -m megatron_klear.data CONFIG.yaml [section.field=value ...]
    python -m megatron_klear.data --trained RUN_DIR      # counts what a run has trained: every sequence once per epoch?

A run that finds the index uses it; without it the first rank of the run makes it. Started again after a kill, it goes
on with the parts that are not finished.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_klear.config import load_data_settings, row_files
from megatron_klear.data.trained import trained_sequences
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, KlearError


def main(argv: Sequence[str]) -> int:
    """Make the index and say what is in it, or count what a run has trained.

    Returns 0 done, 1 a sequence was trained twice in an epoch, 2 the input or settings are wrong, 75 interrupted.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m megatron_klear.data CONFIG.yaml [section.field=value ...]")
        print("       python -m megatron_klear.data --trained RUN_DIR\n")
        print(f"{(__doc__ or '').strip()}\n")
        print("Settings: those of train_sft; data.* and tokenizer.* are used. train_sft --help lists them.")
        return EXIT_DONE if argv else EXIT_BAD_INPUT
    if argv[0] == "--trained":
        return _trained(argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    warnings.filterwarnings("ignore", module=r"megatron\..*")  # of packages that are not there
    for noisy in ("megatron.core", "torch", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        settings = load_data_settings(argv[0], argv[1:])
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from megatron_klear.data import SftData, SftIndex, describe_source, load_chat_tokenizer, prepare_index

        tokenizer, data = settings.tokenizer, settings.data
        load_chat_tokenizer(tokenizer.dir, think_start=tokenizer.think_start, think_end=tokenizer.think_end)
        source = describe_source(
            row_files(data.sft), tokenizer.dir, tokenizer.think_start, tokenizer.think_end, index_dir=data.index_dir
        )
        prepare_index(source, processes=data.tokenize_processes)
        rows = SftData(
            SftIndex(source.directory),
            token_budget=settings.packing.token_budget,
            oversize="drop",
            max_reject_share=data.max_reject_share,
        )
    except KlearError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; start again to go on with the parts that are not finished", file=sys.stderr)
        return EXIT_RESUMABLE
    for line in rows.many_rejects_described():
        print(line, file=sys.stderr)
    print(f"{source.directory}: {rows.described()}")
    return EXIT_DONE


def _trained(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print(f"--trained: got {len(argv)} arguments, expected the directory of one run", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        lines, is_sound = trained_sequences(Path(argv[0]))
    except KlearError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print("\n".join(lines) or "no step is trained yet")
    return EXIT_DONE if is_sound else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
