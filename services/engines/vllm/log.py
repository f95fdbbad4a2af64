"""Parses a vLLM server's start-up log into evidence, facts and failures. Pure.

Lines of vLLM 0.5 to 0.33, on GPUs and CPUs. Prefixes differ by version, so patterns are not anchored; lines can be
missing (eager mode, a warm compile cache, a single shard); progress bars are redrawn after `\\r`, and text can follow a
bar on its line.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import replace

from services.engines.port import STAGE_ORDER, Evidence
from services.engines.vllm.facts import MARKS as FACT_MARKS
from services.engines.vllm.facts import Facts, learn
from services.engines.vllm.failures import MARKS as FAILURE_MARKS
from services.engines.vllm.failures import Diagnosis, FailureLog
from services.sizes import format_part, format_size

LONGEST_LINE = 16_384
"""Characters read per line; vLLM's longest line, its configuration, has about 4000."""
LONGEST_BAR = 600


class VllmLog:
    """Incremental parser of one start's output, fed with pieces split anywhere.

    `shard_bytes` are the sizes of the files in loading order, if known, because vLLM logs the number of shards only.
    `downloads`: the weights have to be downloaded first. vLLM says that it loads a model before it downloads it, and
    nothing during the download, so everything before the first shard is reported as the download.
    """

    def __init__(self, *, shard_bytes: Sequence[int] = (), downloads: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._shard_bytes = shard_bytes
        self._downloads = downloads
        self._last: Evidence | None = None
        self._failures = FailureLog()
        self.facts = Facts()
        self.ready = False
        """The log says that it serves; its endpoints have to confirm that."""

    @property
    def failure(self) -> Diagnosis | None:
        """Why it failed to start, or ended later; None without a sign of either."""
        return self._failures.failure

    def feed(self, data: bytes | str) -> list[Evidence]:
        """Return new evidence in order: stages never go back, and neither do fractions."""
        text = self._decoder.decode(data) if isinstance(data, bytes) else data
        *lines, rest = (self._rest + text).replace("\r", "\n").split("\n")
        self._rest = rest[:LONGEST_LINE]
        evidence: list[Evidence] = []
        for line in lines:
            evidence += self._read(line[:LONGEST_LINE])
        if not self.ready and len(self._rest) <= LONGEST_BAR and "%" in self._rest:
            # A bar's line is terminated only when it is redrawn.
            evidence += self._news(_bar(_plain(self._rest), self._shard_bytes))
        return evidence

    def _read(self, line: str) -> list[Evidence]:
        if self.ready:
            if says_failure(line):
                self._read_failure(_plain(line))
            return []
        evidence: list[Evidence] = []
        if says_progress(line):
            line = _plain(line)
            evidence += self._news(_bar(line, self._shard_bytes))
            self.facts = learn(self.facts, line)
            evidence += self._news(self._phase(line))
            if "Application startup complete." in line:
                self.ready = True
                self._failures.serve()
        if says_failure(line):
            self._read_failure(_plain(line))
        return evidence

    def _read_failure(self, line: str) -> None:
        level, message = _split(line)
        short = self.facts.kv_shortage_bytes
        self._failures.read(level, message, {} if short is None else {"missing": format_size(short)})

    def _phase(self, line: str) -> Evidence | None:
        for mark, evidence in _PHASES:
            if mark in line:
                if self._downloads and evidence == _LOADING:
                    return Evidence("downloading")
                if mark == "KV cache size:" and self.facts.kv_cache_tokens is not None:
                    return replace(evidence, detail=f"cache for {self.facts.kv_cache_tokens} tokens")
                return evidence
        return None

    def _news(self, evidence: Evidence | None) -> list[Evidence]:
        """Return the evidence, unless its stage is over or it says nothing new."""
        if evidence is None:
            return []
        last = self._last
        if last is not None:
            if STAGE_ORDER.index(evidence.stage) < STAGE_ORDER.index(last.stage):
                return []
            if evidence.stage == last.stage and not _goes_on(last, evidence):
                return []
        self._last = evidence
        return [evidence]


def _goes_on(last: Evidence, new: Evidence) -> bool:
    """Whether evidence of the same stage adds anything: a larger fraction, or a new detail for the same one."""
    if last.fraction is None or new.fraction is None:
        return last.fraction is None and new != last and (new.fraction is not None or new.detail is not None)
    return new.fraction > last.fraction or (
        new.fraction == last.fraction and new.detail is not None and new.detail != last.detail
    )


def says_progress(line: str) -> bool:
    """Cheap filter: whether a line may contain a stage or a fact."""
    return any(mark in line for mark in _PROGRESS_MARKS)


def says_failure(line: str) -> bool:
    """Cheap filter: whether a line may contain a failure."""
    return any(mark in line for mark in FAILURE_MARKS)


_ESCAPE = re.compile(r"\x1b\[[\d;]{0,20}[A-Za-z]")


def _plain(line: str) -> str:
    """Remove the colours that vLLM 0.10 and later print on a terminal."""
    return _ESCAPE.sub("", line) if "\x1b" in line else line


_HEADER = re.compile(
    r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,6})? "
    r"(?:\[[^\]\s]{1,100}\]|[\w./]{1,100}:\d{1,6}\]) ?"
)
"""`INFO 11-21 02:47:33 [api_utils.py:347] ` since 0.8, `INFO 11-21 02:47:33 api_server.py:339] ` before."""
_UVICORN = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL): {1,6}")
_PROCESS = re.compile(r"(?:\[rank\d{1,4}\]: ?|\(\w{1,60} pid=\d{1,10}[^)]{0,60}\) ?){1,4}")


