"""The state folder: private to this user, writable, and locked by one Switchyard at a time.

Files in it are created private regardless of the umask, which engines and downloads inherit: their files may have to be
readable by others. Imports only the standard library, because gunicorn's master uses this.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600
DATABASE = "switchyard.db"
OWN_FOLDERS = ("logs", "processes", "studio-pictures")
OWN_FILES = ("switchyard*.db*", "lock", "owner")
"""With OWN_FOLDERS, everything the app keeps. Nothing else is changed, because the folder may have been set by mistake.
"""
PROBE_BYTES = 65_536
"""More than a process record and the first lines of its log need."""
NAME_A_FOLDER = "name a folder for Switchyard alone in SWITCHYARD_STATE_DIR."
OR_NAME_A_FOLDER = f"or {NAME_A_FOLDER}"


class StateError(Exception):
    """The state folder can't be used. The text is one sentence for people: where, why, what to do."""


def private_opener(path: str, flags: int) -> int:
    """`opener` for `open` that creates files readable by this user only."""
    return os.open(path, flags, PRIVATE_FILE)


def prepare(folder: Path) -> None:
    """Create the folder, and remove other users' access to it and the app's files in it. Raises StateError."""
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        if folder.stat().st_mode & stat.S_ISVTX and not _holds_only_ours(folder):
            raise StateError(f"The state folder {folder.absolute()} is shared by all, as /tmp is: {NAME_A_FOLDER}")
        for path in _own_paths(folder):
            _make_private(path)
    except (FileExistsError, NotADirectoryError):
        raise StateError(f"The state folder {folder.absolute()} is a file: move it away, {OR_NAME_A_FOLDER}") from None
    except OSError as error:
        raise _state_error(folder, error) from None


def claim(folder: Path) -> int:
    """Prepare and lock the folder; return the descriptor that holds the lock, here or in a fork of this process.

    Raises StateError, also if another Switchyard holds the lock or nothing can be written.
    """
    prepare(folder)
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    except OSError as error:
        raise _state_error(folder, error) from None
    try:
        _lock(lock, folder)
    except BaseException:
        os.close(lock)
        raise
    return lock


def owner(folder: Path, make: Callable[[], str]) -> str:
    """Return the id that marks what belongs to this state folder, such as containers; `make` creates it once.

    It is kept in a file of its own, which outlives the database. Raises StateError.
    """
    path = folder / "owner"
    try:
        owner_id = path.read_text(encoding="ascii").strip() if path.exists() else ""
        if not owner_id:
            owner_id = make()
            with open(path, "w", encoding="ascii", opener=private_opener) as file:
                file.write(owner_id)
    except OSError as error:
        raise _state_error(folder, error) from None
    return owner_id


def check_writable(folder: Path) -> None:
    """Write a probe file and delete it. Raises StateError; may block on a slow disk."""
    probe = folder / f"probe-{os.getpid()}"
    try:
        try:
            with open(probe, "wb", opener=private_opener) as file:
                file.write(b"\0" * PROBE_BYTES)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _state_error(folder, error) from None


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StateError(
            f"Switchyard is already running on the state folder {folder.resolve()} (process "
            f"{os.read(lock, 20).decode().strip() or 'unknown'}): stop it first, or give this copy its own "
            "SWITCHYARD_STATE_DIR and SWITCHYARD_PORT."
        ) from None
    check_writable(folder)
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


def _own_paths(folder: Path) -> Iterator[Path]:
    """Yield the folder and everything in it that belongs to the app."""
    yield folder
    for pattern in OWN_FILES:
        yield from folder.glob(pattern)
    for own in (folder / name for name in OWN_FOLDERS):
        if own.is_dir():
            yield own
            yield from own.rglob("*")


def _holds_only_ours(folder: Path) -> bool:
    """Return whether the folder holds nothing else. A freshly mounted disk is world-writable too, and may be used."""
    ours = (*OWN_FILES, *OWN_FOLDERS)
    return all(any(path.match(pattern) for pattern in ours) for path in folder.iterdir())


def _make_private(path: Path) -> None:
    """Remove the access of other users, which an earlier version or a copy may have granted."""
    with suppress(FileNotFoundError):  # the record of an engine that has ended meanwhile
        found = path.lstat()
        mode = stat.S_IMODE(found.st_mode)
        allowed = PRIVATE_FOLDER if stat.S_ISDIR(found.st_mode) else PRIVATE_FILE
        if stat.S_ISLNK(found.st_mode) or not mode & ~allowed:
            return
        try:
            path.chmod(mode & allowed)
        except PermissionError:
            if found.st_uid != os.geteuid():  # else the file system doesn't support permissions
                raise _foreign_owner_error(path, found.st_uid) from None


def _foreign_owner_error(path: Path, owner: int) -> StateError:
    return StateError(
        f"{path.absolute()} belongs to user {owner}, and Switchyard runs as user {os.geteuid()}: give it to that user "
        f"(chown), {OR_NAME_A_FOLDER}"
    )


def _state_error(folder: Path, error: OSError) -> StateError:
    with suppress(OSError):
        owner = folder.stat().st_uid
        if isinstance(error, PermissionError) and owner != os.geteuid():
            return _foreign_owner_error(folder, owner)
    return StateError(
        f"The state folder {folder.absolute()} can't be written: {error.strerror or error}; free some space on that "
        f"disk, or make the folder writable, {OR_NAME_A_FOLDER}"
    )
