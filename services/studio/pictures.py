"""The pictures that runs have made: files in the state folder, named by the SHA-256 of their content.

The total is capped: the ones stored first are removed first. Files are read and written in native threads.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import structlog

from services.native_threads import compute_in_thread, run_in_thread
from services.providers.adapters.pictures import MAX_PICTURE_BYTES, media_type_of
from services.providers.ports import Picture
from services.sizes import format_size
from services.state_folder import PRIVATE_FOLDER, private_opener

log = structlog.get_logger(__name__)

PICTURE_ID = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".part"


class NotAPicture(Exception):
    """What a provider gave as a picture can't be kept. The text is for people."""


class PicturesUnwritable(Exception):
    """The folder can't be written. The text is for people."""


def media_type(data: bytes) -> str | None:
    """Return the media type of a whole PNG, JPEG or WebP file by its content; None for all else, cut ones included."""
    kind = media_type_of(data)
    whole = {
        "image/png": data[12:16] == b"IHDR" and b"IEND" in data[-16:],
        "image/jpeg": b"\xff\xd9" in data[-1024:],  # some encoders append padding
        "image/webp": len(data) >= int.from_bytes(data[4:8], "little") + 8,
    }
    return kind if kind is not None and whole[kind] else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Pictures:
    """The store of pictures, at most `most_bytes` in all. Thread-safe."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] | None = None
        """Sizes in bytes by id, the one stored first at the beginning; None until the folder was read."""

    @property
    def most_bytes(self) -> int:
        return self._most_bytes

    def keep(self, picture: Picture) -> str:
        """Store a picture; return its id. Raises NotAPicture and PicturesUnwritable."""
        size = len(picture.data)
        if size > MAX_PICTURE_BYTES:
            raise NotAPicture(f"The picture has {format_size(size)}; {format_size(MAX_PICTURE_BYTES)} is the limit.")
        if size > self._most_bytes:
            raise NotAPicture(
                f"The picture has {format_size(size)}, and all pictures together may have "
                f"{format_size(self._most_bytes)} (setting studio_pictures_gb)."
            )
        if media_type(picture.data) is None:
            raise NotAPicture("What came as a picture is none, or only a part of one (neither PNG, JPEG nor WebP).")
        picture_id = compute_in_thread(_digest, picture.data)
        with self._lock:
            sizes = self._known()
            try:
                for old in self._surplus(sizes, 0 if picture_id in sizes else size, picture_id):
                    del sizes[old]
                    run_in_thread(self._remove, old)
                run_in_thread(self._write, picture_id, picture.data)
            except OSError as error:
                raise PicturesUnwritable(
                    f"The picture can't be stored in {self._folder.absolute()}: {error.strerror or error}."
                ) from None
            sizes[picture_id] = size
            sizes.move_to_end(picture_id)
        return picture_id

    def read(self, picture_id: str) -> Picture | None:
        """Return a stored picture; None if there is none with this id, or it was removed."""
        if not PICTURE_ID.fullmatch(picture_id):
            return None
        try:
            data = run_in_thread((self._folder / picture_id).read_bytes)
        except OSError:
            return None
        kind = media_type(data)
        return None if kind is None else Picture(data, kind)

    def has(self, picture_id: str) -> bool:
        """Return whether a picture is there. Does not wait for one that is being written."""
        if self._sizes is None:
            with self._lock:
                self._known()
        return picture_id in (self._sizes or ())

    def remove(self, picture_id: str) -> None:
        """Delete a picture; does nothing if it is gone."""
        with self._lock:
            if self._known().pop(picture_id, None) is not None:
                run_in_thread(self._remove, picture_id)

    def _surplus(self, sizes: OrderedDict[str, int], added: int, keep: str) -> list[str]:
        """Return the pictures to remove so that `added` more bytes fit."""
        total = sum(sizes.values()) + added
        surplus = []
        for picture_id, size in sizes.items():
            if total <= self._most_bytes:
                break
            if picture_id != keep:
                surplus.append(picture_id)
                total -= size
        return surplus

    def _known(self) -> OrderedDict[str, int]:
        if self._sizes is None:
            try:
                self._sizes = run_in_thread(self._read_folder)
            except OSError as error:
                log.warning("the folder of pictures can't be read", folder=str(self._folder), error=str(error))
                return OrderedDict()
        return self._sizes

    def _read_folder(self) -> OrderedDict[str, int]:
        """Return the pictures that are there, oldest first, and delete what an earlier run left unfinished."""
        found = []
        if self._folder.is_dir():
            for entry in os.scandir(self._folder):
                if entry.name.endswith(_UNFINISHED):
                    os.unlink(entry.path)
                elif PICTURE_ID.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    about = entry.stat(follow_symlinks=False)
                    found.append((about.st_mtime_ns, entry.name, about.st_size))
        return OrderedDict((name, size) for _, name, size in sorted(found))

    def _write(self, picture_id: str, data: bytes) -> None:
        """Write a file as a whole or not at all; one that exists becomes the newest."""
        self._folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
        path, unfinished = self._folder / picture_id, self._folder / f"{picture_id}{_UNFINISHED}"
        try:
            with open(unfinished, "wb", opener=private_opener) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise

    def _remove(self, picture_id: str) -> None:
        (self._folder / picture_id).unlink(missing_ok=True)
