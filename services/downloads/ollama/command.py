"""Pulls a model by running `ollama pull` and parsing its output."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

from services.cancellation import CancelToken
from services.downloads.fetcher import DownloadError
from services.downloads.ollama.output import FrameParser, PullEvent, PullFailed, PullSucceeded
from services.engines.ollama.names import OllamaName
from services.engines.processes import ProcessRegistry, describe_exit_code, signal_group

TICK_SECONDS = 0.2
"""Interval of checks for a cancellation and the process's end; `ollama pull` draws every 0.1 s."""
GRACE_SECONDS = 0.5
KILL_SECONDS = 5.0
"""Time limits for its end after SIGINT, and after SIGKILL."""
CHUNK_BYTES = 65_536


def pull_by_command(
    binary: str,
    name: OllamaName,
    base_url: str,
    *,
    insecure: bool,
    token: CancelToken,
    registry: ProcessRegistry | None,
) -> Generator[list[PullEvent], None, None]:
    """Run `ollama pull`; yield events as they come, an empty list when there are none for a moment.

    Closing the iterator ends the process; Ollama keeps partial files. Raises Cancelled, DownloadError `interrupted` if
    the command ends with neither success nor an error, and OSError if it can't be started.
    """
    argv = [binary, "pull", *(["--insecure"] if insecure else []), name.full]
    finished = False
    with _running(argv, {"OLLAMA_HOST": base_url, "TERM": "dumb", "NO_COLOR": "1"}, registry) as (process, stderr):
        for events in _drawn(process, stderr, token):
            yield events
            finished = any(isinstance(event, PullFailed | PullSucceeded) for event in events)
            if finished:
                break
        with suppress(subprocess.TimeoutExpired):  # one that hangs after its result is killed on leaving
            process.wait(GRACE_SECONDS)
    if not finished and process.returncode:
        raise DownloadError(
            "interrupted",
            f"The command `ollama pull` {describe_exit_code(process.returncode)} before {name.short} was complete "
            "and didn't say why. Resume the download: what has arrived is kept.",
            may_resume=True,
        )


def _drawn(process: subprocess.Popen[bytes], stderr: io.FileIO, token: CancelToken) -> Iterator[list[PullEvent]]:
    parser = FrameParser()
    poll = select.poll()
    poll.register(stderr, select.POLLIN)
    while True:
        token.check()
        if poll.poll(TICK_SECONDS * 1000):
            data = stderr.read(CHUNK_BYTES)
            if not data:
                break
            yield parser.feed(data)
        elif process.poll() is not None:
            break  # another process still holds the pipe open
        else:
            yield []
    yield parser.close()


@contextmanager
def _running(
    argv: Sequence[str], environment: dict[str, str], registry: ProcessRegistry | None
) -> Iterator[tuple[subprocess.Popen[bytes], io.FileIO]]:
    """Context manager: the process and its stderr; both are closed on leaving."""
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as stderr:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=write_end,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            if registry is not None:
                registry.add_child(process.pid, argv[0])
            yield process, stderr
        finally:
            ended = _end(process)
            if ended and registry is not None:
                registry.remove(process.pid)


def _end(process: subprocess.Popen[bytes]) -> bool:
    """Send SIGINT to the whole group, as Ctrl-C would, then SIGKILL; return whether the process is gone.

    A process hanging in the kernel (a dead network disk) can't be ended; its record stays for the next start.
    """
    if process.poll() is None:
        signal_group(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    signal_group(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
    return process.returncode is not None
