"""The machine and the programs of a run in words: what anyone needs to know who compares its figures with others."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bench.peers import PEERS
from version import VERSION

CPUINFO = Path("/proc/cpuinfo")


def describe() -> str:
    """Date, processors, memory, kernel and versions, as part of a sentence."""
    peers = [f"{peer.name} {peer.version() or 'of an unknown version'}" for peer in PEERS if peer.found is not None]
    facts = (
        datetime.now(UTC).strftime("%Y-%m-%d"),
        f"{os.cpu_count()} processors ({_processor()})",
        f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        f"{platform.system()} {platform.release().partition('-')[0]}",  # without what a build adds
        f"Python {platform.python_version()}",
        f"Switchyard {VERSION}",
        *peers,
    )
    return ", ".join(facts)


def _processor() -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
