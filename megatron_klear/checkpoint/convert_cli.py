"""The command line of tools/convert; torch is imported after the arguments are known to be good."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_klear.errors import EXIT_DONE, EXIT_FAILED, KlearError

if TYPE_CHECKING:
    from megatron_klear.checkpoint.conversion import Conversion

_ABOUT = """\
Convert Qwen3 weights between Hugging Face directories and Megatron checkpoints.

A Megatron checkpoint made here holds whole tensors: any layout (tensor x pipeline parallel) can start from
it, and a checkpoint written by training in any layout can be exported. Tensors pass through memory one by
one, so a model of any size can be converted on a small machine. Values are not changed: there and back is
exact, bit for bit."""

_EXAMPLES = """\
examples:
  # Start a run from published weights: runs/math/checkpoints/step_00000000 is what training starts from.
  tools/convert hf-to-megatron --hf ~/models/Qwen3-8B --out runs/math

  # Export the newest whole checkpoint of a run, to be used with transformers or served.
  tools/convert megatron-to-hf --checkpoint runs/math --out exported/math

  # Export one checkpoint, in files of at most 2 GB.
  tools/convert megatron-to-hf --checkpoint runs/math/checkpoints/step_00000040 --out exported/math-40 --shard-gb 2

exit status: 0 done, 2 the input cannot be converted (nothing was written), 1 writing failed (nothing was kept)"""

_FROM_HF = """\
Write OUT/checkpoints/step_00000000 from config.json and the safetensors files of a Hugging Face directory.

config.json, tokenizer and generation files are kept in the checkpoint, for the way back. Missing, unexpected
or misshapen tensors are listed by name and nothing is written."""

_TO_HF = """\
Write a Hugging Face directory (safetensors, config.json, tokenizer and generation files) from a checkpoint.

The checkpoint's checksums are verified first; a damaged one is refused, or passed over if DIR is a whole run.
Optimizer state in it is left out (its bytes are verified all the same: they lie in the same files as the
weights). OUT appears when it is complete."""


def _positive(kind: type) -> object:
    def convert(text: str) -> float:
        value: float = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    convert.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return convert


def _parser() -> argparse.ArgumentParser:
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="tools/convert", description=_ABOUT, epilog=_EXAMPLES, **shape)  # type: ignore[arg-type]
    commands = parser.add_subparsers(dest="command", required=True, metavar="hf-to-megatron | megatron-to-hf")
    one = commands.add_parser("hf-to-megatron", description=_FROM_HF, epilog=_EXAMPLES, **shape)  # type: ignore[arg-type]
    one.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory of a Qwen3 model")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="run directory to make or to add to")
    one.add_argument(
        "--vocab-multiple",
        type=_positive(int),  # type: ignore[arg-type]
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of N; must equal the run's model.vocab_multiple (default: 128)",
    )
    two = commands.add_parser("megatron-to-hf", description=_TO_HF, epilog=_EXAMPLES, **shape)  # type: ignore[arg-type]
    two.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run directory, its checkpoints directory (the newest whole one is used), or one checkpoint",
    )
    two.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make; must not hold anything")
    two.add_argument(
        "--shard-gb",
        type=_positive(float),  # type: ignore[arg-type]
        default=5.0,
        metavar="GB",
        help="largest safetensors file, in 10^9 bytes (default: 5)",
    )
    two.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="take tokenizer files from here, not from the checkpoint"
    )
    two.add_argument(
        "--yarn-factor",
        type=_positive(float),  # type: ignore[arg-type]
        metavar="FACTOR",
        help="have config.json ask for YaRN, for sequences longer by this than those of training (default: as the "
        "checkpoint's settings say, section yarn; 1 for none)",
    )
    two.add_argument(
        "--yarn-original",
        type=_positive(int),  # type: ignore[arg-type]
        metavar="TOKENS",
        help="positions that the model was trained on, with --yarn-factor (default: the model's)",
    )
    for command in (one, two):
        command.add_argument(
            "--dtype",
            choices=("keep", "bfloat16", "float32"),
            default="keep",
            help="number format to write; keep is that of the source (default)",
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    # Megatron mentions at length that Transformer Engine and apex are absent, which does not matter here.
    warnings.filterwarnings("ignore", message=".*(not installed|Falling back)")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    start = time.monotonic()
    # A job that is told to end cleans up as one that is interrupted.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = _convert(options)
    except KlearError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, before)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"{done.source} -> {done.out}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.3g} GB, {seconds:.0f} s")
    return EXIT_DONE


def _convert(options: argparse.Namespace) -> Conversion:
    if options.command == "hf-to-megatron":
        from megatron_klear.checkpoint.convert_from_hf import hf_to_megatron

        return hf_to_megatron(options.hf, options.out, vocab_multiple=options.vocab_multiple, dtype=options.dtype)
    from megatron_klear.checkpoint.convert_to_hf import megatron_to_hf
    from megatron_klear.config.yarn import YarnSettings

    yarn = None
    if options.yarn_factor is not None:
        asked = options.yarn_factor if options.yarn_factor > 1 else None
        yarn = YarnSettings(factor=asked, original_positions=options.yarn_original)
    return megatron_to_hf(
        options.checkpoint,
        options.out,
        shard_gb=options.shard_gb,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        yarn=yarn,
    )


if __name__ == "__main__":
    sys.exit(main())
