"""One GGUF file: its metadata, and its list of tensors added up."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.engines.llamacpp.gguf_wire import Cursor, GGUFError, Value, say_bytes

MAX_VALUES = 1 << 16
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""ggml's tensor types: (weights in a block, bytes of a block)."""

# llama.cpp keeps a rearranged copy of weights of these types in RAM, beside the mapped file, where its CPU
# kernels want them so: Q4_0, Q4_K, IQ4_NL and MXFP4 with AVX2; Q8_0, Q5_K and Q6_K as well on ARM.
_ON_ARM = platform.machine().lower() in ("arm64", "aarch64")
REPACKED_TYPES = frozenset({2, 12, 20, 39}) | (frozenset({8, 13, 14}) if _ON_ARM else frozenset())


@dataclass(frozen=True, slots=True)
class Part:
    """What one file holds. Sizes are bytes; `repacked_bytes` are the weights that are copied for the CPU."""

    values: Mapping[str, Value]
    parameters: int
    tensor_bytes: int
    repacked_bytes: int
    data_offset: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One entry of the tensor list; `bytes` is None for a type that is newer than this reader."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int

    @property
    def parameters(self) -> int:
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int | None:
        if self.kind not in BLOCKS:
            return None
        weights, size = BLOCKS[self.kind]
        return self.parameters // weights * size

    @property
    def repacked(self) -> bool:
        looked_up = self.name.startswith("token_embd")  # not multiplied with: it stays as it is
        return self.kind in REPACKED_TYPES and len(self.dimensions) > 1 and not looked_up


def read_part(path: Path) -> Part:
    """Read one file's header. Raises GGUFError in words for people, and OSError."""
    file_bytes = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        cursor = Cursor(file, path.name, file_bytes)
        tensor_count, value_count = _read_counts(cursor, path.name)
        values = {cursor.text(): cursor.value(cursor.u32()) for _ in range(value_count)}
        tensors = [_read_tensor(cursor) for _ in range(tensor_count)]
    data_offset = round_up(cursor.position, _alignment(values, cursor))
    listed = max((t.offset + (t.bytes or 0) for t in tensors), default=0)
    if tensors and data_offset + listed > file_bytes:
        raise GGUFError(
            f"{path.name} ends after {say_bytes(file_bytes)}, but its header lists {say_bytes(listed)} of "
            "weights: the copy may be incomplete."
        )
    known = [t.bytes for t in tensors if t.bytes is not None]
    return Part(
        values=values,
        parameters=sum(t.parameters for t in tensors),
        tensor_bytes=sum(known) if len(known) == len(tensors) else file_bytes - data_offset,
        repacked_bytes=sum(t.bytes or 0 for t in tensors if t.repacked),
        data_offset=data_offset,
        file_bytes=file_bytes,
    )


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _read_counts(cursor: Cursor, name: str) -> tuple[int, int]:
    """The preamble: magic, version, and the counts of tensors and of metadata values."""
    if not cursor.has(4) or cursor.take(4) != b"GGUF":
        raise GGUFError(f"{name} is not a GGUF file.")
    version = cursor.u32()
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            raise GGUFError(f"{name} is a GGUF file for big-endian machines: it can't be used here.")
        raise GGUFError(f"{name} is GGUF version {version}; versions 2 and 3 can be used.")
    tensor_count, value_count = cursor.u64(), cursor.u64()
    if tensor_count > MAX_TENSORS or value_count > MAX_VALUES:
        raise cursor.damaged(f"claims {tensor_count} tensors and {value_count} values")
    return tensor_count, value_count


def _read_tensor(cursor: Cursor) -> _Tensor:
    name, rank = cursor.text(), cursor.u32()
    if rank > MAX_DIMENSIONS:
        raise cursor.damaged(f"holds a tensor of {rank} dimensions")
    dimensions = tuple(cursor.u64() for _ in range(rank))
    return _Tensor(name, dimensions, cursor.u32(), cursor.u64())


def _alignment(values: Mapping[str, Value], cursor: Cursor) -> int:
    value = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value < 1:
        raise cursor.damaged(f"asks for an alignment of {value}")
    return value
