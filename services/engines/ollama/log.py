"""Parses `ollama serve`'s log lines about a load. Pure.

Lines of Ollama 0.24.0 and, where they differ, of 0.30 and later. The log reports at INFO when the runner is up, and up
to 0.24 with OLLAMA_DEBUG=1 also the progress.
"""

from __future__ import annotations

import re

from services.engines.port import Evidence

_PROGRESS = re.compile(r'msg="?model load progress (\d?\.\d+)')
_STARTED = re.compile(r'msg="(?:llama runner|llama-server) started in [\d.]+ seconds"')
_TELLING = ("error loading model", "failed to load", "out of memory", "unable to allocate", "panic:")
LONGEST_LINE = 65_536


class LoadLog:
    """Incremental parser of a log, fed with pieces split anywhere."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[Evidence]:
        """Return the evidence in the lines completed by `text`, in order."""
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest[-LONGEST_LINE:]
        return [evidence for line in lines if (evidence := evidence_in(line)) is not None]


def evidence_in(line: str) -> Evidence | None:
    """Parse one line; None for one without evidence."""
    if _STARTED.search(line):
        return Evidence("initializing_gpu", 1.0)
    found = _PROGRESS.search(line)
    if found is not None:
        fraction = min(1.0, float(found.group(1)))
        return Evidence("loading_weights", fraction, f"{100 * fraction:.0f} % of the weights")
    return None


def first_cause(error: str) -> str:
    """Shorten Ollama's message for a failed load to the telling part.

    Recorded: `llama runner process has terminated: error loading model: missing tensor 'blk.2.attn_k.weight'` with
    `panic: unable to load model: …` on the next line.
    """
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    telling = next((line for line in lines if any(mark in line for mark in _TELLING)), lines[0] if lines else "")
    return telling.removeprefix("llama runner process has terminated: ").strip() or "Ollama gave no reason"
