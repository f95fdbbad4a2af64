"""`make soak OPERATIONS=1000 SEED=7`: print what happened; exit code 1 if an invariant was violated."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.faults import FAULTS
from tests.soak.run import CLIENTS, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("operations", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--keep", type=Path, help="folder in which the console's state and logs are kept")
    parser.add_argument("--faults", default="all", help='words in names of faults to run ("disk,Docker"); none')
    arguments = parser.parse_args()
    faults = [
        f for f in FAULTS if arguments.faults == "all" or any(part in f.name for part in arguments.faults.split(","))
    ]
    began = time.monotonic()
    print(f"soak: {arguments.operations} operations by {CLIENTS} clients, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        record = soak(
            arguments.keep or Path(folder),
            arguments.operations,
            arguments.seed,
            lambda words: print(words, flush=True),
            faults,
        )
    print(record.summary())
    print(f"{time.monotonic() - began:.0f} s in all")
    return 1 if record.violations else 0


if __name__ == "__main__":
    sys.exit(main())
