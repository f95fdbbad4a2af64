"""`python -m bench.fuzz_gguf SECONDS [SEED]`: fuzz the GGUF reader with random corrupt headers for a given time.

A header that breaks the reader is written to `tests/unit/gguf_cases/`, which the unit tests read from then on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path

from bench.rig import ROOT
from tests.support.gguf_files import check, random_header

CASES = ROOT / "tests" / "unit" / "gguf_cases"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_gguf", description="Fuzz the GGUF header reader.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int, nargs="?", default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    seed, readable = arguments.seed, 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < deadline:
            content = random_header(random.Random(seed))
            try:
                readable += check(content, Path(folder) / "m.gguf")
            except Exception as error:
                case = CASES / f"{hashlib.sha256(content).hexdigest()[:12]}.gguf.gz"
                case.write_bytes(gzip.compress(content, mtime=0))
                print(
                    f"seed {seed}: {type(error).__name__}: {error}; kept as {case.relative_to(ROOT)}", file=sys.stderr
                )
                return 1
            seed += 1
    print(f"{seed - arguments.seed} headers, {readable} of them readable, from seed {arguments.seed}: nothing broke.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
