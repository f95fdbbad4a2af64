"""The folder that holds what the app keeps: for this user alone, writable, and one Switchyard's at a time.

Whatever is created in it is created private, whatever the umask: that one is passed on to engines and downloads, whose
files others may well have to read. Only the standard library is imported, since gunicorn's master uses this.
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
OWN_FOLDERS = ("logs", "processes")
OWN_FILES = ("switchyard*.db*", "lock", "owner")
"""With the folders, all that the app keeps. Nothing else is touched: the folder may have been chosen badly."""
PROBE_BYTES = 65_536
"""More than the record of a process and the first lines of its log take."""
ONE_OF_ITS_OWN = "name a folder for Switchyard alone in SWITCHYARD_STATE_DIR."
ANOTHER = f"or {ONE_OF_ITS_OWN}"


class StateError(Exception):
    """The state folder can't be used. The text is one sentence for people: where, why, what to do."""


def private_opener(path: str, flags: int) -> int:
    """An `opener` for `open`: what it creates can be read by this user alone."""
    return os.open(path, flags, PRIVATE_FILE)


def prepare(folder: Path) -> None:
    """Make the folder, and close it and what the app keeps in it to every other user. Raises StateError."""
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        if folder.stat().st_mode & stat.S_ISVTX and not _holds_only_ours(folder):
            raise StateError(f"The state folder {folder.absolute()} is shared by all, as /tmp is: {ONE_OF_ITS_OWN}")
        for path in _kept(folder):
            _close_to_others(path)
    except (FileExistsError, NotADirectoryError):
        raise StateError(f"The state folder {folder.absolute()} is a file: move it away, {ANOTHER}") from None
    except OSError as error:
        raise _unusable(folder, error) from None


def claim(folder: Path) -> int:
    """Prepare the folder and hold it while the descriptor that is returned is open, here or in a fork of this process.

    Raises StateError, also when another Switchyard holds it or nothing can be written.
    """
    prepare(folder)
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        _take(lock, folder)
    except BaseException:
        os.close(lock)
        raise
    return lock


def owner(folder: Path, make: Callable[[], str]) -> str:
    """What tells this state's belongings from another's where both are, such as containers; `make` invents it once.

    It has a file of its own, which outlives the database. Raises StateError.
    """
    path = folder / "owner"
    try:
        word = path.read_text(encoding="ascii").strip() if path.exists() else ""
        if not word:
            word = make()
            with open(path, "w", encoding="ascii", opener=private_opener) as file:
                file.write(word)
    except OSError as error:
        raise _unusable(folder, error) from None
    return word


def check_writable(folder: Path) -> None:
    """Write a probe into the folder and delete it. Raises StateError; takes a moment on a slow disk."""
    probe = folder / f"probe-{os.getpid()}"
    try:
        try:
            with open(probe, "wb", opener=private_opener) as file:
                file.write(b"\0" * PROBE_BYTES)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None


def _take(lock: int, folder: Path) -> None:
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


def _kept(folder: Path) -> Iterator[Path]:
    """The folder and all that the app keeps in it, as far as it is there."""
    yield folder
    for pattern in OWN_FILES:
        yield from folder.glob(pattern)
    for own in (folder / name for name in OWN_FOLDERS):
        if own.is_dir():
            yield own
            yield from own.rglob("*")


def _holds_only_ours(folder: Path) -> bool:
    """Whether nothing else is in it: a disk that was just mounted is shared, too, and may be taken."""
    ours = (*OWN_FILES, *OWN_FOLDERS)
    return all(any(path.match(pattern) for pattern in ours) for path in folder.iterdir())


def _close_to_others(path: Path) -> None:
    """Take the rights of all other users, which an earlier version or a copy may have left them."""
    with suppress(FileNotFoundError):  # an engine that ends meanwhile takes its record along
        found = path.lstat()
        mode = stat.S_IMODE(found.st_mode)
        allowed = PRIVATE_FOLDER if stat.S_ISDIR(found.st_mode) else PRIVATE_FILE
        if stat.S_ISLNK(found.st_mode) or not mode & ~allowed:
            return
        try:
            path.chmod(mode & allowed)
        except PermissionError:
            if found.st_uid != os.geteuid():  # else it lies on a file system without permissions
                raise _foreign(path, found.st_uid) from None


def _foreign(path: Path, owner: int) -> StateError:
    return StateError(
        f"{path.absolute()} belongs to user {owner}, and Switchyard runs as user {os.geteuid()}: give it to that user "
        f"(chown), {ANOTHER}"
    )


def _unusable(folder: Path, error: OSError) -> StateError:
    with suppress(OSError):
        owner = folder.stat().st_uid
        if isinstance(error, PermissionError) and owner != os.geteuid():
            return _foreign(folder, owner)
    return StateError(
        f"The state folder {folder.absolute()} can't be written: {error.strerror or error}; free some space on that "
        f"disk, or make the folder writable, {ANOTHER}"
    )
