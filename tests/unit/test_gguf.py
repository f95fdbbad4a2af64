"""The GGUF reader: correct values for valid files, clear errors and bounded memory for invalid ones."""

from __future__ import annotations

import gzip
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.engines.llamacpp.gguf import (
    GGUFError,
    GGUFHeader,
    estimate_bytes,
    is_first_part,
    is_projector,
    read_header,
    split_parts,
)
from services.engines.llamacpp.gguf_parts import BLOCKS
from services.sizes import format_size
from tests.support import gguf_files
from tests.support.gguf_files import ARRAY, STRING, UINT8, UINT32, array, entry, tensor, text, u32, u64

HIDDEN, LAYERS, VOCABULARY = 64, 2, 300
MIB = 1 << 20
CASES = Path(__file__).with_name("gguf_cases")
"""Files found by `python -m bench.fuzz_gguf`."""


def write_model(path: Path, architecture: str = "llama", vocabulary: int = VOCABULARY) -> Path:
    """A small complete file, written with the public `gguf` package."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_description("A model for tests")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1])
    writer.add_token_list([f"token{n}" for n in range(vocabulary)])
    writer.add_token_scores([0.5] * vocabulary)
    writer.add_token_merges([f"to ken{n}" for n in range(vocabulary)])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((VOCABULARY, HIDDEN), np.float16))
    for layer in range(LAYERS):
        packed = gguf.quantize(np.ones((HIDDEN, HIDDEN), np.float32), gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(f"blk.{layer}.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny.gguf")


@cache
def good_bytes() -> bytes:
    with TemporaryDirectory() as folder:
        return write_model(Path(folder) / "tiny.gguf").read_bytes()


def read_bytes(content: bytes, folder: Path) -> GGUFHeader:
    path = folder / "m.gguf"
    path.write_bytes(content)
    return read_header(path)


def test_round_trip(model: Path) -> None:
    """Everything that the public writer put in is read back."""
    header = read_header(model)
    table, square = VOCABULARY * HIDDEN * 2, HIDDEN * HIDDEN // 32 * 18
    assert header == GGUFHeader(
        architecture="llama",
        name="Tiny",
        description="A model for tests",
        context_length=2048,
        block_count=LAYERS,
        embedding_length=HIDDEN,
        head_count=(4, 4),
        head_count_kv=(2, 1),
        key_length=None,
        value_length=None,
        feed_forward_length=128,
        sliding_window=None,
        vocab_size=VOCABULARY,
        parameters=VOCABULARY * HIDDEN + LAYERS * HIDDEN * HIDDEN,
        tensor_bytes=table + LAYERS * square,
        repacked_bytes=LAYERS * square,
        data_offset=model.stat().st_size - table - LAYERS * square,
        has_chat_template=True,
        file_bytes=model.stat().st_size,
    )


def test_every_tensor_type_of_the_public_package_is_known() -> None:
    """The table of block sizes equals that of the `gguf` package."""
    assert {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == dict(BLOCKS)


def test_an_unknown_tensor_type_is_accepted(tmp_path: Path) -> None:
    """A file with tensors of an unknown type is read; its weights are the bytes after the header."""
    content = bytearray(good_bytes())
    kind = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    content[kind : kind + 4] = struct.pack("<I", 999)
    header = read_bytes(bytes(content), tmp_path)
    assert header.tensor_bytes == header.file_bytes - header.data_offset


def test_a_large_vocabulary_takes_little_memory(tmp_path: Path) -> None:
    """50,000 tokens and as many merges are counted, not stored."""
    path = write_model(tmp_path / "big.gguf", vocabulary=50_000)
    tracemalloc.start()
    try:
        header = read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert header.vocab_size == 50_000
    assert peak < 2 * MIB


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "m.gguf is empty: the copy may be incomplete."),
        (b"<html>not found</html>", "m.gguf is not a GGUF file."),
        (b"GGUF" + struct.pack("<I", 1), "m.gguf is GGUF version 1; versions 2 and 3 can be used."),
        (b"GGUF" + struct.pack(">I", 3), "m.gguf is a GGUF file for big-endian machines: it can't be used here."),
        (b"GGUF" + struct.pack("<I", 3), "m.gguf ends within its header, after 8 bytes: the copy may be incomplete."),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1),
            f"m.gguf claims {2**60} tensors and 1 values: the file is damaged.",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
            "m.gguf doesn't say what architecture its model has: it can't be loaded.",
        ),
    ],
)
def test_errors_say_what_is_wrong(content: bytes, words: str, tmp_path: Path) -> None:
    """The error names the file, what is wrong, and, where useful, the likely cause."""
    with pytest.raises(GGUFError) as caught:
        read_bytes(content, tmp_path)
    assert str(caught.value) == words


def test_an_incomplete_copy_is_detected(tmp_path: Path) -> None:
    """A file with truncated weights reports how much is there and how much there should be."""
    with pytest.raises(GGUFError) as caught:
        read_bytes(good_bytes()[:-1000], tmp_path)
    size = format_size(len(good_bytes()) - 1000)
    assert str(caught.value).startswith(f"m.gguf ends after {size}, but its header lists 43 kB of weights")


@pytest.mark.parametrize("position", [24, 16, 8])
def test_absurd_counts_allocate_nothing(position: int, tmp_path: Path) -> None:
    """A count or length of 2^62 is refused before anything is allocated for it."""
    content = bytearray(good_bytes())
    content[position : position + 8] = struct.pack("<Q", 2**62)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            read_bytes(bytes(content), tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


def bomb(kind: str, size: int) -> bytes:
    """A file of about `size` bytes full of values that take much memory when stored."""
    values = [gguf_files.LLAMA]
    tensors: list[bytes] = []

    def fill(into: list[bytes], piece: Callable[[int], bytes], most: int) -> None:
        into += [piece(n) for n in range(min(most, size // len(piece(0))))]

    long, wide = b"x" * 65_000, "\U0001f600".encode() * 16_000
    numbers = array(gguf_files.UINT16, 4096, b"\x01\x02" * 4096)
    match kind:
        case "long texts":
            fill(values, lambda n: entry(f"a.text{n}", STRING, text(long)), 60_000)
        case "texts of wide characters":
            fill(values, lambda n: entry(f"a.text{n}", STRING, text(wide)), 60_000)
        case "arrays of numbers":
            fill(values, lambda n: entry(f"a.numbers{n}", ARRAY, numbers), 60_000)
        case "figures of many models":
            fill(values, lambda n: entry(f"a{n}.attention.head_count", ARRAY, numbers), 60_000)
        case "long keys":
            fill(values, lambda n: entry(b"%d" % n + long, UINT8, b"1"), 60_000)
        case "tensors":
            fill(tensors, lambda n: tensor(f"t{n}" * 10, (1,), 24), 30_000)
        case "long names of tensors":
            fill(tensors, lambda n: tensor(b"%d" % n + long, (1,), 24), 1_000_000)
        case "one description":
            values.append(entry("general.description", STRING, text(b"\xff" * size)))
    return gguf_files.file(values, tensors) + bytes(64)


@pytest.mark.parametrize(
    "kind",
    [
        "long texts",
        "texts of wide characters",
        "arrays of numbers",
        "figures of many models",
        "long keys",
        "tensors",
        "long names of tensors",
        "one description",
    ],
)
def test_a_header_bomb_takes_little_memory(kind: str, tmp_path: Path) -> None:
    """A header of 6 MB, whatever its content, is read in less memory; one of 64 MB took 2.7 GB."""
    path = tmp_path / "bomb.gguf"
    path.write_bytes(bomb(kind, 6 << 20))
    _, peak = gguf_files.read_measured(path)
    assert peak < gguf_files.MOST_MEMORY


@pytest.mark.parametrize(
    ("values", "tensors", "words"),
    [
        ([entry("a", ARRAY, array(ARRAY, 1, array(UINT8, 0, b"")))], [], "holds an array of arrays"),
        ([entry("k" * 70_000, UINT8, b"1")], [], "holds a key of 70000 bytes"),
        ([entry("general.alignment", UINT32, u32(0))], [], "asks for an alignment of 0"),
        ([entry("general.alignment", UINT32, u32(48))], [], "asks for an alignment of 48"),
        ([], [tensor("t", (2**40, 2**40))], "holds a tensor of more than 2^63 weights"),
        ([], [tensor("t", (1, 1, 1, 1, 1))], "holds a tensor of 5 dimensions"),
        ([entry("llama.block_count", UINT32, u32(1_000_000))], [], "lists 1000000 layers"),
    ],
)
def test_values_that_no_model_has_are_damage(
    values: list[bytes], tensors: list[bytes], words: str, tmp_path: Path
) -> None:
    """Depth, lengths and sizes beyond what llama.cpp accepts are refused with an error."""
    with pytest.raises(GGUFError, match=re.escape(f"m.gguf {words}")):
        read_bytes(gguf_files.file([gguf_files.LLAMA, *values], tensors) + bytes(64), tmp_path)


def test_too_many_values_are_refused(tmp_path: Path) -> None:
    """Millions of empty strings take time but no memory: their number is limited too."""
    count = 5_000_000
    strings = entry("tokenizer.ggml.tokens", ARRAY, array(STRING, count, bytes(8 * count)))
    with pytest.raises(GGUFError, match="5000000 strings"):
        read_bytes(gguf_files.file([gguf_files.LLAMA, strings]), tmp_path)


def test_a_set_of_a_hundred_thousand_parts_is_refused(tmp_path: Path) -> None:
    """A file name that claims 99,999 parts causes no search for them."""
    part = tmp_path / "m-00001-of-99999.gguf"
    part.touch()
    with pytest.raises(GGUFError, match="one part of 99999: more than 1000 can't be"):
        split_parts(part)


def test_needed_values_are_kept_at_any_position(tmp_path: Path) -> None:
    """The architecture may come last, and long texts are truncated, not lost."""
    values = [
        entry("general.name", STRING, text("n" * 5000)),
        entry("llama.context_length", UINT32, u32(2048)),
        entry("a.chat_template", STRING, text("x" * 100_000)),
        entry("tokenizer.chat_template", STRING, text("x" * 100_000)),
        gguf_files.LLAMA,
    ]
    header = read_bytes(gguf_files.file(values), tmp_path)
    assert (header.architecture, header.context_length, header.has_chat_template) == ("llama", 2048, True)
    assert header.name == "n" * 4096


def test_an_absurd_figure_is_unknown(tmp_path: Path) -> None:
    """A context of 2^63 tokens can't be used for planning."""
    values = [gguf_files.LLAMA, entry("llama.context_length", gguf_files.UINT64, u64(2**63))]
    assert read_bytes(gguf_files.file(values), tmp_path).context_length is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_a_regular_file_is_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    """A pipe with a model's name would block its reader for ever."""
    path = tmp_path / "m.gguf"
    make(path)
    with pytest.raises(GGUFError, match=r"m\.gguf is not a file"):
        read_header(path)


