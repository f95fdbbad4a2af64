"""What goes wrong around the app, each as a context that ends with it. tests/README.md lists them.

What only a path or a process is needed for are functions. `Faults` has the same and the rest for one running console.
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

FAKES = Path(__file__).resolve().parents[1] / "fakes"
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


@contextmanager
def hanging_driver(lock: Path) -> Iterator[None]:
    """Whoever asks the stand-in GPU's driver, with FAKE_GPU_HANG set to `lock`, waits in the kernel."""
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def hanging_server(path: Path) -> Iterator[None]:
    """At the Unix socket `path` somebody takes connections and never says a word, as a Docker daemon that hangs."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1000)  # who connects is let in by the kernel, and waits
        try:
            yield
        finally:
            path.unlink()


@contextmanager
def few_descriptors(process: psutil.Process, spare: int) -> Iterator[None]:
    """A process may have `spare` files and sockets more open than it has, and no further one."""
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() + spare, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


class Faults:
    """The faults of one console, to be switched on and off while it runs.

    It is started with `environment`, and keeps its state in `state`. `folder` holds the switches. That is on a disk of
    its own, which takes root; without, it can't be filled up.
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
            "PYTHONPATH": os.pathsep.join(str(FAKES / name) for name in ("standing", "gpu")),
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
        """Not one more byte of state can be written."""
        return full_disk(self.disk)

    @property
    def can_fill_disk(self) -> bool:
        return os.path.ismount(self.disk)

    def locked_database(self) -> AbstractContextManager[None]:
        return locked_database(self.database)

    def hanging_driver(self) -> AbstractContextManager[None]:
        """Of the GPU: the stand-in is there from the beginning."""
        return hanging_driver(self._driver)

    def hanging_docker(self) -> AbstractContextManager[None]:
        """Before and after it, there is no Docker."""
        return hanging_server(self._docker)

    def hanging_models(self) -> AbstractContextManager[None]:
        """Whoever asks about a file of the models folder waits until it is over."""
        return self.slow_models(float("inf"))

    @contextmanager
    def slow_models(self, seconds: float) -> Iterator[None]:
        """Each question about a file of the models folder takes so long, or until it is over."""
        switch = self._folder / "slow-models"
        switch.write_text(f"{seconds}\n{self._models}\n")
        try:
            yield
        finally:
            switch.unlink()

    def greenlets(self, worker: psutil.Process) -> int:
        """How many the app's worker has, that moment."""
        with socket.socket(socket.AF_UNIX) as asker:
            asker.settimeout(60)
            asker.connect(str(self._folder / str(worker.pid)))
            return int(asker.recv(100))
