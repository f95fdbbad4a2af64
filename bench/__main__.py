"""`python -m bench`: measure every figure of the README's table, side by side in one run on this machine.

--only NAME     run one group; may be repeated
--short         do a twentieth of everything: whether it works, not how fast
--models DIR    GGUF files to measure with (models/)
--json FILE     also write the figures as JSON

A run of everything that isn't short also writes what it prints to bench/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import chats, crowd, forecasting, machine, page, polling, relaying, starting, switching, timeline
from bench.figures import Row, table
from bench.rig import ROOT, Rig

GROUPS: Mapping[str, Callable[[Rig], Iterator[Row]]] = {
    "switch": switching.measure,
    "relay": relaying.measure,
    "tabs": polling.measure,
    "streams": crowd.measure,
    "start": starting.measure,
    "eta": forecasting.measure,
    "page": page.measure,
    "chats": chats.measure,
}
"""Run in this order: `tabs` reports the memory after the load of `relay`."""
TIMELINE = "timeline"
"""The last group; it gives a table of its own."""
NAMES = (*GROUPS, TIMELINE)
RESULTS = Path(__file__).with_name("results.md")
BUSY = 0.5


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # unwinds, so that child processes are ended
    began, load = time.monotonic(), os.getloadavg()[0]
    if load > BUSY * (os.cpu_count() or 1):
        print(f"This machine is busy (load average {load:.1f}): expect noise.", file=sys.stderr)
    rows: list[Row] = []
    timelines: list[timeline.Timeline] = []
    with Rig(arguments.models, short=arguments.short) as rig:
        for name in arguments.only or NAMES:
            print(f"measuring: {name}", file=sys.stderr)
            if name == TIMELINE:
                timelines += timeline.measure(rig)
            else:
                rows += GROUPS[name](rig)
    footer = (
        f"{machine.describe()}; load average before: {load:.1f}; measured in {time.monotonic() - began:.0f} s"
        f"{', a short run: its figures say nothing' if arguments.short else ''}."
    )
    report = _report(rows, timelines, footer)
    print(report)
    if not arguments.short and not arguments.only:
        RESULTS.write_text(f"# What `make bench` printed last\n\n{report}\n", encoding="utf-8")
    if arguments.json:
        document = {
            "machine": footer,
            "load_average_before": load,
            "rows": [asdict(row) for row in rows],
            "timelines": [asdict(each) for each in timelines],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _report(rows: Sequence[Row], timelines: Sequence[timeline.Timeline], footer: str) -> str:
    """What was measured, as Markdown."""
    parts = [table(rows)] if rows else []
    if timelines:
        parts += [f"{timeline.CAPTION}:", timeline.table(timelines)]
    return "\n\n".join([*parts, footer])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the figures of the README's table.")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--short", action="store_true", help="a twentieth of everything: whether it works, not how fast"
    )
    parser.add_argument("--models", type=Path, default=ROOT / "models", metavar="DIR", help="GGUF files (models/)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
