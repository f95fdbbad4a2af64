"""Child processes that can't be lost: own process group, remembered on disk, stopped or found again.

Children outlive a killed worker, so each is recorded in `<state_dir>/processes/` by pid and start time before anyone
relies on it; what an earlier run left behind is ended at the next start (`ProcessRegistry.end_leftovers`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import structlog

log = structlog.get_logger(__name__)

LOG_TAIL_BYTES = 8_192
LOG_AGE_SECONDS = 7 * 86_400
START_TIME_TOLERANCE = 1.0
"""Seconds; a pid whose start time differs by more belongs to somebody else by now."""


class ProcessRegistry:
    """The record of every child that is alive, one small file each."""

    def __init__(self, state_dir: Path) -> None:
        self._records = state_dir / "processes"
        self._logs = state_dir / "logs"
        self._sequence = 0
        for folder in (self._records, self._logs):
            folder.mkdir(parents=True, exist_ok=True)

    def new_log(self, stem: str) -> Path:
        """A fresh path for a child's log."""
        self._sequence += 1
        return self._logs / f"{stem}-{os.getpid()}-{int(time.time())}-{self._sequence}.log"

    def add(self, pid: int, argv: Sequence[str]) -> None:
        record = {"pid": pid, "started": _start_time(pid), "program": Path(argv[0]).name}
        self._path(pid).write_text(json.dumps(record), encoding="utf-8")

    def remove(self, pid: int) -> None:
        self._path(pid).unlink(missing_ok=True)

    def end_leftovers(self) -> list[int]:
        """Kill every recorded process that an earlier run left alive; returns their pids."""
        ended = []
        for path in self._records.glob("*.json"):
            pid = _recorded_and_alive(path)
            if pid is not None:
                _signal_group(pid, signal.SIGKILL)
                ended.append(pid)
            path.unlink(missing_ok=True)
        if ended:
            log.warning("ended processes that an earlier run left behind", pids=ended)
        return ended

    def prune_logs(self) -> None:
        """Delete logs of children that ended more than a week ago."""
        oldest = time.time() - LOG_AGE_SECONDS
        for path in self._logs.glob("*.log"):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _path(self, pid: int) -> Path:
        return self._records / f"{pid}.json"


class ChildProcess:
    """One running program in its own process group.

    stderr goes to `log_path`, so what it says survives both of us. With `talk`, stdin and stdout are text pipes
    (`stdin`, `stdout`); else stdout joins the log. `on_exit(code)` is called from a watcher thread once it is gone.
    """

    def __init__(
        self,
        argv: Sequence[str],
        registry: ProcessRegistry,
        log_path: Path,
        on_exit: Callable[[int], None],
        environment: Mapping[str, str] | None = None,
        talk: bool = False,
    ) -> None:
        self.log_path = log_path
        self._registry = registry
        self._on_exit = on_exit
        self._exited = threading.Event()
        with log_path.open("ab") as log_file:
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else log_file,
                stderr=log_file,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                text=True,
            )
        registry.add(self.pid, argv)
        threading.Thread(target=self._watch, name=f"watch-{self.pid}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def exited(self) -> bool:
        return self._exited.is_set()

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    def wait(self, timeout: float) -> bool:
        """Whether it has ended, after at most `timeout` seconds."""
        return self._exited.wait(timeout)

    def stop(self, grace: float) -> None:
        """SIGTERM to the whole group, SIGKILL after `grace` seconds; returns when the process is gone."""
        if not self.exited:
            _signal_group(self.pid, signal.SIGTERM)
        if not self.wait(grace):
            log.warning("process ignored SIGTERM, killing it", pid=self.pid, grace=grace)
            _signal_group(self.pid, signal.SIGKILL)
            self.wait(grace)

    def log_tail(self) -> str:
        """The end of its log, whole lines."""
        return tail(self.log_path)

    def _watch(self) -> None:
        code = self._process.wait()
        _signal_group(self.pid, signal.SIGKILL)  # whatever it started and left behind
        self._registry.remove(self.pid)
        self._exited.set()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._on_exit(code)


def tail(path: Path, size: int = LOG_TAIL_BYTES) -> str:
    """The last whole lines of a text file, at most `size` bytes; empty when there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            data = file.read()
    except OSError:
        return ""
    if end > size:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace").strip()


def say_exit(code: int) -> str:
    """An exit code in words: `ended with exit code 3`, `was ended by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _start_time(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _recorded_and_alive(path: Path) -> int | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        pid, started = int(record["pid"]), float(record["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    now = _start_time(pid)
    return pid if now is not None and abs(now - started) < START_TIME_TOLERANCE else None
