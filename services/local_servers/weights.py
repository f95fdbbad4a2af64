"""Where a model's files are: in a folder, in the Hugging Face cache, or on the hub, from which they are downloaded.

The heavy packages are imported inside the functions, after `require_packages` has looked whether they are there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from serving import Progress

Report = Callable[[Progress], None]
STALE_SECONDS = 3_600
"""After this time without a change, a partial file in the cache was left behind by a process that was killed."""
PARTIAL_FILE = re.compile(r"[0-9a-f]{40,64}\.[0-9a-f]{8}\.incomplete")
"""How huggingface_hub 2.4 names partial files. It doesn't resume them."""
LONGEST_HEADER = 100_000_000
"""Limit of the safetensors format."""

log = logging.getLogger("local-servers")


class LoadError(Exception):
    """A model can't be loaded. The text says why, and what to do."""


def require_packages(modules: Iterable[str]) -> None:
    """Raise LoadError if a Python package is missing. `modules` are named as they are imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        requirements = Path(__file__).with_name("requirements.txt")
        command = f"{sys.executable} -m pip install --requirement {requirements}"
        raise LoadError(f"Python packages are missing: {', '.join(missing)}. Install them: {command}")


def quiet() -> None:
    """Keep the libraries from printing progress bars, and parts of long prompts in warnings; call before importing."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def fetch(model: str, patterns: Sequence[str], report: Report) -> Path:
    """Return the folder with the model's files that match, downloading what is missing. Raises LoadError."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")):
        raise LoadError(f"There is no folder {model}.")
    from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, DryRunError, HFValidationError

    try:
        # Only with a listing in the cache does huggingface_hub notice that files of a snapshot are missing.
        get_cached_repo_tree(model)
        return Path(snapshot_download(model, allow_patterns=list(patterns), local_files_only=True))
    except HFValidationError as error:
        raise LoadError(f"{model} is neither a folder nor a name on the Hugging Face hub.") from error
    except (CachedRepoTreeNotFoundError, FileNotFoundError):
        pass
    cache = Path(constants.HF_HUB_CACHE)
    try:
        planned = snapshot_download(model, allow_patterns=list(patterns), dry_run=True)
        total = sum(file.file_size or 0 for file in planned if file.will_download)
    except DryRunError:  # the hub can't be reached; the download below uses what is in the cache, or says why it can't
        total = None
    except Exception as error:
        raise _explained(model, error) from error
    if total:
        _remove_stale(cache / f"models--{model.replace('/', '--')}" / "blobs")
        require_disk_space(cache, total)
        log.info("Downloading %s: %.1f GB", model, total / 1e9)
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), tqdm_class=_meter(report, total)))
    except Exception as error:
        raise _explained(model, error) from error


def fetch_file(name: str) -> Path:
    """Return a file: a path, or OWNER/REPO/FILE on the hub, downloaded if it isn't in the cache. Raises LoadError."""
    if Path(name).is_file():
        return Path(name)
    parts = name.split("/", 2)
    if len(parts) < 3 or Path(name).is_absolute():
        raise LoadError(f"There is no file {name}.")
    from huggingface_hub import hf_hub_download

    repo = "/".join(parts[:2])
    try:
        return Path(hf_hub_download(repo, parts[2]))
    except Exception as error:
        raise _explained(repo, error) from error


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise LoadError if the disk has no room for that much."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise LoadError(
            f"The download needs {needed_bytes / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free. "
            "HF_HOME names another place."
        )


def parameters(folder: Path) -> int:
    """Return how many parameters the folder's safetensors files hold. Raises LoadError if there are none."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            count += sum(math.prod(shape) for shape in _shapes(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(f"{path} is damaged: its header can't be read.") from error
    if not count:
        raise LoadError(f"{folder} has no weights (*.safetensors).")
    return count


def _shapes(path: Path) -> list[list[int]]:
    """Return the shapes of a safetensors file's tensors: JSON after its length in eight bytes, little-endian."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= LONGEST_HEADER:
            raise ValueError(length)
        header = json.loads(file.read(length))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def _meter(report: Report, total: int | None) -> type:
    """Return a progress bar for huggingface_hub, which counts received bytes with one and written bytes with another.

    Whichever is ahead is reported.
    """
    from tqdm import tqdm

    said = 0
    one_at_a_time = threading.Lock()  # each file has a thread

    class Meter(tqdm):  # type: ignore[misc]  # mypy doesn't see tqdm
        def __init__(self, *args: object, **options: object) -> None:
            options.pop("name", None)
            self._counts = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal said
            with one_at_a_time:
                self.n += n or 0  # a disabled bar doesn't count
                if self._counts and self.n > said:
                    said = int(self.n)
                    report(Progress("downloading", said, total))
            return None

    return Meter


def _remove_stale(blobs: Path) -> None:
    """Remove what a killed process left of a download: up to ten GB per file, which nothing would ever use."""
    for path in blobs.glob("*.incomplete") if blobs.is_dir() else ():
        try:
            if PARTIAL_FILE.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except OSError as error:
            log.warning("Can't remove %s: %s", path, error.strerror)


def _explained(model: str, error: Exception) -> LoadError:
    """Return the error of a download in words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return LoadError(f"{model} is gated: accept its licence at https://huggingface.co/{model}, then set HF_TOKEN.")
    if isinstance(error, RepositoryNotFoundError):
        return LoadError(f"The Hugging Face hub has no {model}, or it is private and HF_TOKEN gives no access to it.")
    if isinstance(error, LocalEntryNotFoundError):
        return LoadError(f"The files of {model} are not all in the cache, and the Hugging Face hub can't be reached.")
    if isinstance(error, HfHubHTTPError):
        return LoadError(f"The Hugging Face hub refused {model}: {str(error).splitlines()[0]}")
    return LoadError(f"{model} can't be downloaded: {type(error).__name__}: {error}")
