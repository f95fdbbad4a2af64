"""Faults of the app's environment, each as a context manager that ends with it. tests/README.md lists them.

Faults that need only a path or a process are functions. `Faults` has these and the rest for one running console.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

from tests.support.gpu import fake_driver

FAKES = Path(__file__).resolve().parents[1] / "fakes"
NOBODY = 65_534
"""User and group ids of `nobody`, who owns no file."""
CHUNK = b"\0" * 65_536
PAGE_BYTES = 4096
"""Page size of a SQLite database."""


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own in `folder`, which can be filled up. Needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill the file system of `folder` to the last byte; the fill file is deleted at the end."""
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
    """Remount the file system that `small_disk` made in `folder` read-only, also for root."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True, timeout=30)


def readable_by_nobody(folder: Path) -> list[str]:
    """All paths in `folder`, itself included, that the user `nobody` could read or list. Needs root."""
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
    """Call `act` as the user `nobody` in a fork of this process; return the `repr` of what it raises. Needs root."""
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
        os._exit(0)  # pytest must not continue in the fork
    os.close(writer)
    with open(reader, "rb") as result:
        words = result.read()
    os.waitpid(pid, 0)
    return words.decode()


def modes(folder: Path) -> dict[str, int]:
    """The permission bits of a folder and of everything in it, by path relative to it."""
    everything = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): os.lstat(path).st_mode & 0o777 for path in everything}


@contextmanager
def locked_database(path: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Hold a write lock on a database, like another program whose transaction doesn't end.

    An exclusive lock blocks readers as well; it can be taken only while no other connection has the database open.
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
    """Overwrite pages in the middle of a database, as a bad disk does; its header stays intact."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        for page in range(2, size // PAGE_BYTES, 2):
            file.seek(page * PAGE_BYTES)
            file.write(os.urandom(PAGE_BYTES))


@contextmanager
def hanging_driver(lock: Path) -> Iterator[None]:
    """Block calls to the fake GPU driver in the kernel, in processes that have FAKE_GPU_HANG set to `lock`."""
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def hanging_server(path: Path) -> Iterator[None]:
    """Accept connections at the Unix socket `path` and never answer, like a hanging Docker daemon."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1000)  # the kernel accepts the connections, which then wait
        try:
            yield
        finally:
            path.unlink()


@contextmanager
def few_descriptors(process: psutil.Process, spare: int) -> Iterator[None]:
    """Allow a process `spare` more open files and sockets than it has now."""
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() + spare, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


class Faults:
    """The faults of one console, to be switched on and off while it runs.

    The console must be started with `environment`; `folder` holds the switches. Its state is in `state`, which as root
    is on a small file system of its own; otherwise that can't be filled up.
    """

    def __init__(self, folder: Path, models: Path, disk_bytes: int = 64_000_000) -> None:
        self._folder = folder
        self._models = models
        self._driver = folder / "driver"
        self._docker = folder / "docker.sock"
        self._disk: AbstractContextManager[object] = nullcontext()
        if os.geteuid() == 0:
            self._disk = small_disk(folder / "disk", disk_bytes)
        self.disk = folder / "disk"
        self.state = self.disk / "state"
        self.environment = {
            **fake_driver(FAKES / "standing"),
            "STANDING_FAULTS": str(folder),
            "FAKE_GPU_HANG": str(self._driver),
            "DOCKER_HOST": f"unix://{self._docker}",
            "SWITCHYARD_STATE_DIR": str(self.state),
        }

    def __enter__(self) -> Faults:
        self._folder.mkdir(exist_ok=True)
        self._disk.__enter__()
        self.state.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.__exit__(None, None, None)

    @property
    def database(self) -> Path:
        return self.state / "switchyard.db"

    def full_disk(self) -> AbstractContextManager[None]:
        """Let no more byte of state be written."""
        return full_disk(self.disk)

    @property
    def can_fill_disk(self) -> bool:
        return os.path.ismount(self.disk)

    def locked_database(self) -> AbstractContextManager[None]:
        return locked_database(self.database)

    def hanging_driver(self) -> AbstractContextManager[None]:
        """Make the fake GPU driver hang; outside this context it answers."""
        return hanging_driver(self._driver)

    def hanging_docker(self) -> AbstractContextManager[None]:
        """Make Docker accept connections and never answer; outside this context there is no Docker."""
        return hanging_server(self._docker)

    def hanging_models(self) -> AbstractContextManager[None]:
        """Make each file operation in the models folder wait until the context ends."""
        return self.slow_models(float("inf"))

    @contextmanager
    def slow_models(self, seconds: float) -> Iterator[None]:
        """Make each file operation in the models folder take `seconds`, or until the context ends."""
        switch = self._folder / "slow-models"
        switch.write_text(f"{seconds}\n{self._models}\n")
        try:
            yield
        finally:
            switch.unlink()

    def greenlets(self, worker: psutil.Process) -> int:
        """The number of greenlets in the app's worker now."""
        with socket.socket(socket.AF_UNIX) as asker:
            asker.settimeout(60)
            asker.connect(str(self._folder / str(worker.pid)))
            return int(asker.recv(100))
