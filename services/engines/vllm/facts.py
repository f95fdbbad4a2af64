"""Parses figures from a vLLM server's log: sizes, durations, its version. Pure.

Lines of vLLM 0.5 to 0.33.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from services.sizes import GIB

CONTEXT_BYTES = GIB
"""Approximate size of the CUDA context on a device, beside the allocations in it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Figures that a start has logged: bytes, seconds and tokens; None if not logged.

    With several workers, sizes are per device: the largest need, and the smallest space left for the cache.
    `kv_shortage_bytes` is what was missing for any cache; `max_concurrency` is the number of requests with the longest
    context that fit at once; `load_seconds` includes a download.
    """

    version: str | None = None
    max_model_len: int | None = None
    checkpoint_bytes: int | None = None
    download_seconds: float | None = None
    weights_seconds: float | None = None
    weights_bytes: int | None = None
    load_seconds: float | None = None
    compile_seconds: float | None = None
    profile_seconds: float | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    kv_shortage_bytes: int | None = None
    max_concurrency: float | None = None
    graph_bytes: int | None = None
    graph_seconds: float | None = None
    init_seconds: float | None = None


def footprint(facts: Facts) -> int | None:
    """Return the bytes a ready server holds per device, by its log; None if too little was logged.

    The sum of weights, cache, graphs and the device's context, which is not logged.
    """
    if facts.weights_bytes is None or facts.kv_cache_bytes is None:
        return None
    return facts.weights_bytes + facts.kv_cache_bytes + (facts.graph_bytes or 0) + CONTEXT_BYTES


def learn(facts: Facts, line: str) -> Facts:
    """Return the facts with those in `line` added."""
    for mark, pattern in _FACTS:
        found = pattern.search(line) if mark in line else None
        if found is not None:
            said = {name: _value(name, text) for name, text in found.groupdict().items() if text}
            new = {name: value for name, value in said.items() if _counts(name, getattr(facts, name), value)}
            facts = replace(facts, **new) if new else facts
    return facts


def _counts(name: str, known: Any, value: Any) -> bool:
    """Whether a value replaces the known one."""
    if known is None or name == "version":
        return bool(known != value)
    return bool(value < known if name in _SMALLEST_COUNTS else value > known)


def _value(name: str, text: str) -> Any:
    if name == "version":
        return text
    if name.endswith("_bytes"):
        return round(float(text) * GIB)
    if name in ("kv_cache_tokens", "max_model_len"):
        return int(text.replace(",", ""))
    return float(text)


_N = r"\d{1,12}(?:\.\d{1,9})?"
_FACTS = tuple(
    (mark, re.compile(pattern))
    for mark, pattern in (
        (" LLM engine (v", r"LLM engine \(v(?P<version>\w[\w.+-]{0,60})\)"),
        ("max_seq_len=", r"max_seq_len=(?P<max_model_len>\d{1,12})"),
        ("  version ", r"█ {1,8}version (?P<version>\d[\w.+-]{0,60})"),
        ("API server version ", r"API server version (?P<version>\d[\w.+-]{0,60})"),
        ("Using max model len ", r"Using max model len (?P<max_model_len>\d{1,12})"),
        ("Checkpoint size: ", rf"Checkpoint size: (?P<checkpoint_bytes>{_N}) GiB"),
        ("downloading weights for ", rf"weights for .{{1,300}}?: (?P<download_seconds>{_N}) seconds"),
        ("Loading weights took ", rf"Loading weights took (?P<weights_seconds>{_N}) seconds"),
        ("Loading model weights took ", rf"weights took (?P<weights_bytes>{_N}) GB"),  # 0.6 and before mean GiB
        (
            "Model loading took ",  # 0.7 and 0.8.1 mean GiB where they say GB
            rf"Model loading took (?P<weights_bytes>{_N}) Gi?B(?:(?: memory)? and (?P<load_seconds>{_N}) seconds)?",
        ),
        ("torch.compile t", rf"torch\.compile (?:takes|took) (?P<compile_seconds>{_N}) s"),
        ("/warmup run took ", rf"profiling/warmup run took (?P<profile_seconds>{_N}) s"),
        ("Memory profiling takes ", rf"Memory profiling takes (?P<profile_seconds>{_N}) s"),
        (
            "Available KV cache memory: ",
            rf"KV cache memory: (?:-(?P<kv_shortage_bytes>{_N})|(?P<kv_cache_bytes>{_N})) GiB",
        ),
        ("reserved for KV Cache is ", rf"reserved for KV Cache is (?P<kv_cache_bytes>{_N}) ?GiB"),
        (" GiB for KV cache", rf"set \((?P<kv_cache_bytes>{_N})/{_N}\) GiB for KV cache"),
        ("KV cache size: ", r"KV cache size: (?P<kv_cache_tokens>\d[\d,]{0,15}) tokens"),
        ("Maximum concurrency for ", rf"tokens per request: (?P<max_concurrency>{_N})x"),
        (
            "Graph capturing finished in ",
            rf"finished in (?P<graph_seconds>{_N}) secs(?:, took (?P<graph_bytes>{_N}) GiB)?",
        ),
        ("init engine (", rf"init engine \(.{{0,80}}?\) took (?P<init_seconds>{_N}) s"),
    )
)
_SMALLEST_COUNTS = ("max_model_len", "kv_cache_bytes", "kv_cache_tokens", "max_concurrency")

MARKS = tuple(mark for mark, _ in _FACTS)
"""A line without any of these contains no fact."""
