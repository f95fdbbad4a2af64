"""Determines which files of a repository vLLM loads, and which of them are missing. Pure.

The rules are vLLM 0.32's. Weights (`DefaultModelLoader._prepare_weights`, `download_weights_from_hf`): of the files in
no folder, `consolidated*.safetensors`, which a Mistral model loads from, else `*.safetensors`, else `*.bin`, else
`*.pt`, without files only needed for training (`filter_files_not_needed_for_inference`). And every file that matches
none of `_WEIGHT_FILE_PATTERNS` (`repo_utils._snapshot_non_weight_files`): configuration, tokenizer, templates, code. An
index may name weights in folders; if all weights are in folders, those in `original/` and hidden ones are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from services.downloads.fetcher import DownloadError
from services.downloads.huggingface.names import HubName, stays_below

FORMATS = ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt")
"""Patterns of weights, the format that vLLM prefers first."""
INDEXES = {
    "consolidated*.safetensors": "consolidated.safetensors.index.json",
    "*.safetensors": "model.safetensors.index.json",
    "*.bin": "pytorch_model.bin.index.json",
}
"""The file that lists the weights of a format, if there are several."""
FOR_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
NOT_BESIDE_WEIGHTS = tuple(
    f".{ending}"
    for ending in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "onnx_data"),
        *("png", "jpg", "jpeg", "gif", "webp", "mp3", "mp4", "wav", "flac", "parquet", "arrow", "ipynb", "zip"),
    )
)
CONFIGURATIONS = {"config.json", "params.json"}
"""vLLM needs one of these; the second is Mistral's."""
LEFT_OUT = ("original", "onnx", "metal")
"""Folders that contain the same weights in other formats."""

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.\w+")
_NUMBER = re.compile(r"([0-9]+)")
_ARCHIVE = re.compile(r"\.tar[^/]*$")


def choose(name: HubName, listed: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of the files that vLLM loads, out of those that the repository lists; weights last.

    Raises DownloadError: `unsafe_path`, `no_weights`.
    """
    paths = sorted(listed)
    weights = weights_of(paths)
    if not weights:
        raise DownloadError(
            "no_weights",
            f"{name.repo_id} holds no weights that vLLM loads (safetensors, bin or pt files). Check the name; a GGUF "
            "model is for the embedded engine.",
        )
    chosen = (*(path for path in paths if _beside_weights(path)), *weights)
    unsafe = next((path for path in chosen if not stays_below(path)), None)
    if unsafe is not None:
        raise DownloadError(
            "unsafe_path",
            f"{name.repo_id} lists the file {unsafe[:100]!r}, which would land outside of the cache. Nothing was "
            "downloaded; don't trust this repository.",
        )
    return chosen


def weights_of(listed: Iterable[str]) -> tuple[str, ...]:
    """Return the weights among a repository's files, in one format; empty if there are none."""
    paths = sorted(path for path in listed if not path.endswith(FOR_TRAINING))
    outside = [path for path in paths if "/" not in path]
    inside = [path for path in paths if not path.startswith(".") and path.split("/")[0] not in LEFT_OUT]
    for candidates in (outside, inside):
        for pattern in FORMATS:
            found = tuple(path for path in candidates if fnmatchcase(path.rpartition("/")[2], pattern))
            if found:
                return found
    return ()


def in_load_order(weights: Iterable[str]) -> list[str]:
    """Sort weights as vLLM 0.32 loads them: by name, with numbers compared as numbers.

    Older versions load them in the order of their directory.
    """
    return sorted(weights, key=lambda path: [int(part) if part.isdecimal() else part for part in _NUMBER.split(path)])


def index_of(weights: Collection[str]) -> str | None:
    """Return the name of the index file for these weights."""
    for pattern, index in INDEXES.items():
        if any(fnmatchcase(path.rpartition("/")[2], pattern) for path in weights):
            return index
    return None


def missing_files(sizes: Mapping[str, int | None], indexed: Collection[str] = ()) -> tuple[str, ...]:
    """Return what vLLM would lack, as descriptions or paths; empty for nothing.

    `sizes` has None for a file whose blob is missing. `indexed` are the weights that the index lists. Without it,
    shards are counted: their names contain their number.
    """
    weights = weights_of([*sizes, *indexed])
    wanted = {*(path for path in sizes if _beside_weights(path)), *weights, *indexed}
    lack = sorted(path for path in wanted if sizes.get(path) is None)
    lack += [] if indexed else _incomplete_sets(weights)
    lack += [] if CONFIGURATIONS & sizes.keys() else ["config.json"]
    return (*lack, *([] if weights else ["weights"]))


def _beside_weights(path: str) -> bool:
    return not path.endswith(NOT_BESIDE_WEIGHTS) and _ARCHIVE.search(path) is None


def _incomplete_sets(weights: Iterable[str]) -> list[str]:
    """Return the sets of shards with fewer than their names say. Some count from 0 and have one more."""
    here: dict[tuple[str, int], int] = {}
    for path in weights:
        match = _SHARD.fullmatch(path)
        if match is not None:
            key = match["stem"], int(match["count"])
            here[key] = here.get(key, 0) + 1
    return [f"{count - have} parts of {stem}" for (stem, count), have in here.items() if have < count]
