"""Bytes that a browser fetches to show the first page for the first time: its HTML, script and stylesheet.

Sizes are those of the bodies on the wire, compressed where the server compresses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bench import wire
from bench.figures import Row
from bench.rig import Rig
from tests.support.console import Console

TARGET_KB = 60.0
_SCRIPT = re.compile(r'<script[^>]*\ssrc="([^"]+)"')
_STYLE = re.compile(r'<link[^>]*\srel="stylesheet"[^>]*\shref="([^"]+)"')


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.fake_engine_console
    page = console.get("/").text
    scripts, styles = _SCRIPT.findall(page), _STYLE.findall(page)
    sizes = {path: _bytes(console, path) for path in ("/", *scripts, *styles)}
    kilobytes = sum(sizes.values()) / 1000
    few = len(scripts) == 1 and len(styles) == 1
    yield Row(
        "first page",
        f"{kilobytes:.1f} KB compressed (HTML {sizes['/'] / 1000:.1f}, scripts {_sum(sizes, scripts):.1f}, "
        f"stylesheets {_sum(sizes, styles):.1f}), {len(scripts)} script, {len(styles)} stylesheet",
        f"< {TARGET_KB:.0f} KB compressed, one script, one stylesheet",
        kilobytes < TARGET_KB and few,
        {"kilobytes": kilobytes, "scripts": len(scripts), "stylesheets": len(styles)},
    )


def _bytes(console: Console, path: str) -> int:
    with wire.Wire(console.port) as connection:
        request = wire.get(path, Accept="text/html,*/*", Accept_Encoding="gzip, deflate, br")
        return len(connection.ask_well(request).body)


def _sum(sizes: dict[str, int], paths: list[str]) -> float:
    return sum(sizes[path] for path in paths) / 1000