def _split(line: str) -> tuple[str, str]:
    """Split a line into its level (empty if none) and its text, with indentation.

    The first header counts; everything after it is the message, whatever it quotes.
    """
    process = _PROCESS.match(line)
    if process is not None:
        line = line[process.end() :]
    header = _HEADER.search(line) or _UVICORN.match(line)
    return (header.group(1), line[header.end() :]) if header is not None else ("", line)


_SHARDS = re.compile(r"(shards)?: {0,4}\d{1,3}% Completed \| {0,8}(\d{1,7})/(\d{1,7}) \[")
_GRAPHS = re.compile(r"Capturing CUDA graph([^:]{0,80}): {0,4}\d{1,3}%\|[^|]{0,400}\| {0,8}(\d{1,7})/(\d{1,7}) \[")
_GRAPH_SHARES = {"mixed": (0.0, 0.45), "decode": (0.45, 0.9)}
"""From 0.11 on there are two rounds of capturing, `(mixed prefill-decode, PIECEWISE)` and `(decode, FULL)`; before that
one, unnamed."""


def _bar(line: str, shard_bytes: Sequence[int]) -> Evidence | None:
    """Parse a progress bar; it counts only if complete up to its `[`, so that a partial one can't be misread."""
    shards = _SHARDS.search(line)
    if shards is not None:
        words = "shards" if shards.group(1) else "parts"
        return _shards_read(int(shards.group(2)), int(shards.group(3)), words, shard_bytes)
    graphs = _GRAPHS.search(line)
    if graphs is None:
        return None
    done, total = int(graphs.group(2)), int(graphs.group(3))
    low, high = next((s for name, s in _GRAPH_SHARES.items() if name in graphs.group(1)), (0.0, 0.9))
    return Evidence("warming_up", low + (high - low) * _fraction(done, total), f"{done} of {total} graphs")


def _shards_read(done: int, total: int, words: str, shard_bytes: Sequence[int]) -> Evidence:
    """Return the shards read, with bytes if `shard_bytes` has as many files as vLLM counts."""
    counted = f"{done} of {total} {words}"
    size = sum(shard_bytes)
    if len(shard_bytes) != total or not size:
        return Evidence("loading_weights", _fraction(done, total), counted)
    read = sum(shard_bytes[:done])
    return Evidence("loading_weights", _fraction(read, size), f"{counted}, {format_part(read, size)}")


def _fraction(done: int, total: int) -> float:
    return min(1.0, done / total) if total else 0.0


_LOADING = Evidence("loading_weights")
_UP = Evidence("warming_up", 1.0)
_PHASES: tuple[tuple[str, Evidence], ...] = (
    ("Starting to load model", _LOADING),
    ("Loading model from scratch", _LOADING),
    ("Time spent downloading weights", Evidence("downloading", 1.0)),
    ("Loading weights took", Evidence("loading_weights", 1.0)),
    ("Model loading took", Evidence("loading_weights", 1.0)),
    ("Loading model weights took", Evidence("loading_weights", 1.0)),
    ("Using cache directory", Evidence("initializing_gpu", 0.1, "compiling")),
    ("Dynamo bytecode transform time", Evidence("initializing_gpu", 0.2, "compiling")),
    ("Cache the graph", Evidence("initializing_gpu", 0.4, "compiling")),
    ("Compiling a graph", Evidence("initializing_gpu", 0.6, "compiling")),
    ("Directly load ", Evidence("initializing_gpu", 0.6, "compiled before")),
    ("torch.compile take", Evidence("initializing_gpu", 0.75, "compiled")),
    ("torch.compile took", Evidence("initializing_gpu", 0.75, "compiled")),
    ("Warming up model for the compilation", Evidence("initializing_gpu", None, "compiling for this CPU")),
    ("Initial profiling/warmup run took", Evidence("initializing_gpu", 0.8, "measuring memory")),
    ("Memory profiling takes", Evidence("initializing_gpu", 0.8, "measuring memory")),
    ("Warming up done", Evidence("initializing_gpu", 0.9)),
    ("Profiling CUDA graph memory", Evidence("initializing_gpu", 0.85, "measuring memory")),
    ("Available KV cache memory", Evidence("initializing_gpu", 0.95, "setting up its cache")),
    ("KV cache size:", Evidence("initializing_gpu", 1.0)),
    ("GPU blocks: ", Evidence("initializing_gpu", 1.0)),
    ("cuda blocks: ", Evidence("initializing_gpu", 1.0)),
    ("cpu blocks: ", Evidence("initializing_gpu", 1.0)),
    ("Capturing the model for CUDA graphs", Evidence("warming_up")),
    ("Capturing cudagraphs for decoding", Evidence("warming_up")),
    ("Graph capturing finished in", Evidence("warming_up", 0.95)),
    ("init engine (", _UP),
    ("Starting vLLM server on", _UP),
    ("Starting vLLM API server", _UP),
    ("Available routes are:", _UP),
    ("Application startup complete.", _UP),
)
"""Lines that mark a step, in the order of a start. A fraction is the usual progress of the stage at that line;
compilation on a CPU has none, so that past loads determine its progress. vLLM calls that a warm-up, but it counts as
initialisation as on a GPU, because the cache is set up after it."""

_PROGRESS_MARKS = tuple(
    dict.fromkeys(("% Completed | ", "Capturing CUDA graph", *(mark for mark, _ in _PHASES), *FACT_MARKS))
)
