"""Runs the program that fetches from the Hugging Face hub, and passes on what it says."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from services.abort import Abort
from services.downloads.fetcher import DownloadError, Part, Report, Seen
from services.engines.child_logs import open_log
from services.engines.processes import ProcessRegistry, describe_exit_code, signal_group

ROOT = Path(__file__).parents[3]
TERM_SECONDS = 0.5
KILL_SECONDS = 5.0
"""How long a child may take to end after SIGTERM, and after SIGKILL."""
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""Without it huggingface_hub 2.4 asks the hub for a list of programs that may have called it, and tells which did."""

Lines = queue.Queue[str | None]
"""What a child says, line by line; None wakes the reader: the child is gone, or somebody aborts."""


class HubProcess:
    """Runs one `child.py` per transfer. The token goes to it as it came: HF_TOKEN in the environment.

    `hosts` are those that the hub may send a download on to besides its CDN, `stall_seconds` is how long a child may
    say nothing, `retry_pause` its first pause when a connection fails.
    """

    def __init__(
        self,
        registry: ProcessRegistry | None = None,
        *,
        hosts: Sequence[str] = (),
        stall_seconds: float = 120.0,
        retry_pause: float = 1.0,
    ) -> None:
        self._hosts = tuple(hosts)
        self._registry = registry
        self._stall_seconds = stall_seconds
        self._retry_pause = retry_pause

    def fetch(
        self,
        layout: Literal["models", "cache"],
        folder: Path,
        name: str,
        report: Report,
        abort: Abort,
        *,
        asks: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Block until every file of `name` is in its place in `folder`; see `child.py` for the layouts.

        The hub is asked at most `asks` times what there is (None: as often as for a file); `environment` is added to
        this process's. Raises DownloadError, and Aborted within a second of `abort`; codes: `unknown_model`,
        `no_gguf`, `choose_file`, `incomplete_set`, `no_weights`, `unsafe_path`, `access_denied`, `hub_unreachable`,
        `hub_error`, `redirect_refused`, `disk_full`, `disk_error`, `busy`, `digest_mismatch`, `stalled`, `interrupted`.
        """
        abort.check()
        argv = [sys.executable, "-m", "services.downloads.huggingface.child", f"--pause={self._retry_pause}"]
        argv += [] if asks is None else [f"--asks={asks}"]
        argv += [f"--host={host}" for host in self._hosts]
        try:
            child = _Child([*argv, layout, str(folder), name], environment or {}, self._registry)
        except OSError as error:
            raise DownloadError(
                "interrupted",
                f"The process that fetches {name} can't be started: {error.strerror or error}. Try again.",
                may_resume=True,
            ) from None
        try:
            abort.applies_to(child.wake)
            self._follow(child, name, report, abort)
        finally:
            child.stop()

    def _follow(self, child: _Child, name: str, report: Report, abort: Abort) -> None:
        """Pass on what the child says until it is done. Raises what `fetch` raises."""
        while True:
            try:
                line = child.lines.get(timeout=self._stall_seconds)
            except queue.Empty:
                raise DownloadError(
                    "stalled",
                    f"Nothing came of {name} for {self._stall_seconds:.0f} s. Check the network and try again; what "
                    "has arrived is kept.",
                    may_resume=True,
                ) from None
            abort.check()
            if line is None:
                raise DownloadError(
                    "interrupted",
                    f"The process that fetched {name} {child.describe_end()}. Try again; what has arrived is kept.",
                    may_resume=True,
                )
            said = json.loads(line)
            if "error" in said:
                raise DownloadError(said["error"], said["message"], may_resume=said["may_resume"])
            if "done" in said:
                return
            parts = {path: Part(here, total) for path, (here, total) in said["parts"].items()}
            report(Seen(said["phase"], parts, said["expected_bytes"]))


class _Child:
    """A running `child.py`, in a process group of its own and recorded, so that it can't be lost."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], registry: ProcessRegistry | None) -> None:
        self.lines: Lines = queue.Queue()
        self._registry = registry
        log = Path(os.devnull) if registry is None else registry.new_log("hugging-face")
        with open_log(log) as log_file:
            self._process = subprocess.Popen(
                list(argv),
                cwd=ROOT,
                stdin=subprocess.PIPE,  # never written: its end tells the child that this process is gone
                stdout=subprocess.PIPE,
                stderr=log_file,
                env={**os.environ, **environment, **QUIET},
                start_new_session=True,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, name=f"hub-{self._process.pid}", daemon=True)
        self._reader.start()
        try:
            if registry is not None:
                registry.add_child(self._process.pid, argv[0], log)
        except OSError:
            self.stop()
            raise

    def wake(self) -> None:
        self.lines.put(None)

    def describe_end(self) -> str:
        try:
            return describe_exit_code(self._process.wait(KILL_SECONDS))
        except subprocess.TimeoutExpired:
            return "says nothing more"

    def stop(self) -> None:
        """Returns when it is gone: SIGTERM, which it doesn't catch, then SIGKILL.

        One that hangs in the kernel (a dead network disk) can't be ended; its record stays for the next start.
        """
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            if self._process.poll() is None:
                signal_group(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        if self._process.poll() is None:
            return
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._registry is not None:
            self._registry.remove(self._process.pid)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # a child that is killed may leave half a line
                self.lines.put(line)
        self.wake()
