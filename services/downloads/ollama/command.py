"""A pull through the command `ollama pull`: what it draws, and its end, whoever ends first."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

from services.abort import Abort
from services.downloads.fetcher import DownloadError
from services.downloads.ollama.output import Failed, FrameParser, PullEvent, Succeeded
from services.engines.ollama.names import OllamaName
from services.engines.processes import ProcessRegistry, describe_exit_code, signal_group

TICK_SECONDS = 0.2
"""How often an abort and the end of the process are looked for while nothing is drawn; it draws every 0.1 s."""
GRACE_SECONDS = 0.5
KILL_SECONDS = 5.0
"""How long it may take to end after SIGINT, and after SIGKILL."""
CHUNK_BYTES = 65_536


def pull_by_command(
    binary: str, name: OllamaName, base_url: str, *, insecure: bool, abort: Abort, registry: ProcessRegistry | None
) -> Generator[list[PullEvent], None, None]:
    """Run `ollama pull` and yield what it says as it comes, an empty list when it says nothing for a moment.

    Closing the iterator ends the process; Ollama keeps what has arrived. Raises Aborted, DownloadError `interrupted`
    when the command ends with neither success nor an error, and OSError when it can't be started.
    """
    argv = [binary, "pull", *(["--insecure"] if insecure else []), name.full]
    told = False
    with _running(argv, {"OLLAMA_HOST": base_url, "TERM": "dumb", "NO_COLOR": "1"}, registry) as (process, stderr):
        for events in _drawn(process, stderr, abort):
            yield events
            told = any(isinstance(event, Failed | Succeeded) for event in events)
            if told:
                break
        with suppress(subprocess.TimeoutExpired):  # one that hangs after its last words is ended on leaving
            process.wait(GRACE_SECONDS)
    if not told and process.returncode:
        raise DownloadError(
            "interrupted",
            f"The command `ollama pull` {describe_exit_code(process.returncode)} before {name.short} was complete "
            "and didn't say why. Resume the download: what has arrived is kept.",
            may_resume=True,
        )


def _drawn(process: subprocess.Popen[bytes], stderr: io.FileIO, abort: Abort) -> Iterator[list[PullEvent]]:
    parser = FrameParser()
    poll = select.poll()
    poll.register(stderr, select.POLLIN)
    while True:
        abort.check()
        if poll.poll(TICK_SECONDS * 1000):
            data = stderr.read(CHUNK_BYTES)
            if not data:
                break
            yield parser.feed(data)
        elif process.poll() is not None:
            break  # somebody else still holds the pipe
        else:
            yield []
    yield parser.close()


@contextmanager
def _running(
    argv: Sequence[str], environment: dict[str, str], registry: ProcessRegistry | None
) -> Iterator[tuple[subprocess.Popen[bytes], io.FileIO]]:
    """The process and its stderr; leaving it ends both."""
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
    """Interrupt the whole group, as Ctrl-C would, then kill what is left of it. Whether it is gone.

    One that hangs in the kernel (a dead network disk) can't be ended; its record stays for the next start.
    """
    if process.poll() is None:
        signal_group(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    signal_group(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
    return process.returncode is not None
