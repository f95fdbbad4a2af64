"""Runs the child process that fetches from Hugging Face, and forwards its progress."""

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

from services.cancellation import CancelToken
from services.downloads.fetcher import DownloadError, FileProgress, Report, TransferUpdate
from services.engines.child_logs import open_log
from services.engines.processes import ProcessRegistry, describe_exit_code, signal_group

ROOT = Path(__file__).parents[3]
TERM_SECONDS = 0.5
KILL_SECONDS = 5.0
"""Time limits for the child's end after SIGTERM, and after SIGKILL."""
NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""Keeps huggingface_hub 2.4 from requesting a list of client programs, and from reporting which one this is."""

Lines = queue.Queue[str | None]
"""Lines of a child's output; None wakes the reader, because the child has ended or the fetch is cancelled."""


class HubProcess:
    """Runs one `child.py` per transfer. It inherits HF_TOKEN through the environment.

    `hosts` are those that Hugging Face may redirect to besides its CDN, `stall_seconds` is the longest silence of a
    child, `retry_pause` its first pause after a connection error.
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
        token: CancelToken,
        *,
        max_list_tries: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Block until every file of `name` is in place in `folder`; see `child.py` for the layouts.

        The repository is listed with at most `max_list_tries` tries (None: as many as for a file); `environment` is
        added to this process's. Raises DownloadError, and Cancelled within a second of the cancellation; codes:
        `unknown_model`, `no_gguf`, `choose_file`, `incomplete_set`, `no_weights`, `unsafe_path`, `access_denied`,
        `hub_unreachable`, `hub_error`, `redirect_refused`, `disk_full`, `disk_error`, `busy`, `digest_mismatch`,
        `stalled`, `interrupted`.
        """
        token.check()
        argv = [sys.executable, "-m", "services.downloads.huggingface.child", f"--pause={self._retry_pause}"]
        argv += [] if max_list_tries is None else [f"--max-list-tries={max_list_tries}"]
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
            token.on_cancel(child.wake)
            self._follow(child, name, report, token)
        finally:
            child.stop()

    def _follow(self, child: _Child, name: str, report: Report, token: CancelToken) -> None:
        """Forward the child's progress until it is done. Raises as `fetch`."""
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
            token.check()
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
            parts = {path: FileProgress(here, total) for path, (here, total) in said["parts"].items()}
            report(TransferUpdate(said["phase"], parts, said["expected_bytes"]))


class _Child:
    """A running `child.py`, in its own process group and recorded, so that it can't get lost."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], registry: ProcessRegistry | None) -> None:
        self.lines: Lines = queue.Queue()
        self._registry = registry
        log = Path(os.devnull) if registry is None else registry.new_log("hugging-face")
        with open_log(log) as log_file:
            self._process = subprocess.Popen(
                list(argv),
                cwd=ROOT,
                stdin=subprocess.PIPE,  # never written; its end tells the child that this process has ended
                stdout=subprocess.PIPE,
                stderr=log_file,
                env={**os.environ, **environment, **NO_TELEMETRY},
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
        """End the child, by SIGTERM, which it doesn't catch, then SIGKILL, and return when it is gone.

        A process hanging in the kernel (a dead network disk) can't be ended; its record stays for the next start.
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
            if line.endswith("\n"):  # a killed child may leave a partial line
                self.lines.put(line)
        self.wake()
