"""What goes wrong around the app, each as a context that ends with it. tests/README.md lists them."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

NOBODY = 65_534
"""The user and group who own nothing."""
CHUNK = b"\0" * 65_536
PAGE_BYTES = 4096
"""Of a SQLite database."""


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own in `folder`, which can be filled up. Takes root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Not one more byte fits on the file system of `folder`; deleting what fills it makes room again."""
    filling = folder / "filling"
    try:
        with filling.open("wb", buffering=0) as file:
            chunk = CHUNK
            while chunk:
                try:
                    file.write(chunk)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    chunk = chunk[: len(chunk) // 2]
        yield
    finally:
        filling.unlink()


@contextmanager
def read_only_disk(folder: Path) -> Iterator[None]:
    """The file system that `small_disk` made in `folder` can only be read, by root as well."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True, timeout=30)


def readable_by_nobody(folder: Path) -> list[str]:
    """Whatever in `folder`, itself included, a user without any rights could read or look into. Takes root."""
    found = subprocess.run(
        ["find", str(folder), "-readable"],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return found.stdout.splitlines()


def as_nobody(act: Callable[[], object]) -> str:
    """Call `act` in a fork of this process that has no rights; the `repr` of what it raises. Takes root."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        words = b"None"
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
        except BaseException as error:
            words = repr(error).encode()
        os.write(writer, words)
        os._exit(0)  # pytest must not go on in the fork
    os.close(writer)
    with open(reader, "rb") as told:
        words = told.read()
    os.waitpid(pid, 0)
    return words.decode()


def modes(folder: Path) -> dict[str, int]:
    """The permission bits of a folder and of everything in it, by path relative to it."""
    everything = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): os.lstat(path).st_mode & 0o777 for path in everything}


@contextmanager
def locked_database(path: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Another program writes to a database, and doesn't come to an end.

    An exclusive lock keeps readers out as well; it can be had only while nobody else has the database open.
    """
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)) as other:
        if exclusive:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


def corrupt_database(path: Path) -> None:
    """Overwrite pages in the middle of a database, as a bad disk does; its header stays."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        for page in range(2, size // PAGE_BYTES, 2):
            file.seek(page * PAGE_BYTES)
            file.write(os.urandom(PAGE_BYTES))
