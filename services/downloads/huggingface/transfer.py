"""How a repository's files come from the Hugging Face hub, wherever they go. Run by the child process alone.

huggingface_hub 2.4 lists the repository, carries the token and follows the redirects that `redirects.py` lets pass.
The bytes are written here: its `hf_hub_download` starts over each time (it writes to a file with a random name and
deletes that when it fails), and hands on bytes in steps of 10 MiB.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx2
from huggingface_hub import HfApi, ModelInfo, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # loaded by name, unseen by mypy

from services.downloads.fetcher import DownloadError, Phase
from services.downloads.huggingface.files import held, remove, unfinished
from services.downloads.huggingface.names import HubName
from services.downloads.huggingface.redirects import BLOB
from services.sizes import format_size

TRIES = 5
"""In a row, without a byte between them."""
PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""
SAY_SECONDS = 0.2
SYNC_BYTES = 64 * 2**20
"""Bytes between two syncs to the disk: one at the end could take minutes, in which nothing would be said."""
HASH_BYTES = 4 * 2**20
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file to bring. `sha256` is None for a file outside of LFS, whose `digest` is git's id of its content."""

    path: str
    size: int
    digest: str
    sha256: str | None
    destination: Path

    @property
    def is_here(self) -> bool:
        return self.destination.is_file() and self.destination.stat().st_size == self.size

    @property
    def unfinished(self) -> Path:
        return unfinished(self.destination, self.digest)

    @property
    def arrived(self) -> int:
        """Bytes that are here."""
        if self.is_here:
            return self.size
        return min(self.size, self.unfinished.stat().st_size) if self.unfinished.exists() else 0


class Layout(Protocol):
    """Which of a repository's files are wanted, and where they go.

    `place` and `advice` are for people: what the folder is called, and what to do when it can't be written.
    `together`: no file is put in its place before all have arrived and been checked.
    """

    place: str
    advice: str
    together: bool

    def choose(self, listed: Iterable[str]) -> Sequence[str]:
        """The paths that are wanted out of all that the repository lists. Raises DownloadError."""

    def destination(self, path: str, digest: str) -> Path:
        """Where a file goes; files that share a place are the same bytes."""

    def leftovers(self, destinations: Collection[Path]) -> Iterable[Path]:
        """Unfinished files, of these destinations or of what the repository had there before."""

    def finish(self, commit: str | None, digests: Mapping[str, str]) -> None:
        """Every file is in its place, by its path and digest: what is left to do. Writes nothing that is there."""


class CutOff(httpx2.TransportError):
    """An answer ended early, or did not fit what is here already."""


class Patience:
    """Counts failures of the connection or the hub in a row: longer and longer pauses, then the error itself."""

    def __init__(self, pause: float, tries: int = TRIES) -> None:
        self._pause = pause
        self._tries = tries
        self._failures = 0

    def after(self, error: httpx2.TransportError | HfHubHTTPError, got_further: bool = False) -> None:
        """Sleep before the next try. Raises `error` when there were enough, or trying again can't help."""
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
            raise error
        self._failures = 1 if got_further else self._failures + 1
        print(f"try {self._failures} of {self._tries} failed: {error!r}", file=sys.stderr)
        if self._failures >= self._tries:
            raise error
        time.sleep(self._pause * 2 ** (self._failures - 1))


class Speaker:
    """Says what the transfer does on stdout."""

    def __init__(self) -> None:
        self._out = sys.stdout
        sys.stdout = sys.stderr  # what a library prints must not come between
        self._said_at = 0.0

    def say(self, line: Mapping[str, object]) -> None:
        self._said_at = time.monotonic()
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def seen(self, phase: Phase, files: Sequence[HubFile] = (), expected_bytes: int | None = None) -> None:
        parts = {file.path: [file.arrived, file.size] for file in files}
        self.say({"phase": phase, "parts": parts, "expected_bytes": expected_bytes})

    def going_on(self, phase: Phase, file: HubFile) -> None:
        """Say how far it is, not more often than every `SAY_SECONDS`."""
        if time.monotonic() - self._said_at >= SAY_SECONDS:
            self.seen(phase, [file])


