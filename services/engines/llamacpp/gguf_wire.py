"""Reads the primitives of a GGUF header in bounded memory: numbers, strings, arrays.

Lengths from the file are checked against what is left of it before anything is allocated; only requested values are
built, cut to a limit. A crafted header of 64 MB once took 2.7 GB.
"""

from __future__ import annotations

import codecs
import struct
from dataclasses import dataclass
from typing import BinaryIO

from services.sizes import format_size

CHUNK = 1 << 18
MAX_HEADER_BYTES = 256 << 20
MAX_KEY_BYTES = (1 << 16) - 1
"""The format's own limit."""
KEPT_TEXT_BYTES = 4096
KEPT_ITEMS = 1024
MAX_VALUES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_STRINGS = 1 << 22
"""About 0.5 s of processor time. The largest vocabularies have 262,144 tokens and twice as many merges (2026)."""

STRING, ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _CODES.items()}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


class GGUFError(Exception):
    """A file can't be used as a model. The text is for people: which file, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An array that was skipped: only the number of its items is known."""

    count: int


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | Skipped


@dataclass(slots=True)
class Budget:
    """Numbers of values, tensors and strings that may still be read, over all files of a model.

    Limits processor time.
    """

    values: int = MAX_VALUES
    tensors: int = MAX_TENSORS
    strings: int = MAX_STRINGS


class Cursor:
    """Reads a little-endian file forwards. Every method raises GGUFError if the file ends too early."""

    def __init__(self, file: BinaryIO, name: str, size: int, budget: Budget) -> None:
        self._file = file
        self._name = name
        self._size = size
        self._budget = budget
        self._start = 0
        self._buffer = b""
        self._offset = 0

    @property
    def position(self) -> int:
        return self._start + self._offset

    def has_bytes(self, count: int) -> bool:
        return self.position + count <= self._size

    def read(self, count: int) -> bytes:
        self._need(count)
        self._offset += count
        return self._buffer[self._offset - count : self._offset]

    def u32(self) -> int:
        return int(self._number(_U32))

    def u64(self) -> int:
        return int(self._number(_U64))

    def key(self) -> str:
        length = self.u64()
        if length > MAX_KEY_BYTES:
            raise self.damaged(f"holds a key of {length} bytes")
        return self.read(length).decode("utf-8", errors="replace")

    def text(self, max_bytes: int = KEPT_TEXT_BYTES) -> str:
        """Read a string, cut to `max_bytes` (a chat template may be long)."""
        length = self.u64()
        kept = min(length, max_bytes)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self.read(kept), final=kept == length)  # drops a character that was cut in two
        self._skip(length - kept)
        return text

    def value(self, kind: int) -> Value:
        """Read a metadata value of the given GGUF type."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        return self._number(self._scalar(kind))

    def skip_value(self, kind: int) -> None:
        """Skip a metadata value of the given GGUF type."""
        if kind == STRING:
            self._skip(self.u64())
        elif kind == ARRAY:
            self._skip_items(*self._array_head())
        else:
            self._skip(self._scalar(kind).size)

    def damaged(self, what: str) -> GGUFError:
        return GGUFError(f"{self._name} {what}: the file is damaged.")

    def _array_head(self) -> tuple[int, int]:
        """Read the type and number of an array's items."""
        kind, count = self.u32(), self.u64()
        if kind == ARRAY:
            raise self.damaged("holds an array of arrays")
        return kind, count

    def _array(self) -> tuple[Scalar, ...] | Skipped:
        kind, count = self._array_head()
        if kind == STRING or count > KEPT_ITEMS:
            self._skip_items(kind, count)
            return Skipped(count)
        item = self._scalar(kind)
        return tuple(value for (value,) in item.iter_unpack(self.read(count * item.size)))

    def _skip_items(self, kind: int, count: int) -> None:
        if kind == STRING:
            self._skip_strings(count)
        else:
            self._skip(count * self._scalar(kind).size)

    def _skip_strings(self, count: int) -> None:
        # A vocabulary has several 100,000 strings, so the inner loop makes no call per string.
        self._check(count * _U64.size)
        self._budget.strings -= count
        if self._budget.strings < 0:
            raise self.damaged(f"holds an array of {count} strings")
        done = 0
        while done < count:
            self._need(_U64.size)
            buffer, at, last = self._buffer, self._offset, len(self._buffer) - _U64.size
            while done < count and at <= last:
                at += _U64.size + _U64.unpack_from(buffer, at)[0]
                done += 1
            self._skip(at - self._offset)

    def _number(self, item: struct.Struct) -> int | float | bool:
        self._need(item.size)
        (value,) = item.unpack_from(self._buffer, self._offset)
        self._offset += item.size
        number: int | float | bool = value
        return number

    def _scalar(self, kind: int) -> struct.Struct:
        if kind not in _SCALARS:
            raise self.damaged(f"holds a value of the unknown kind {kind}")
        return _SCALARS[kind]

    def _skip(self, count: int) -> None:
        self._check(count)
        if self._offset + count <= len(self._buffer):
            self._offset += count
            return
        self._start, self._buffer, self._offset = self.position + count, b"", 0
        self._file.seek(self._start)

    def _need(self, count: int) -> None:
        """Fill the buffer with at least `count` bytes from `_offset` on."""
        missing = self._offset + count - len(self._buffer)
        if missing <= 0:
            return
        self._check(count)
        unread = self._buffer[self._offset :]
        self._start, self._offset = self.position, 0
        self._buffer = unread + self._file.read(max(missing, CHUNK))
        if len(self._buffer) < count:  # the file was truncated while being read
            raise self._ends_early()

    def _check(self, count: int) -> None:
        if not self.has_bytes(count):
            raise self._ends_early()
        if self.position + count > MAX_HEADER_BYTES:
            raise self.damaged(f"has a header of more than {format_size(MAX_HEADER_BYTES)}")

    def _ends_early(self) -> GGUFError:
        return GGUFError(
            f"{self._name} ends within its header, after {format_size(self._size)}: the copy may be incomplete."
        )
