"""The Hugging Face cache: where huggingface_hub 0.8 to 2.4 keeps what it downloads, and looks for it.

    <cache>/models--OWNER--NAME/blobs/DIGEST                the bytes; DIGEST is LFS' SHA-256, else git's id
    <cache>/models--OWNER--NAME/snapshots/COMMIT/PATH       a relative link to a blob
    <cache>/models--OWNER--NAME/refs/REVISION               the commit of a branch or tag

Other programs read and write it at the same time, huggingface_hub in vLLM's containers among them, so each file gets
its name in one step, when it is whole. Unfinished bytes are in `DIGEST.START_OF_DIGEST.incomplete` beside the blob, a
name that huggingface_hub never gives: where both fetch the same file, its bytes come twice and either is right. The
links are made after the last blob and the commit is written last, so that nobody is led to half a model.
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
from services.downloads.huggingface.files import DIGEST_CHARACTERS, SUFFIX
from services.downloads.huggingface.names import HubName
from services.downloads.huggingface.weight_files import choose, in_load_order, index_of, lacking, weights_of

USUAL_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OURS = re.compile(rf"(?P<start>[0-9a-f]{{{DIGEST_CHARACTERS}}})[0-9a-f]+\.(?P=start){re.escape(SUFFIX)}")
"""Our unfinished files; huggingface_hub puts eight random characters before `.incomplete`, or none."""


class CachedModel:
    """One revision of one model in a cache. Reads only, and takes what can't be read for missing."""

    def __init__(self, cache: Path, name: HubName) -> None:
        self.folder = cache / f"models--{name.owner}--{name.repo}"
        self.revision = name.revision or USUAL_REVISION

    def lacking(self) -> tuple[str, ...]:
        """What vLLM would miss, in words or as paths; empty when it finds all that it loads."""
        sizes = self._sizes()
        return lacking(sizes, self._indexed(sizes)) if sizes else ("all of its files",)

    def shard_bytes(self) -> tuple[int, ...]:
        """The sizes of its weights' files, in the order in which vLLM loads them; empty when they are not all here.

        Opens one short file and looks at the others.
        """
        sizes = self._sizes()
        if lacking(sizes):
            return ()
        return tuple(sizes[path] or 0 for path in in_load_order(weights_of(sizes)))

    def _sizes(self) -> dict[str, int | None]:
        """Every file of the snapshot with its size, None where its blob is missing."""
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
        """The weights that the model's index lists; empty where there is none, or it can't be read."""
        snapshot, index = self._snapshot(), index_of(weights_of(sizes))
        if snapshot is None or index is None or sizes.get(index) is None:
            return ()
        try:
            listed = json.loads((snapshot / index).read_bytes())["weight_map"].values()
            return {str(path) for path in listed}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return ()


class CacheLayout:
    """A cache as a place for what vLLM loads of one model."""

    together = False

    def __init__(self, cache: Path, name: HubName) -> None:
        self.place = f"the Hugging Face cache {cache}"
        give = f"sudo chown -R {os.geteuid()} {shlex.quote(str(_there(cache)))}"
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
        return [path for path in blobs.glob(f"*{SUFFIX}") if _OURS.fullmatch(path.name)]

    def finish(self, commit: str | None, digests: Mapping[str, str]) -> None:
        if commit is None or not _COMMIT.fullmatch(commit):
            raise DownloadError("hub_error", "The hub does not tell the commit of what it lists. Check HF_ENDPOINT.")
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
    """What a file is called until it is whole; one that was left behind is gone."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    return draft


def _there(path: Path) -> Path:
    """A folder, or where it would have to be made: the nearest one above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)
