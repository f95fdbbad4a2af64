"""What `ollama serve` logs about a load, as evidence. Pure.

Lines of Ollama 0.24.0 and, where they differ, of 0.30 and later. The API tells nothing about a load under way. The log
does: at INFO when the runner is up, with OLLAMA_DEBUG=1 up to 0.24 also how far it is.
"""

from __future__ import annotations

import re

from services.engines.port import Evidence

_PROGRESS = re.compile(r'msg="?model load progress (\d?\.\d+)')
_STARTED = re.compile(r'msg="(?:llama runner|llama-server) started in [\d.]+ seconds"')
_TELLING = ("error loading model", "failed to load", "out of memory", "unable to allocate", "panic:")
LONGEST_LINE = 65_536


class LoadLog:
    """Reads a growing log; give it each new piece, split anywhere."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[Evidence]:
        """What the whole lines in it say, in order."""
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest[-LONGEST_LINE:]
        return [evidence for line in lines if (evidence := evidence_in(line)) is not None]


def evidence_in(line: str) -> Evidence | None:
    """What one line says about a load; None for the many that say nothing."""
    if _STARTED.search(line):
        return Evidence("initializing_gpu", 1.0)
    found = _PROGRESS.search(line)
    if found is not None:
        fraction = min(1.0, float(found.group(1)))
        return Evidence("loading_weights", fraction, f"{100 * fraction:.0f} % of the weights")
    return None


def first_cause(error: str) -> str:
    """Ollama's words for a failed load, cut to the telling part and without what only its developers need.

    Recorded: `llama runner process has terminated: error loading model: missing tensor 'blk.2.attn_k.weight'` with
    `panic: unable to load model: …` on the next line.
    """
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    telling = next((line for line in lines if any(mark in line for mark in _TELLING)), lines[0] if lines else "")
    return telling.removeprefix("llama runner process has terminated: ").strip() or "Ollama gave no reason"
