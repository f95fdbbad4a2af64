"""`python -m bench`: measure every figure of the README's table, side by side in one run on this machine.

--only NAME     run one group; may be repeated
--short         do a twentieth of everything: whether it works, not how fast
--models DIR    GGUF files to measure with (models/)
--json FILE     also write the figures as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from bench import chats, forecasting, page, polling, relaying, starting, switching
from bench.figures import Row, table
from bench.rig import ROOT, Rig

GROUPS: Mapping[str, Callable[[Rig], Iterator[Row]]] = {
    "switch": switching.measure,
    "relay": relaying.measure,
    "tabs": polling.measure,
    "start": starting.measure,
    "eta": forecasting.measure,
    "page": page.measure,
    "chats": chats.measure,
}
"""Run in this order: `tabs` reports the memory after the load of `relay`."""
BUSY = 0.5


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # unwinds, so that child processes are ended
    began, load = time.monotonic(), os.getloadavg()[0]
    if load > BUSY * (os.cpu_count() or 1):
        print(f"This machine is busy (load average {load:.1f}): expect noise.", file=sys.stderr)
    rows: list[Row] = []
    with Rig(arguments.models, short=arguments.short) as rig:
        for name in arguments.only or GROUPS:
            print(f"measuring: {name}", file=sys.stderr)
            rows += GROUPS[name](rig)
    machine = f"{os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}"
    footer = f"{machine}; load average before: {load:.1f}; measured in {time.monotonic() - began:.0f} s."
    print(f"{table(rows)}\n\n{footer}")
    if arguments.json:
        document = {"machine": machine, "load_average_before": load, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the figures of the README's table.")
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="NAME", help=f"of {', '.join(GROUPS)}")
    parser.add_argument(
        "--short", action="store_true", help="a twentieth of everything: whether it works, not how fast"
    )
    parser.add_argument("--models", type=Path, default=ROOT / "models", metavar="DIR", help="GGUF files (models/)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
