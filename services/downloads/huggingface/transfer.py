"""Transfers a repository's files from Hugging Face, for any layout. Run in the child process only.

huggingface_hub 2.4 lists the repository, sends the token and follows the redirects that `redirects.py` permits. The
bytes are written here, because its `hf_hub_download` can't resume (it writes to a file with a random name, deleted on
failure) and delivers bytes in steps of 10 MiB.
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
from services.downloads.huggingface.files import locked, partial_path, remove
from services.downloads.huggingface.names import HubName
from services.downloads.huggingface.redirects import BLOB
from services.sizes import format_size

MAX_TRIES = 5
"""Limit of failures in a row, without a byte received in between."""
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
"""HTTP statuses after which a retry may succeed."""
REPORT_SECONDS = 0.2
SYNC_BYTES = 64 * 2**20
"""Bytes between syncs to the disk: a single one at the end could block without progress for minutes."""
HASH_BYTES = 4 * 2**20
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file to fetch. `sha256` is None for a file not in LFS, whose `digest` is git's id of its content."""

    path: str
    size: int
    digest: str
    sha256: str | None
    destination: Path

    @property
    def is_here(self) -> bool:
        return self.destination.is_file() and self.destination.stat().st_size == self.size

    @property
    def partial_path(self) -> Path:
        return partial_path(self.destination, self.digest)

    @property
    def arrived(self) -> int:
        """Bytes present so far."""
        if self.is_here:
            return self.size
        return min(self.size, self.partial_path.stat().st_size) if self.partial_path.exists() else 0


class Layout(Protocol):
    """Selects the files to fetch, and where they go.

    `place` and `advice` are for people: the folder's name, and what to do if it can't be written. `together`: no file
    is moved into place before all have been verified.
    """

    place: str
    advice: str
    together: bool

    def choose(self, listed: Iterable[str]) -> Sequence[str]:
        """Return the paths to fetch out of those that the repository lists. Raises DownloadError."""

    def destination(self, path: str, digest: str) -> Path:
        """Return where a file goes; files with the same destination have the same content."""

    def leftovers(self, destinations: Collection[Path]) -> Iterable[Path]:
        """Return partial files, of these destinations or of earlier versions of the repository."""

    def finish(self, commit: str | None, digests: Mapping[str, str]) -> None:
        """Complete the layout after every file is in place. Files are given by path and digest. Idempotent."""


class TruncatedReply(httpx2.TransportError):
    """A response ended early, or does not match the partial file."""


class RetryPolicy:
    """Counts failures in a row, with exponential backoff, up to a number of tries."""

    def __init__(self, pause: float, tries: int = MAX_TRIES) -> None:
        self._pause = pause
        self._tries = tries
        self._failures = 0

    def pause_or_raise(self, error: httpx2.TransportError | HfHubHTTPError, got_further: bool = False) -> None:
        """Sleep before the next try. Raises `error` after the last try, or if a retry can't help."""
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT_STATUSES:
            raise error
        self._failures = 1 if got_further else self._failures + 1
        print(f"try {self._failures} of {self._tries} failed: {error!r}", file=sys.stderr)
        if self._failures >= self._tries:
            raise error
        time.sleep(self._pause * 2 ** (self._failures - 1))


class LineWriter:
    """Writes progress as JSON lines to stdout."""

    def __init__(self) -> None:
        self._out = sys.stdout
        sys.stdout = sys.stderr  # libraries must not print between the lines
        self._written_at = 0.0

    def write(self, line: Mapping[str, object]) -> None:
        self._written_at = time.monotonic()
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def report_files(self, phase: Phase, files: Sequence[HubFile] = (), expected_bytes: int | None = None) -> None:
        parts = {file.path: [file.arrived, file.size] for file in files}
        self.write({"phase": phase, "parts": parts, "expected_bytes": expected_bytes})

    def report_progress(self, phase: Phase, file: HubFile) -> None:
        """Report a file's progress, at most every REPORT_SECONDS."""
        if time.monotonic() - self._written_at >= REPORT_SECONDS:
            self.report_files(phase, [file])


