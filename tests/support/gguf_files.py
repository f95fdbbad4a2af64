"""Builders for valid and corrupt GGUF headers, for tests and the fuzzer (`python -m bench.fuzz_gguf`)."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

from services.engines.llamacpp.gguf import GGUFError, GGUFHeader, estimate_bytes, read_header

UINT8, UINT16, UINT32, FLOAT32, STRING, ARRAY, UINT64 = 0, 2, 4, 6, 8, 9, 10
MOST_MEMORY = 4 << 20
"""Upper bound for the peak memory, in bytes, of reading a header, whatever the file claims."""


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return u64(len(content)) + content


def entry(key: bytes | str, kind: int, value: bytes) -> bytes:
    """One metadata entry; `value` is already encoded as in the file."""
    return text(key) + u32(kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return u32(kind) + u64(count) + items


def tensor(name: bytes | str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dimensions)) + b"".join(map(u64, dimensions)) + u32(kind) + u64(offset)


def file(
    values: list[bytes], tensors: list[bytes] | None = None, *, counts: tuple[int, int] | None = None, version: int = 3
) -> bytes:
    """A whole file without weights. `counts` are its claimed numbers of tensors and values, if false."""
    tensors = tensors or []
    claimed = (len(tensors), len(values)) if counts is None else counts
    return b"GGUF" + u32(version) + u64(claimed[0]) + u64(claimed[1]) + b"".join(values) + b"".join(tensors)


WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes per number type."""
EDGES = (0, 1, 2, 31, 32, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
KEYS = (
    "general.architecture",
    "general.alignment",
    "general.name",
    "general.description",
    "llama.context_length",
    "llama.block_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.sliding_window",
    "llama.vocab_size",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.chat_template",
)
LLAMA = entry("general.architecture", STRING, text("llama"))


def read_measured(path: Path) -> tuple[GGUFHeader | None, int]:
    """The header (None if the file is refused with a GGUFError), and the peak memory in bytes of reading it."""
    tracemalloc.start()
    try:
        header = read_header(path)
    except GGUFError:
        header = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return header, peak


def check(content: bytes, path: Path) -> bool:
    """Read a file and assert what holds for any bytes; return whether it is a readable header.

    Any file is either read or refused with an error, in bounded memory, and its figures are usable."""
    path.write_bytes(content)
    header, peak = read_measured(path)
    assert peak < MOST_MEMORY, f"it took {peak} bytes"
    if header is not None:
        assert 0 < estimate_bytes(header, 4096, 4) < 2**100
        assert 0 <= header.tensor_bytes <= header.file_bytes
        assert 0 <= header.repacked_bytes <= header.tensor_bytes
    return header is not None


def random_header(chance: random.Random) -> bytes:
    """A mostly plausible header with some corrupt values, then perhaps some bytes changed, truncated or padded."""
    values = [LLAMA, *(_random_entry(chance) for _ in range(chance.randrange(12)))]
    if chance.random() < 0.02:
        values += _flood(chance)
    chance.shuffle(values)
    tensors = [_random_tensor(chance) for _ in range(chance.choice((0, 1, 3, 30)))]
    counts = (len(tensors), len(values))
    if chance.random() < 0.2:
        counts = (_number(chance), _number(chance))
    content = bytearray(file(values, tensors, counts=counts) + bytes(chance.choice((0, 64, 5000))))
    for _ in range(chance.choice((0, 0, 1, 3))):
        place, width = chance.randrange(len(content) - 8), chance.choice((1, 4, 8))
        content[place : place + width] = u64(_number(chance))[:width]
    return bytes(content[: chance.randrange(len(content)) if chance.random() < 0.2 else len(content)])


def _number(chance: random.Random) -> int:
    return chance.choice(EDGES) if chance.random() < 0.5 else chance.randrange(300)


def _content(chance: random.Random) -> bytes:
    choices = (b"", b"llama", b"gemma3", b"clip", b"\xff" * 300, b"\xf0\x9f\x98\x80" * 1500)
    return chance.choice(choices) if chance.random() < 0.6 else chance.randbytes(chance.randrange(40))


def _flood(chance: random.Random) -> list[bytes]:
    """Megabytes of values that are small to write and large in memory."""
    kind, value = chance.choice(((STRING, text("\U0001f600" * 1000)), (ARRAY, array(UINT16, 1024, b"\x01\x02" * 1024))))
    key = chance.choice(("{}.attention.head_count", "general.name{}", "{}"))
    return [entry(key.format(n), kind, value) for n in range(1500)]


def _text(chance: random.Random) -> bytes:
    content = _content(chance)
    return text(content) if chance.random() < 0.97 else u64(_number(chance)) + content


def _random_entry(chance: random.Random) -> bytes:
    key = chance.choice(KEYS).encode() if chance.random() < 0.9 else _content(chance)
    kind = chance.choice((STRING, STRING, ARRAY, ARRAY, UINT32, chance.randrange(14)))
    if kind == STRING:
        return entry(key, kind, _text(chance))
    if kind == ARRAY:
        return entry(key, kind, _random_array(chance))
    return entry(key, kind, u64(_number(chance))[: WIDTHS.get(kind, 4)])


def _random_array(chance: random.Random) -> bytes:
    kind = chance.choice((STRING, UINT32, UINT16, FLOAT32, chance.randrange(14)))
    count = chance.choice((0, 1, 6, 40, 1024, 1025, 3000))
    if kind == STRING:
        items = b"".join(_text(chance) for _ in range(min(count, 40))) + bytes(8 * max(0, count - 40))
    else:
        items = u64(_number(chance))[: WIDTHS.get(kind, 4)] * count
    return array(kind, count if chance.random() < 0.95 else _number(chance), items)


def _random_tensor(chance: random.Random) -> bytes:
    name = chance.choice((b"token_embd.weight", b"blk.0.attn_q.weight", b"blk.0.attn_q.weight", _content(chance)))
    if chance.random() < 0.9:  # plausible, so that files with weights are read too
        kind = chance.choice((0, 1, 2, 24, chance.randrange(45)))
        return tensor(name, chance.choice(((32,), (32, 2), (1,))), kind, chance.choice((0, 32, 64)))
    dimensions = tuple(_number(chance) for _ in range(chance.choice((0, 1, 2, 2, 4, 5))))
    return tensor(name, dimensions, chance.randrange(45), chance.choice((0, 32, _number(chance))))
