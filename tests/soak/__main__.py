"""`make soak OPERATIONS=1000 SEED=7`: prints what was seen, and ends with exit code 1 when a promise was broken."""

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
    parser.add_argument("--keep", type=Path, help="folder for the console's state and logs, which stays")
    parser.add_argument("--faults", default="all", help='parts of the names of faults, such as "disk,Docker"; or none')
    asked = parser.parse_args()
    faults = [f for f in FAULTS if asked.faults == "all" or any(part in f.name for part in asked.faults.split(","))]
    began = time.monotonic()
    print(f"soak: {asked.operations} operations by {CLIENTS} clients, seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        record = soak(
            asked.keep or Path(folder), asked.operations, asked.seed, lambda words: print(words, flush=True), faults
        )
    print(record.summary())
    print(f"{time.monotonic() - began:.0f} s in all")
    return 1 if record.broken else 0


if __name__ == "__main__":
    sys.exit(main())
