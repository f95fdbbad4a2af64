"""Where the image server puts FLUX, and what the servers check before they download."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from errors import OutOfMemoryError
from memory import place
from weights import LoadError, _remove_stale, parameters, require_disk_space

FLUX = {"text_encoder": 123_000_000, "text_encoder_2": 4_762_000_000, "transformer": 11_901_000_000, "vae": 84_000_000}
"""FLUX.1-schnell's parameters."""
GB = 10**9


@pytest.mark.parametrize(
    ("gpu_gb", "offload", "needed_gb"),
    [
        (80, "none", 35.7),
        (36, "none", 35.7),
        (35, "model", 25.8),
        (26, "model", 25.8),
        (24, "sequential", 3.0),
        (3, "sequential", 3.0),
    ],
)
def test_the_fastest_placement_that_fits_the_gpu_is_chosen(gpu_gb: int, offload: str, needed_gb: float):
    """The weights take 33.7 GB, the largest component of them 23.8 GB."""
    placement = place(FLUX, gpu_gb * GB, 64 * GB)
    assert (placement.device, placement.offload) == ("cuda:0", offload)
    assert placement.needed_bytes / GB == pytest.approx(needed_gb, abs=0.1)


def test_without_a_gpu_it_runs_on_the_cpu_if_the_ram_has_room():
    placement = place(FLUX, None, 36 * GB)
    assert (placement.device, placement.offload) == ("cpu", "none")
    with pytest.raises(OutOfMemoryError, match=r"30\.0 GB were free, about 35\.7 GB are needed"):
        place(FLUX, None, 30 * GB)


def test_a_gpu_that_is_too_full_is_told_with_figures():
    with pytest.raises(OutOfMemoryError) as raised:
        place(FLUX, 2 * GB, 64 * GB)
    assert raised.value.figures == {"free_bytes": 2 * GB, "needed_bytes": 3 * GB}


def test_offload_needs_ram_for_what_is_not_on_the_gpu():
    """Loading for the GPU alone takes the largest component's size for a moment."""
    assert place(FLUX, 80 * GB, 24 * GB).offload == "none"
    with pytest.raises(OutOfMemoryError, match=r"33\.7 GB are needed"):
        place(FLUX, 24 * GB, 24 * GB)


def test_a_wanted_offload_is_kept_to_or_refused():
    assert place(FLUX, 80 * GB, 64 * GB, "sequential").offload == "sequential"
    with pytest.raises(OutOfMemoryError):
        place(FLUX, 30 * GB, 64 * GB, "none")


def test_unknown_ram_forbids_nothing():
    assert place(FLUX, None, None).device == "cpu"


def safetensors(path: Path, header: object) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    return path


def test_parameters_are_counted_from_the_headers_of_all_files(tmp_path: Path):
    entry = {"dtype": "BF16", "data_offsets": [0, 12]}
    safetensors(tmp_path / "a-1.safetensors", {"__metadata__": {"format": "pt"}, "w": {**entry, "shape": [2, 3]}})
    safetensors(tmp_path / "a-2.safetensors", {"b": {**entry, "shape": []}, "c": {**entry, "shape": [5]}})
    assert parameters(tmp_path) == 6 + 1 + 5


@pytest.mark.parametrize(
    "content", [b"", b"\x01", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", b"\x03" + b"\0" * 7 + b'{"a']
)
def test_a_damaged_header_is_told_with_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(LoadError, match=r"model\.safetensors is damaged"):
        parameters(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"a pickle")
    with pytest.raises(LoadError, match="has no weights"):
        parameters(tmp_path)


def test_a_download_that_the_disk_has_no_room_for_is_refused(tmp_path: Path):
    """The folder need not exist yet."""
    require_disk_space(tmp_path / "hub" / "models", 1)
    with pytest.raises(LoadError, match=r"needs 1000000000\.0 GB .* HF_HOME"):
        require_disk_space(tmp_path / "hub" / "models", 10**18)


def test_only_old_parts_of_downloads_are_removed(tmp_path: Path):
    """Another program may be writing the young ones, and Switchyard resumes its own, which have another form."""
    digest = "0123456789abcdef" * 4
    old, young = tmp_path / f"{digest}.01234567.incomplete", tmp_path / f"{digest}.89abcdef.incomplete"
    ours, blob = tmp_path / f"{digest}.0123456789abcdef.incomplete", tmp_path / digest
    for path in (old, young, ours, blob):
        path.write_bytes(b"part")
        if path is not young:
            os.utime(path, (time.time() - 7_200,) * 2)
    _remove_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, ours, blob])
    _remove_stale(tmp_path / "missing")
