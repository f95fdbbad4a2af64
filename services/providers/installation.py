"""Installs the Python packages of the local servers into a virtual environment of their own.

It is built beside and renamed when it is complete, so that a half-made one is never used. pip takes its sources from
its own environment variables and configuration.
"""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import structlog

from services.cancellation import Cancelled, CancelToken
from services.engines.child_logs import tail
from services.engines.child_runs import STOP_SECONDS, Silent, run_child
from services.engines.processes import ProcessRegistry
from services.engines.python_server.packages import Packages, python_in, read_requirements
from services.engines.supervisor import ServiceError
from services.native_threads import NativeThreadPool
from services.sizes import GB, KB, MB, format_part, format_size

log = structlog.get_logger(__name__)

State = Literal["running", "complete", "failed", "cancelled"]

INSTALLED_BYTES = {"torch": int(7.5 * GB), "transformers": 150 * MB, "open-clip-torch": 60 * MB, "diffusers": 60 * MB}
"""What large packages take on the disk with what they depend on; PyTorch brings CUDA's libraries on Linux."""
OTHER_BYTES = 30 * MB
"""What any other package takes at most."""
DOWNLOADED_SHARE = 0.45
"""A wheel's size as a share of what it takes unpacked, for the forecast of a download."""
WHILE_DOWNLOADING, WHILE_INSTALLING = 90, 95
"""Highest percentages of the two stages."""
SHOW_SECONDS = 1.0
"""Shortest time between two changes of the figures that are announced to pages."""
SILENCE_SECONDS = 1800.0
"""How long pip may say nothing: it unpacks gigabytes without a word."""
DISK_SECONDS = 30.0
LOG_BYTES = 65_536
RAW_PROGRESS_SINCE = (24, 1)
"""pip's first version with `--progress-bar=raw`, which writes lines such as `Progress 1024 of 899800000`."""

INSTALLS_ELSEWHERE_SINCE = (22, 3)
"""pip's first version with `--python`."""

COLLECTING = re.compile(r"^Collecting (\S+)")
FETCHING = re.compile(r"^\s*(Downloading|Using cached|Processing) (\S+?)(?: \(([\d.]+) (bytes|[kMG]B)\))?\s*$")
PROGRESS = re.compile(r"^Progress (\d+) of (\d+)")
INSTALLING = re.compile(r"^Installing collected packages: (.+)")
ERROR = re.compile(r"^ERROR: (.+)", re.MULTILINE)
OFFLINE = re.compile(
    r"Failed to establish a new connection|NameResolutionError|name resolution|Connection refused"
    r"|ConnectTimeout|ReadTimeout|Read timed out|Network is unreachable"
)
UNITS = {"bytes": 1, "kB": KB, "MB": MB, "GB": GB}


@dataclass(frozen=True, slots=True)
class Installation:
    """One installation. Sizes are bytes, times Unix seconds, unknown is None.

    `message` says what it does, or how it ended; `error` is the cause of a failure. `percent` is a forecast.
    """

    state: State
    message: str
    percent: int | None = None
    completed_bytes: int = 0
    error: str | None = None
    log_tail: str = ""
    started_at: float = 0.0
    finished_at: float | None = None


