"""Reads GGUF headers, and estimates the memory that llama.cpp takes for a model.

Only headers are read, never weights. Supports versions 2 and 3, little-endian.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from services.engines.llamacpp.gguf_parts import GgufPart, read_part, round_up
from services.engines.llamacpp.gguf_wire import Budget, GGUFError, Skipped, Value

__all__ = [
    "GGUFError",
    "GGUFHeader",
    "estimate_bytes",
    "is_first_part",
    "is_projector",
    "parts_here",
    "read_header",
    "split_parts",
]

MAX_LAYERS = 1024
MAX_PARTS = 1000
MAX_FIGURE = 1 << 32
"""Figures are 32-bit in the format."""
MIB = 1 << 20

# Every n-th layer attends to the whole context, the others to a sliding window. Not in the header: llama.cpp has it by
# architecture.
GLOBAL_LAYER_EVERY: Mapping[str, int] = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "exaone4": 4}

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Header of a model, all parts of a split one together. Unknown values are None.

    `head_count` and `head_count_kv` have one figure per layer. `tensor_bytes` is the size of the weights,
    `repacked_bytes` of those that llama.cpp copies for the CPU; `data_offset` is where the weights begin in the first
    part.
    """

    architecture: str
    name: str | None
    description: str | None
    context_length: int | None
    block_count: int | None
    embedding_length: int | None
    head_count: tuple[int, ...] | None
    head_count_kv: tuple[int, ...] | None
    key_length: int | None
    value_length: int | None
    feed_forward_length: int | None
    sliding_window: int | None
    vocab_size: int | None
    parameters: int
    tensor_bytes: int
    repacked_bytes: int
    data_offset: int
    has_chat_template: bool
    file_bytes: int


def read_header(path: Path) -> GGUFHeader:
    """Return the header of a model; any part of a split model gives the header of the whole.

    Raises GGUFError if the file is unusable or truncated, and OSError.
    """
    first, *others = split_parts(path)
    budget = Budget()
    parts = [read_part(first, budget)]
    parts += [replace(read_part(other, budget), values={}) for other in others]  # metadata repeats the first's
    return _header(parts, path.name)


def is_projector(header: GGUFHeader) -> bool:
    """Return whether this is the image encoder (`mmproj`) of another model."""
    return header.architecture == "clip"


def is_first_part(path: Path) -> bool:
    """Return whether a file name represents a whole model: not split, or the first part."""
    part = _PART.fullmatch(path.name)
    return part is None or int(part["number"]) == 1


def split_parts(path: Path) -> list[Path]:
    """Return the files of a model in order: three for `x-00001-of-00003.gguf`, one for other names.

    Raises GGUFError naming the missing parts.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if count > MAX_PARTS:
        raise GGUFError(f"{path.name} is one part of {count}: more than {MAX_PARTS} can't be used.")
    parts = [path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise GGUFError(f"{path.name} is one part of {count}: {', '.join(missing[:3])}{more} missing.")
    return parts


def parts_here(path: Path) -> list[Path]:
    """Return the existing files of a model; missing parts of a split model are left out."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) > MAX_PARTS:
        return [path]
    numbers = range(1, int(match["count"]) + 1)
    parts = [path.with_name(f"{match['stem']}-{n:05}-of-{match['count']}.gguf") for n in numbers]
    return [part for part in parts if part.is_file()]


def estimate_bytes(header: GGUFHeader, context_tokens: int, slots: int, *, repack: bool = True) -> int:
    """Estimate the bytes a llama.cpp server holds for a model, with `context_tokens` over all slots together.

    The sum of the weights, the copy of those repacked for the CPU (`repack`; not on a GPU), the f16 KV cache, the
    compute buffer for one batch of 512 tokens, and the process with its vocabulary.

    RSS of the embedded engine after six requests (x86-64 with AVX2, mapped file, random weights), and this estimate:

        file      weights  hidden  layers  vocabulary  context  slots  measured  estimated
        45 MiB    F16         512       6       3,000    4,096      4   154 MiB    152 MiB
        143 MiB   F16         768       8      16,000    4,096      4   247 MiB    245 MiB
        143 MiB   F16         768       8      16,000   32,768      4   470 MiB    497 MiB
        260 MiB   F16       1,024       8       1,000    4,096      4   469 MiB    466 MiB
        644 MiB   Q8_0        896      24     151,936    4,096      4   833 MiB    826 MiB
        644 MiB   Q8_0        896      24     151,936   16,384      8   979 MiB   1017 MiB
        808 MiB   Q4_K      2,048      16     128,256    4,096      4  1726 MiB   1756 MiB
        808 MiB   Q4_K      2,048      16     128,256   32,768      1  2590 MiB   2658 MiB
        1595 MiB  F16       2,048      16      32,000    4,096      4  1769 MiB   1767 MiB
        1940 MiB  Q4_K      3,072      28     128,256    4,096      4  4224 MiB   4278 MiB
    """
    return (
        header.tensor_bytes
        + (header.repacked_bytes if repack else 0)
        + _kv_bytes(header, context_tokens, slots)
        + _compute_bytes(header, context_tokens)
        + _process_bytes(header, slots)
    )


