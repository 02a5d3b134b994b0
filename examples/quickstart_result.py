"""Print the quickstart's last line: held-out accuracy after fine-tuning and after reinforcement learning.

python examples/quickstart_result.py runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Read both runs' result.json; 1 if one of them is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="directory of the quickstart, with sft and rl below it")
    run = parser.parse_args().run
    found = {}
    for kind in ("sft", "rl"):
        path = run / kind / "result.json"
        try:
            found[kind] = json.loads(path.read_text(encoding="utf-8"))
            if found[kind]["accuracy"] is None:
                raise ValueError("no answer could be graded")
        except (OSError, ValueError) as error:
            print(f"{path}: no result ({error}); run bash examples/quickstart.sh again, it resumes", file=sys.stderr)
            return 1
    sft, rl = found["sft"], found["rl"]
    gain = rl["accuracy"] - sft["accuracy"]
    spread = (sft["stderr"] ** 2 + rl["stderr"] ** 2) ** 0.5
    print(f"held-out accuracy gained by reinforcement learning: {gain:+.3f} +- {spread:.3f}")
    print(f"quickstart: accuracy sft={sft['accuracy']:.2f} rl={rl['accuracy']:.2f} n={rl['count']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