class Transfer:
    """From a name to its files in their place. `asks` is how often the hub is asked at most what there is."""

    def __init__(self, layout: Layout, name: HubName, speaker: Speaker, *, pause: float, asks: int = TRIES) -> None:
        self._layout = layout
        self._name = name
        self._speaker = speaker
        self._pause = pause
        self._asks = asks

    def run(self) -> None:
        commit, listed = self._list()
        files = list({file.destination: file for file in listed}.values())
        self._speaker.seen("downloading", files, expected_bytes=sum(file.size for file in files))
        missing = [file for file in files if not file.is_here]
        with ExitStack() as locks:  # held to the end: nobody else writes to or moves what is being checked
            outs = {file: locks.enter_context(self._open(file)) for file in missing}
            self._clear(files)
            self._check_room(missing)
            for batch in [missing] if self._layout.together else [[file] for file in missing]:
                for file in batch:
                    self._download(file, outs[file], commit)
                for file in batch:
                    self._verify(file)
                for file in batch:
                    self._put_in_place(file, outs[file])
        self._layout.finish(commit, {file.path: file.digest for file in listed})

    def _list(self) -> tuple[str | None, list[HubFile]]:
        """The commit that is fetched, whatever happens to its branch meanwhile, and its files."""
        info = self._ask()
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        files = []
        for path in self._layout.choose(listed):
            sibling = listed[path]
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            digest = sha256 or sibling.blob_id
            if not isinstance(sibling.size, int) or sibling.size < 0 or not DIGEST.fullmatch(str(digest)):
                raise DownloadError("hub_error", f"The hub does not tell size and digest of {path}. Try again later.")
            destination = self._layout.destination(path, str(digest))
            files.append(HubFile(path, sibling.size, str(digest), sha256, destination))
        return info.sha or self._name.revision, files

    def _ask(self) -> ModelInfo:
        patience = Patience(self._pause, self._asks)
        while True:
            try:
                return HfApi().model_info(
                    self._name.repo_id,
                    revision=self._name.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
            except (httpx2.TransportError, HfHubHTTPError) as error:
                patience.after(error)
            except (ValueError, TypeError, KeyError) as error:
                raise DownloadError(
                    "hub_error",
                    f"{constants.ENDPOINT} does not answer like a Hugging Face hub. Check HF_ENDPOINT and whether the "
                    "network asks for a login.",
                ) from error

    def _open(self, file: HubFile) -> AbstractContextManager[BinaryIO]:
        file.destination.parent.mkdir(parents=True, exist_ok=True)
        return held(file.unfinished, file.path)

    def _clear(self, files: Sequence[HubFile]) -> None:
        """Remove what unfinished files were left of what the repository had there before."""
        wanted = {file.unfinished for file in files}
        for other in self._layout.leftovers({file.destination for file in files}):
            if other not in wanted:
                remove(other)

    def _check_room(self, missing: Sequence[HubFile]) -> None:
        needed = sum(file.size - file.arrived for file in missing)
        free = shutil.disk_usage(missing[0].destination.parent).free if missing else 0
        if needed > free:
            raise DownloadError(
                "disk_full",
                f"{self._name} needs {format_size(needed)} more, and the disk of {self._layout.place} has "
                f"{format_size(free)} free. Make room and try again.",
                may_resume=True,
            )

    def _download(self, file: HubFile, out: BinaryIO, commit: str | None) -> None:
        url = hf_hub_url(self._name.repo_id, file.path, revision=commit)
        patience = Patience(self._pause)
        while (before := file.arrived) < file.size:
            try:
                self._receive(url, out, file)
            except (httpx2.TransportError, HfHubHTTPError) as error:
                patience.after(error, got_further=file.arrived > before)
        self._speaker.seen("downloading", [file])

    def _receive(self, url: str, out: BinaryIO, file: HubFile) -> None:
        """Ask for what is missing and write it as it comes. Raises CutOff when not all of it came."""
        here = file.arrived
        headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
        if here:
            headers["Range"] = f"bytes={here}-"
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, extensions=BLOB
        ) as answer:
            if answer.status_code == 416:
                out.truncate(0)
                raise CutOff("it does not have the range that is missing")
            hf_raise_for_status(answer)
            if here and not _goes_on(answer, here):
                out.truncate(0)
                here = 0
            synced = here
            for piece in answer.iter_bytes():
                here += len(piece)
                if here > file.size:
                    raise self._mismatch(file, f"more than {file.size} bytes came")
                out.write(piece)
                out.flush()
                if here - synced >= SYNC_BYTES:
                    os.fdatasync(out.fileno())
                    synced = here
                self._speaker.going_on("downloading", file)
        if here < file.size:
            raise CutOff(f"the answer ended after {here} of {file.size} bytes")

    def _verify(self, file: HubFile) -> None:
        """Compare with what the hub tells: LFS' SHA-256, else git's id (SHA-1 over a head and the content).

        Not where another program has put the same file there meanwhile: it did that itself.
        """
        if file.is_here:
            return
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        self._speaker.seen("verifying")
        with file.unfinished.open("rb") as content:
            while piece := content.read(HASH_BYTES):
                digest.update(piece)
                self._speaker.going_on("verifying", file)
        if digest.hexdigest() != file.digest:
            raise self._mismatch(file, "its digest is another one than the hub tells")

    def _mismatch(self, file: HubFile, why: str) -> DownloadError:
        file.unfinished.unlink(missing_ok=True)
        return DownloadError(
            "digest_mismatch",
            f"{file.path} arrived damaged: {why}. It was removed; try again. If that happens again, something between "
            "this machine and the hub changes the bytes.",
        )

    def _put_in_place(self, file: HubFile, out: BinaryIO) -> None:
        self._speaker.seen("writing")
        if file.is_here:
            file.unfinished.unlink(missing_ok=True)
            return
        os.fsync(out.fileno())
        file.unfinished.replace(file.destination)


def _goes_on(answer: httpx2.Response, here: int) -> bool:
    """Whether the answer is the range from `here`; a server may ignore the wish and send everything."""
    return answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {here}-")