@pytest.mark.parametrize("case", sorted(CASES.glob("*.gz")), ids=lambda path: path.name)
def test_files_found_by_the_fuzzer_are_handled(case: Path, tmp_path: Path) -> None:
    """Files that once broke the reader."""
    gguf_files.check(gzip.decompress(case.read_bytes()), tmp_path / "m.gguf")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_any_header_is_read_or_refused_in_little_memory(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Headers with corrupt values; `python -m bench.fuzz_gguf 600` tries them for ten minutes."""
    gguf_files.check(gguf_files.random_header(Random(seed)), tmp_path_factory.getbasetemp() / "m.gguf")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_never_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """With bytes changed or truncated anywhere, the file is read, or refused with a GGUFError."""
    content = bytearray(good_bytes())
    places = st.integers(0, len(content) - 9) | st.integers(0, 900)
    for place in data.draw(st.lists(places, max_size=4)):
        value = data.draw(st.sampled_from([0, 1, 255, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        content[place : place + width] = value.to_bytes(8, "little")[:width]
    cut = data.draw(st.none() | st.integers(0, len(content)))
    with suppress(GGUFError):
        header = read_bytes(bytes(content[:cut]), tmp_path_factory.getbasetemp())
        assert estimate_bytes(header, 4096, 4) > 0


@given(st.binary(max_size=200))
@example(b"GGUF\x03\x00\x00\x00")
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Random bytes, with or without the magic number, are refused with a GGUFError."""
    for prefix in (b"", b"GGUF" + struct.pack("<I", 3)):
        with pytest.raises(GGUFError):
            read_bytes(prefix + content, tmp_path_factory.getbasetemp())


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """A missing file is the system's error, not damage."""
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.gguf")


def test_a_projector_is_recognised(tmp_path: Path) -> None:
    """A vision projector is not listed as a model."""
    assert is_projector(read_header(write_model(tmp_path / "mmproj.gguf", architecture="clip")))
    assert not is_projector(read_header(write_model(tmp_path / "model.gguf")))


def test_split_parts_count_together(tmp_path: Path, model: Path) -> None:
    """Any part of a split model gives the whole: summed sizes and parameters, the first part's metadata."""
    parts = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for part in parts:
        part.write_bytes(model.read_bytes())
    whole, single = read_header(parts[0]), read_header(model)
    assert split_parts(parts[1]) == parts
    assert whole == read_header(parts[1])
    assert whole == replace(
        single,
        parameters=2 * single.parameters,
        tensor_bytes=2 * single.tensor_bytes,
        repacked_bytes=2 * single.repacked_bytes,
        file_bytes=2 * single.file_bytes,
    )
    assert [is_first_part(path) for path in (*parts, model)] == [True, False, True]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """An incomplete split model reports which parts are missing."""
    here = tmp_path / "m-00002-of-00003.gguf"
    here.touch()
    with pytest.raises(GGUFError) as caught:
        read_header(here)
    words = "m-00002-of-00003.gguf is one part of 3: m-00001-of-00003.gguf, m-00003-of-00003.gguf missing."
    assert str(caught.value) == words


def measured_model(**changes: object) -> GGUFHeader:
    """The 808 MiB Q4_K model of the table in `estimate_bytes`."""
    header = GGUFHeader(
        architecture="llama",
        name=None,
        description=None,
        context_length=32_768,
        block_count=16,
        embedding_length=2048,
        head_count=(32,) * 16,
        head_count_kv=(8,) * 16,
        key_length=None,
        value_length=None,
        feed_forward_length=8192,
        sliding_window=None,
        vocab_size=128_256,
        parameters=1_498_482_688,
        tensor_bytes=int(804.07 * MIB),
        repacked_bytes=int(662.91 * MIB),
        data_offset=0,
        has_chat_template=True,
        file_bytes=int(808.4 * MIB),
    )
    return replace(header, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("context", "slots", "measured_mib"), [(4096, 4, 1726), (32_768, 1, 2590)])
def test_the_estimate_is_close_to_what_was_measured(context: int, slots: int, measured_mib: int) -> None:
    """Within 5 % of the measured memory."""
    assert estimate_bytes(measured_model(), context, slots) / MIB == pytest.approx(measured_mib, rel=0.05)


def test_a_gpu_needs_no_repacked_copy() -> None:
    """Without the CPU's repacked copy the estimate is smaller by exactly its size."""
    header = measured_model()
    saved = estimate_bytes(header, 4096, 4) - estimate_bytes(header, 4096, 4, repack=False)
    assert saved == header.repacked_bytes


def test_the_cache_follows_context_and_layers() -> None:
    """The KV cache grows with the context; layers without attention, and sliding windows, take less."""
    kv_per_token = 16 * 8 * (64 + 64) * 2
    mask_per_token = 512 * 2
    full = measured_model()
    grown = estimate_bytes(full, 8192, 4) - estimate_bytes(full, 4096, 4)
    assert grown == 4096 * (kv_per_token + mask_per_token)
    half = measured_model(head_count_kv=(8, 0) * 8)
    assert estimate_bytes(full, 4096, 4) - estimate_bytes(half, 4096, 4) == 4096 * kv_per_token // 2
    windowed = measured_model(architecture="gpt-oss", sliding_window=128)
    saved_tokens = 4096 - (4 * 128 + 512)
    assert estimate_bytes(full, 4096, 4) - estimate_bytes(windowed, 4096, 4) == saved_tokens * kv_per_token // 2