class PipProgress:
    """Reads pip's output line by line: what it does, and the bytes it has fetched of about `expected_bytes`."""

    def __init__(self, expected_bytes: int) -> None:
        self.message = "Starting pip"
        self.percent = 0
        self._expected_bytes = max(1, expected_bytes)
        self._before = 0
        self._current = 0
        self._whole = 0
        self._name = ""

    @property
    def completed_bytes(self) -> int:
        return self._before + self._current

    def feed(self, line: str) -> None:
        if found := COLLECTING.match(line):
            self.message = f"Looking for {found[1]}"
        elif found := FETCHING.match(line):
            self._fetch(found[1], found[2], found[3], found[4])
        elif found := PROGRESS.match(line):
            done, total = int(found[1]), int(found[2])
            self._current = min(done, total)
            if total:
                self.message = f"Downloading {self._name} ({format_part(self._current, total)})"
        elif found := INSTALLING.match(line):
            count = found[1].count(",") + 1
            self.message = f"Installing {count} {'package' if count == 1 else 'packages'}"
            self.percent = WHILE_INSTALLING
            self._before, self._current, self._whole = self._before + max(self._current, self._whole), 0, 0
            return
        if self.percent < WHILE_INSTALLING:
            self.percent = min(WHILE_DOWNLOADING, 100 * self.completed_bytes // self._expected_bytes)

    def _fetch(self, verb: str, name: str, size: str | None, unit: str | None) -> None:
        if name.endswith(".metadata"):
            return
        self._before, self._current = self._before + max(self._current, self._whole), 0
        self._name = name.rpartition("/")[2]
        whole = int(float(size) * UNITS[unit]) if size and unit else 0
        self._whole = whole
        self.message = f"{'Downloading' if verb == 'Downloading' else 'Reading'} {self._name}"
        self.message += f" ({format_size(whole)})" if whole else ""


class Installer:
    """Runs one installation at a time, as a job that goes on when a page closes.

    An environment that lacks a package is replaced as a whole, so no server may run from it meanwhile.

    `margin_bytes` of the disk stay free. `on_change` is called from any thread when the installation has changed.
    """

    def __init__(
        self,
        packages: Packages,
        registry: ProcessRegistry,
        *,
        margin_bytes: int,
        on_change: Callable[[], None] = lambda: None,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._packages = packages
        self._registry = registry
        self._margin_bytes = margin_bytes
        self._on_change = on_change
        self._free_bytes = free_bytes
        self._disk = NativeThreadPool(1, DISK_SECONDS)
        self._lock = threading.Lock()
        self._token = CancelToken()
        self._thread: threading.Thread | None = None
        self._current: Installation | None = None
        self._shown_at = float("-inf")

    @property
    def current(self) -> Installation | None:
        """The installation under way, or else the last one since the start of the app."""
        return self._current

    def start(self) -> Installation:
        """Begin to install what is missing, or join the installation under way; return at once.

        Raises ServiceError `disk_full`, and `packages_missing` if what is to be installed is not written anywhere.
        """
        with self._lock:
            if self._current is not None and self._current.state == "running":
                return self._current
            missing = self._packages.missing()
            if not self._packages.requirements.is_file():
                words = f"The file {self._packages.requirements} is missing. Check the setting local_servers_dir."
                raise ServiceError("packages_missing", words)
            if not missing:
                now = time.time()
                words = "Every package is installed"
                self._current = Installation("complete", words, 100, started_at=now, finished_at=now)
                return self._current
            self._check_disk()
            self._token = CancelToken()
            self._current = Installation("running", "Making the virtual environment", 0, started_at=time.time())
            self._thread = threading.Thread(target=self._run, args=(self._token,), name="install", daemon=True)
            self._thread.start()
        self._on_change()
        return self._current

    def cancel(self) -> Installation | None:
        """Cancel the installation under way, and return once it has ended."""
        thread = self._thread
        self._token.cancel()
        if thread is not None:
            thread.join(4 * STOP_SECONDS)
        return self._current

    def dismiss(self) -> None:
        """Forget an installation that has ended, because somebody has read how."""
        with self._lock:
            if self._current is None or self._current.state == "running":
                return
            self._current = None
        self._on_change()

    def close(self) -> None:
        """End the installation under way: what it has made is removed by the next one."""
        self.cancel()

    def _check_disk(self) -> None:
        needed = sum(_installed_bytes(name) for name in self._names())
        folder = next(place for place in self._packages.env.parents if place.exists())
        try:
            free = self._disk(self._free_bytes, folder)
        except OSError as error:
            log.warning("free disk space can't be determined", folder=str(folder), error=str(error))
            return
        if needed > free - self._margin_bytes:
            need, room, margin = map(format_size, (needed, free, self._margin_bytes))
            raise ServiceError(
                "disk_full",
                f"The packages take about {need}, but only {room} are free in {folder}, and {margin} of that stay free "
                "(setting disk_margin_gb). Delete a model or other files, then try again.",
            )

    def _names(self) -> list[str]:
        with suppress(OSError):
            lines = self._packages.requirements.read_text(encoding="utf-8").splitlines()
            return [wanted.name for wanted in read_requirements(lines)]
        return []

    def _run(self, token: CancelToken) -> None:
        draft = self._packages.env.with_name(f"{self._packages.env.name}.new")
        failed = "The packages could not be installed"
        try:
            try:
                self._install(draft, token)
            finally:
                self._remove(draft)
        except Cancelled:
            self._end("cancelled", "The installation was cancelled")
        except ServiceError as error:
            self._end("failed", failed, error)
        except Exception as error:
            log.exception("an installation failed unexpectedly")
            self._end("failed", failed, ServiceError("internal_error", str(error)))
        else:
            self._end("complete", "The packages are installed", percent=100)

    def _install(self, draft: Path, token: CancelToken) -> None:
        """Build the environment in `draft`, check that it is complete, and rename it.

        Raises ServiceError and Cancelled.
        """
        env = self._packages.env
        self._remove(draft)
        env.parent.mkdir(parents=True, exist_ok=True)
        own_pip = _own_pip()
        make = [sys.executable, "-m", "venv", *(["--without-pip"] if own_pip else []), str(draft)]
        self._call(make, token, "The virtual environment could not be made")
        python = str(python_in(draft))
        pip = [sys.executable, "-m", "pip", "--python", python] if own_pip else [python, "-m", "pip"]
        expected = int(DOWNLOADED_SHARE * sum(_installed_bytes(name) for name in self._names()))
        progress = PipProgress(expected)
        arguments = ["install", "--no-input", "--disable-pip-version-check", "--no-color"]
        arguments += ["--progress-bar", "raw" if own_pip >= RAW_PROGRESS_SINCE else "off"]
        arguments += ["--requirement", str(self._packages.requirements)]
        self._call([*pip, *arguments], token, "pip could not install the packages", progress)
        if missing := Packages(self._packages.servers_dir, draft).missing():
            raise ServiceError(
                "service_failed", f"pip has finished, but these are still missing: {', '.join(missing)}."
            )
        token.check()
        old = env.with_name(f"{env.name}.old")
        self._remove(old)
        if env.exists():
            env.rename(old)
        draft.rename(env)
        self._remove(old)

    def _call(self, argv: Sequence[str], token: CancelToken, trouble: str, progress: PipProgress | None = None) -> None:
        """Run a program to its end. Raises ServiceError with the cause, and Cancelled."""

        def on_line(line: str) -> None:
            if progress is not None:
                progress.feed(line)
                self._show(progress)

        try:
            process = run_child(argv, self._registry, "install", on_line, token, silence_seconds=SILENCE_SECONDS)
        except OSError as error:
            raise ServiceError("service_failed", f"{trouble}: {error.strerror or error}.") from None
        except Silent as silent:
            words = f"{trouble}: it has written nothing for {SILENCE_SECONDS / 60:.0f} minutes."
            raise ServiceError("service_timeout", words, silent.process.log_tail()) from None
        if process.exit_code != 0:
            cause = cause_of_failure(tail(process.log_path, LOG_BYTES), process.describe_end())
            raise ServiceError("service_failed", f"{trouble}: {cause}", process.log_tail())

    def _show(self, progress: PipProgress) -> None:
        assert self._current is not None
        self._current = replace(
            self._current,
            message=progress.message,
            percent=progress.percent,
            completed_bytes=progress.completed_bytes,
        )
        if time.monotonic() > self._shown_at + SHOW_SECONDS:
            self._shown_at = time.monotonic()
            self._on_change()

    def _end(self, state: State, message: str, error: ServiceError | None = None, percent: int | None = None) -> None:
        assert self._current is not None
        self._current = replace(
            self._current,
            state=state,
            message=message,
            percent=percent if percent is not None else self._current.percent,
            error=error.message if error is not None else None,
            log_tail=error.log_tail if error is not None and error.log_tail else self._current.log_tail,
            finished_at=time.time(),
        )
        self._on_change()

    def _remove(self, folder: Path) -> None:
        """Delete a folder with its tens of thousands of files, in a thread."""
        if folder.exists():
            self._disk(shutil.rmtree, folder, True)


def _installed_bytes(name: str) -> int:
    return INSTALLED_BYTES.get(name.lower().replace("_", "-"), OTHER_BYTES)


def _own_pip() -> tuple[int, ...]:
    """Return the version of the pip beside the app if it can install for another interpreter, else an empty tuple.

    It is used because an environment with a pip of its own takes some seconds to make.
    """
    try:
        found = tuple(int(number) for number in re.findall(r"\d+", version("pip"))[:2])
    except PackageNotFoundError:
        return ()
    return found if found >= INSTALLS_ELSEWHERE_SINCE else ()


def cause_of_failure(said: str, ended: str) -> str:
    """Return why a program failed, from its log: pip's first error, or a connection that could not be made.

    `ended` says how its process ended. The text follows a colon and ends the sentence.
    """
    if "No space left on device" in said:
        return "the disk is full. Delete a model or other files, then try again."
    if "ensurepip is not" in said or "No module named venv" in said:
        return "this machine's Python lacks the module venv. Install it (on Debian: python3-venv)."
    if OFFLINE.search(said):
        return "the package index can't be reached. Check the network, or pip's configuration."
    if errors := ERROR.findall(said):
        return f"{errors[0].strip().rstrip('.')}."
    last = said.rpartition("\n")[2].strip()
    return f"it {ended}{f' ({last[:300]})' if last else ''}."
