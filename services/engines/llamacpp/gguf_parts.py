"""Reads one GGUF file: its metadata, and the sums of its tensor list."""

from __future__ import annotations

import math
import os
import platform
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.engines.llamacpp.gguf_wire import Budget, Cursor, GGUFError, Value
from services.sizes import format_size

MAX_DIMENSIONS = 4
MAX_PARAMETERS = 1 << 63
MAX_KEPT = 64
NAME_BYTES = 64
"""llama.cpp's limit of a tensor name."""
DEFAULT_ALIGNMENT = 32

KEPT = frozenset(
    {
        "general.architecture",
        "general.name",
        "general.description",
        "general.alignment",
        "tokenizer.ggml.tokens",
        "tokenizer.chat_template",
    }
)
KEPT_OF_ARCHITECTURE = frozenset(
    {
        "context_length",
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
    }
)
"""Keys below any architecture's prefix, because a file may name its architecture last."""

BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""ggml's tensor types: (weights per block, bytes per block)."""

# llama.cpp keeps a repacked copy of weights of these types in RAM, beside the mapped file, for its CPU kernels: Q4_0,
# Q4_K, IQ4_NL and MXFP4 with AVX2; also Q8_0, Q5_K and Q6_K on ARM.
_ON_ARM = platform.machine().lower() in ("arm64", "aarch64")
REPACKED_TYPES = frozenset({2, 12, 20, 39}) | (frozenset({8, 13, 14}) if _ON_ARM else frozenset())


@dataclass(frozen=True, slots=True)
class GgufPart:
    """Header of one file. Sizes are bytes; `repacked_bytes` is the size of the weights that are copied for the CPU.

    `values` has the keys in KEPT and KEPT_OF_ARCHITECTURE.
    """

    values: Mapping[str, Value]
    parameters: int
    tensor_bytes: int
    repacked_bytes: int
    data_offset: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One entry of the tensor list; `bytes` is None for an unknown type."""

    name: str
    rank: int
    parameters: int
    kind: int
    offset: int

    @property
    def bytes(self) -> int | None:
        if self.kind not in BLOCKS:
            return None
        weights, size = BLOCKS[self.kind]
        return self.parameters // weights * size

    @property
    def repacked(self) -> bool:
        looked_up = self.name.startswith("token_embd")  # a lookup table, not multiplied with: never repacked
        return self.kind in REPACKED_TYPES and self.rank > 1 and not looked_up


@dataclass(slots=True)
class _Weights:
    """Running sums of the tensor list, which may have a hundred thousand entries."""

    parameters: int = 0
    known_bytes: int = 0
    repacked_bytes: int = 0
    end: int = 0
    all_known: bool = True

    def add(self, tensor: _Tensor) -> None:
        size = tensor.bytes
        self.parameters += tensor.parameters
        self.all_known = self.all_known and size is not None
        self.known_bytes += size or 0
        self.repacked_bytes += (size or 0) if tensor.repacked else 0
        self.end = max(self.end, tensor.offset + (size or 0), self.known_bytes)


def read_part(path: Path, budget: Budget) -> GgufPart:
    """Read one file's header within `budget`. Raises GGUFError and OSError."""
    with _open(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        cursor = Cursor(file, path.name, file_bytes, budget)
        tensor_count, value_count = _read_counts(cursor, path.name, budget)
        values = _read_values(cursor, value_count)
        weights = _Weights()
        for _ in range(tensor_count):
            weights.add(_read_tensor(cursor))
    data_offset = round_up(cursor.position, _alignment(values, cursor))
    if tensor_count and data_offset + weights.end > file_bytes:
        raise GGUFError(
            f"{path.name} ends after {format_size(file_bytes)}, but its header lists {format_size(weights.end)} of "
            "weights: the copy may be incomplete."
        )
    return GgufPart(
        values=values,
        parameters=weights.parameters,
        tensor_bytes=weights.known_bytes if weights.all_known else file_bytes - data_offset,
        repacked_bytes=weights.repacked_bytes,
        data_offset=data_offset,
        file_bytes=file_bytes,
    )


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _open(path: Path) -> BinaryIO:
    """Open a regular file. Raises GGUFError for anything else: reading a pipe would block for ever."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise GGUFError(f"{path.name} is not a file.")
    return os.fdopen(number, "rb", buffering=0)


def _read_counts(cursor: Cursor, name: str, budget: Budget) -> tuple[int, int]:
    """Read the preamble: magic, version; return the numbers of tensors and of metadata values."""
    if not cursor.has_bytes(1):
        raise GGUFError(f"{name} is empty: the copy may be incomplete.")
    if not cursor.has_bytes(4) or cursor.read(4) != b"GGUF":
        raise GGUFError(f"{name} is not a GGUF file.")
    version = cursor.u32()
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            raise GGUFError(f"{name} is a GGUF file for big-endian machines: it can't be used here.")
        raise GGUFError(f"{name} is GGUF version {version}; versions 2 and 3 can be used.")
    tensor_count, value_count = cursor.u64(), cursor.u64()
    budget.tensors -= tensor_count
    budget.values -= value_count
    if budget.tensors < 0 or budget.values < 0:
        raise cursor.damaged(f"claims {tensor_count} tensors and {value_count} values")
    return tensor_count, value_count


def _read_values(cursor: Cursor, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for _ in range(count):
        key, kind = cursor.key(), cursor.u32()
        if key not in KEPT and key.partition(".")[2] not in KEPT_OF_ARCHITECTURE:
            cursor.skip_value(kind)
            continue
        values[key] = cursor.value(kind)
        if len(values) > MAX_KEPT:
            raise cursor.damaged("speaks of more than one model")
    return values


def _read_tensor(cursor: Cursor) -> _Tensor:
    name, rank = cursor.text(NAME_BYTES), cursor.u32()
    if rank > MAX_DIMENSIONS:
        raise cursor.damaged(f"holds a tensor of {rank} dimensions")
    parameters = math.prod(cursor.u64() for _ in range(rank))
    if parameters >= MAX_PARAMETERS:
        raise cursor.damaged("holds a tensor of more than 2^63 weights")
    return _Tensor(name, rank, parameters, cursor.u32(), cursor.u64())


def _alignment(values: Mapping[str, Value], cursor: Cursor) -> int:
    value = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value < 1 or value & (value - 1):
        raise cursor.damaged(f"asks for an alignment of {value}")
    return value