class Transfer:
    """Fetches a model. `max_list_tries` limits the tries to list the repository."""

    def __init__(
        self, layout: Layout, name: HubName, writer: LineWriter, *, pause: float, max_list_tries: int = MAX_TRIES
    ) -> None:
        self._layout = layout
        self._name = name
        self._writer = writer
        self._pause = pause
        self._max_list_tries = max_list_tries

    def run(self) -> None:
        commit, listed = self._list()
        files = list({file.destination: file for file in listed}.values())
        self._writer.report_files("downloading", files, expected_bytes=sum(file.size for file in files))
        missing = [file for file in files if not file.is_here]
        with ExitStack() as locks:  # held to the end, so that no other process changes the files
            outs = {file: locks.enter_context(self._open(file)) for file in missing}
            self._remove_outdated(files)
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
        """Return the commit to fetch, fixed from here on, and its files."""
        info = self._list_files()
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        files = []
        for path in self._layout.choose(listed):
            sibling = listed[path]
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            digest = sha256 or sibling.blob_id
            if not isinstance(sibling.size, int) or sibling.size < 0 or not DIGEST.fullmatch(str(digest)):
                raise DownloadError(
                    "hub_error", f"The hub does not report the size and digest of {path}. Try again later."
                )
            destination = self._layout.destination(path, str(digest))
            files.append(HubFile(path, sibling.size, str(digest), sha256, destination))
        return info.sha or self._name.revision, files

    def _list_files(self) -> ModelInfo:
        retry = RetryPolicy(self._pause, self._max_list_tries)
        while True:
            try:
                return HfApi().model_info(
                    self._name.repo_id,
                    revision=self._name.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
            except (httpx2.TransportError, HfHubHTTPError) as error:
                retry.pause_or_raise(error)
            except (ValueError, TypeError, KeyError) as error:
                raise DownloadError(
                    "hub_error",
                    f"{constants.ENDPOINT} does not answer like a Hugging Face hub. Check HF_ENDPOINT and whether the "
                    "network asks for a login.",
                ) from error

    def _open(self, file: HubFile) -> AbstractContextManager[BinaryIO]:
        file.destination.parent.mkdir(parents=True, exist_ok=True)
        return locked(file.partial_path, file.path)

    def _remove_outdated(self, files: Sequence[HubFile]) -> None:
        """Delete partial files of earlier versions of the repository."""
        wanted = {file.partial_path for file in files}
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
        retry = RetryPolicy(self._pause)
        while (before := file.arrived) < file.size:
            try:
                self._receive(url, out, file)
            except (httpx2.TransportError, HfHubHTTPError) as error:
                retry.pause_or_raise(error, got_further=file.arrived > before)
        self._writer.report_files("downloading", [file])

    def _receive(self, url: str, out: BinaryIO, file: HubFile) -> None:
        """Request the missing bytes and append them. Raises TruncatedReply if the response ends early."""
        here = file.arrived
        headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
        if here:
            headers["Range"] = f"bytes={here}-"
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, extensions=BLOB
        ) as answer:
            if answer.status_code == 416:
                out.truncate(0)
                raise TruncatedReply("it does not have the range that is missing")
            hf_raise_for_status(answer)
            if here and not _is_range_from(answer, here):
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
                self._writer.report_progress("downloading", file)
        if here < file.size:
            raise TruncatedReply(f"the answer ended after {here} of {file.size} bytes")

    def _verify(self, file: HubFile) -> None:
        """Compare a file's digest with the listed one.

        That is LFS' SHA-256, else git's id (SHA-1 over a header and the content). Skipped if another program has put
        the same file there meanwhile and so verified it.
        """
        if file.is_here:
            return
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        self._writer.report_files("verifying")
        with file.partial_path.open("rb") as content:
            while piece := content.read(HASH_BYTES):
                digest.update(piece)
                self._writer.report_progress("verifying", file)
        if digest.hexdigest() != file.digest:
            raise self._mismatch(file, "its digest is another one than the hub tells")

    def _mismatch(self, file: HubFile, why: str) -> DownloadError:
        file.partial_path.unlink(missing_ok=True)
        return DownloadError(
            "digest_mismatch",
            f"{file.path} arrived damaged: {why}. It was removed; try again. If that happens again, something between "
            "this machine and the hub changes the bytes.",
        )

    def _put_in_place(self, file: HubFile, out: BinaryIO) -> None:
        self._writer.report_files("writing")
        if file.is_here:
            file.partial_path.unlink(missing_ok=True)
            return
        os.fsync(out.fileno())
        file.partial_path.replace(file.destination)


def _is_range_from(answer: httpx2.Response, here: int) -> bool:
    """Return whether a response is the range from `here`; a server may ignore the request for a range."""
    return answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {here}-")
