"""The Hugging Face cache, in the layout of huggingface_hub 0.8 to 2.4.

    <cache>/models--OWNER--NAME/blobs/DIGEST                the bytes; DIGEST is LFS' SHA-256, else git's id
    <cache>/models--OWNER--NAME/snapshots/COMMIT/PATH       a relative link to a blob
    <cache>/models--OWNER--NAME/refs/REVISION               the commit of a branch or tag

Other programs use it concurrently, such as huggingface_hub in vLLM's containers, so each file is renamed into place
when complete. Partial files are `DIGEST.START_OF_DIGEST.incomplete` beside the blob, a name that huggingface_hub never
uses: if both fetch the same file, it is transferred twice, and either result is valid. Links are created after the last
blob and the ref is written last, so that no reader finds half a model.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from services.downloads.fetcher import DownloadError
from services.downloads.huggingface.files import DIGEST_CHARACTERS, PARTIAL_SUFFIX
from services.downloads.huggingface.names import HubName
from services.downloads.huggingface.weight_files import choose, in_load_order, index_of, missing_files, weights_of

DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OWN_UNFINISHED = re.compile(
    rf"(?P<start>[0-9a-f]{{{DIGEST_CHARACTERS}}})[0-9a-f]+\.(?P=start){re.escape(PARTIAL_SUFFIX)}"
)
"""Our partial files; huggingface_hub puts eight random characters, or none, before `.incomplete`."""


class CachedModel:
    """One revision of a model in a cache. Read-only; what can't be read counts as missing."""

    def __init__(self, cache: Path, name: HubName) -> None:
        self.folder = cache / f"models--{name.owner}--{name.repo}"
        self.revision = name.revision or DEFAULT_REVISION

    def missing_files(self) -> tuple[str, ...]:
        """Return what vLLM would lack, as descriptions or paths; empty if everything is there."""
        sizes = self._sizes()
        return missing_files(sizes, self._indexed(sizes)) if sizes else ("all of its files",)

    def shard_bytes(self) -> tuple[int, ...]:
        """Return the sizes of the weights' files in vLLM's loading order; empty if they are incomplete.

        Reads one short file, and the metadata of the others.
        """
        sizes = self._sizes()
        if missing_files(sizes):
            return ()
        return tuple(sizes[path] or 0 for path in in_load_order(weights_of(sizes)))

    def _sizes(self) -> dict[str, int | None]:
        """Return every file of the snapshot with its size, None if its blob is missing."""
        snapshot = self._snapshot()
        if snapshot is None:
            return {}
        sizes: dict[str, int | None] = {}
        for folder, _, files in os.walk(snapshot):  # an error yields nothing
            for file in files:
                path = Path(folder, file)
                sizes[path.relative_to(snapshot).as_posix()] = _size(path)
        return sizes

    def _snapshot(self) -> Path | None:
        try:
            commit = (self.folder / "refs" / self.revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            commit = self.revision
        return self.folder / "snapshots" / commit if _COMMIT.fullmatch(commit) else None

    def _indexed(self, sizes: Mapping[str, int | None]) -> Collection[str]:
        """Return the weights that the model's index lists; empty if there is none, or it can't be read."""
        snapshot, index = self._snapshot(), index_of(weights_of(sizes))
        if snapshot is None or index is None or sizes.get(index) is None:
            return ()
        try:
            listed = json.loads((snapshot / index).read_bytes())["weight_map"].values()
            return {str(path) for path in listed}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return ()


class CacheLayout:
    """The cache as a `Layout` for the files that vLLM loads."""

    together = False

    def __init__(self, cache: Path, name: HubName) -> None:
        self.place = f"the Hugging Face cache {cache}"
        give = f"sudo chown -R {os.geteuid()} {shlex.quote(str(_nearest_existing(cache)))}"
        self.advice = (
            f"vLLM's containers write there as root: give it to the user that Switchyard runs as ({give}), or let "
            "hub_cache_dir name another folder."
        )
        self._name = name
        self._model = CachedModel(cache, name)

    def choose(self, listed: Iterable[str]) -> Sequence[str]:
        return choose(self._name, listed)

    def destination(self, _path: str, digest: str) -> Path:
        return self._model.folder / "blobs" / digest

    def leftovers(self, _destinations: Collection[Path]) -> Iterable[Path]:
        blobs = self._model.folder / "blobs"
        return [path for path in blobs.glob(f"*{PARTIAL_SUFFIX}") if _OWN_UNFINISHED.fullmatch(path.name)]

    def finish(self, commit: str | None, digests: Mapping[str, str]) -> None:
        if commit is None or not _COMMIT.fullmatch(commit):
            raise DownloadError("hub_error", "The hub's listing of the repository has no commit. Check HF_ENDPOINT.")
        snapshot = self._model.folder / "snapshots" / commit
        for path, digest in digests.items():
            _link(snapshot / path, self.destination(path, digest))
        if self._model.revision != commit:
            _write(self._model.folder / "refs" / self._model.revision, commit)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _link(link: Path, blob: Path) -> None:
    target = os.path.relpath(blob, link.parent)
    with suppress(OSError):
        if os.readlink(link) == target:
            return
    link.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(link)
    draft.symlink_to(target)
    draft.replace(link)


def _write(path: Path, text: str) -> None:
    with suppress(OSError):
        if path.read_text(encoding="utf-8") == text:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _draft(path: Path) -> Path:
    """Return the temporary name for a file being written, after deleting a leftover."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    return draft


def _nearest_existing(path: Path) -> Path:
    """Return a folder, or its nearest ancestor that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)