def _kv_bytes(header: GGUFHeader, context: int, slots: int) -> int:
    heads = header.head_count_kv or header.head_count or ()
    width = _head_width(header)
    per_head = 2 * ((header.key_length or width) + (header.value_length or width))
    every = GLOBAL_LAYER_EVERY.get(header.architecture, 1)
    window = _window_tokens(header, context, slots)
    tokens = (context if (layer + 1) % every == 0 else window for layer in range(len(heads)))
    return per_head * sum(count * held for count, held in zip(heads, tokens, strict=True))


def _window_tokens(header: GGUFHeader, context: int, slots: int) -> int:
    """Return the tokens that a sliding-window layer caches: the window of each slot and one batch, in steps of 256."""
    if not header.sliding_window:
        return context
    return min(context, round_up(header.sliding_window * slots + 512, 256))


def _compute_bytes(header: GGUFHeader, context: int) -> int:
    # What llama.cpp logs as its compute buffer: f32 rows of 512 tokens, and the f16 attention mask.
    rows = 3 * (header.feed_forward_length or 0) + 5 * (header.embedding_length or 0)
    return 512 * 4 * rows + 512 * 2 * context


def _process_bytes(header: GGUFHeader, slots: int) -> int:
    return 40 * MIB + (header.vocab_size or 0) * (160 + 60 * slots)


def _head_width(header: GGUFHeader) -> int:
    most = max(header.head_count or (0,))
    return (header.embedding_length or 0) // most if most else 0


def _header(parts: Sequence[GgufPart], file_name: str) -> GGUFHeader:
    values = parts[0].values
    architecture = _text(values.get("general.architecture"))
    if architecture is None:
        raise GGUFError(f"{file_name} doesn't say what architecture its model has: it can't be loaded.")
    model = _Model(values, architecture)
    layers = model.number("block_count")
    if layers is not None and layers > MAX_LAYERS:
        raise GGUFError(f"{file_name} lists {layers} layers: the file is damaged.")
    return GGUFHeader(
        architecture=architecture,
        name=_text(values.get("general.name")),
        description=_text(values.get("general.description")),
        context_length=model.number("context_length"),
        block_count=layers,
        embedding_length=model.number("embedding_length"),
        head_count=model.per_layer("attention.head_count", layers),
        head_count_kv=model.per_layer("attention.head_count_kv", layers),
        key_length=model.number("attention.key_length"),
        value_length=model.number("attention.value_length"),
        feed_forward_length=max(model.per_layer("feed_forward_length", layers) or (0,)) or None,
        sliding_window=model.number("attention.sliding_window"),
        vocab_size=_count(values.get("tokenizer.ggml.tokens")) or model.number("vocab_size"),
        parameters=sum(part.parameters for part in parts),
        tensor_bytes=sum(part.tensor_bytes for part in parts),
        repacked_bytes=sum(part.repacked_bytes for part in parts),
        data_offset=parts[0].data_offset,
        has_chat_template="tokenizer.chat_template" in values,
        file_bytes=sum(part.file_bytes for part in parts),
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """The metadata below one architecture's prefix."""

    values: Mapping[str, Value]
    architecture: str

    def number(self, key: str) -> int | None:
        return _whole(self.values.get(f"{self.architecture}.{key}"))

    def per_layer(self, key: str, layers: int | None) -> tuple[int, ...] | None:
        """Return one figure per layer, whether the file has one for all or a list."""
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple):
            return tuple(_whole(item) or 0 for item in value)
        figure = _whole(value)
        return None if figure is None else (figure,) * (layers or 1)


def _whole(value: Value | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_FIGURE else None


def _text(value: Value | None) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: Value | None) -> int | None:
    if isinstance(value, Skipped):
        return value.count
    return len(value) if isinstance(value, tuple) else None
