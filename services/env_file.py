"""One line of a `.env` file: which model a compose project is to run (seed 000)."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from services.switching.jobs import Job

log = structlog.get_logger(__name__)

PLAIN = re.compile(r"[A-Za-z0-9._:/@+-]*")
"""What stands without quotes, as every id of a listed model."""
MODE = 0o600


class EnvFileError(Exception):
    """The file can't be read or written. The text is for people."""


class EnvFile:
    """The line `KEY=value` of a file that others own; all else in it stays as it is, to the byte.

    A write is whole or not at all: a new file takes the old one's place. A file that is a link is written where it
    leads. Raises EnvFileError.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def read(self) -> str | None:
        """The value, without quotes; None when there is no such line."""
        return value_of(self._content(), self._key)

    def write(self, value: str | None) -> None:
        """Set the value; None takes the line out."""
        before = self._content()
        content = without_line(before, self._key) if value is None else with_value(before, self._key, value)
        if content == before:
            return
        try:
            self._replace(content)
        except OSError as error:
            raise EnvFileError(f"{self._path} can't be written: {error.strerror or error}.") from None

    def _content(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise EnvFileError(f"{self._path} can't be read: {error.strerror or error}.") from None

    def _replace(self, content: bytes) -> None:
        target = self._path.resolve()
        number, draft = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(draft, target.stat().st_mode & 0o777 if target.exists() else MODE)
            os.replace(draft, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft)
            raise


class ComposeChoice:
    """Writes down which model is chosen here. Does nothing but switch when no file is configured."""

    def __init__(self, file: EnvFile | None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._under_way = 0
        self._settled: str | None = None
        """What stood there before the choices that are under way: one that fails must not bring back another."""

    def choose(self, model_id: str, switch: Callable[[], Job], timeout: float) -> Job:
        """Write the choice down, then begin the switch. If that fails, what stood there before stands there again.

        Raises EnvFileError, before anything is switched.
        """
        file = self._file
        if file is None:
            return switch()
        with self._lock:
            if not self._under_way:
                self._settled = file.read()
            file.write(model_id)
            self._under_way += 1
        try:
            job = switch()
        except BaseException:
            self._end(file, model_id, succeeded=False)
            raise

        def follow() -> None:
            job.wait_done(timeout)
            self._end(file, model_id, succeeded=job.outcome in ("success", "already_loaded"))

        threading.Thread(target=follow, name="env-file", daemon=True).start()
        return job

    def _end(self, file: EnvFile, model_id: str, *, succeeded: bool) -> None:
        with self._lock:
            self._under_way -= 1
            if succeeded:
                self._settled = model_id
                return
            try:
                if file.read() == model_id:  # else somebody has chosen something else meanwhile
                    file.write(self._settled)
            except EnvFileError as error:
                log.warning("the choice of a model that failed is still written down", reason=str(error))


def value_of(content: bytes, key: str) -> str | None:
    """The value of the last line that sets `key`, as compose reads it: the last one counts."""
    found = list(_pattern(key).finditer(content))
    if not found:
        return None
    value = found[-1]["value"].decode("utf-8", "replace").strip()
    quoted = re.fullmatch(r"(['\"])(.*)\1", value)
    return quoted[2] if quoted else value


def with_value(content: bytes, key: str, value: str) -> bytes:
    """The content with the last line that sets `key` changed, or one added at its end.

    Raises EnvFileError for a value that no line can hold.
    """
    if not PLAIN.fullmatch(value) and re.search(r"['\x00-\x1f\x7f]", value):
        raise EnvFileError(f"{value!r} can't be written into a .env file.")
    text = (value if PLAIN.fullmatch(value) else f"'{value}'").encode()
    found = list(_pattern(key).finditer(content))
    if found:
        start, end = found[-1].span("value")
        return content[:start] + text + content[end:]
    newline = b"\r\n" if b"\r\n" in content else b"\n"
    gap = b"" if not content or content.endswith(b"\n") else newline
    return content + gap + key.encode() + b"=" + text + newline


def without_line(content: bytes, key: str) -> bytes:
    """The content without the last line that sets `key`."""
    found = list(_pattern(key).finditer(content))
    if not found:
        return content
    end = content.find(b"\n", found[-1].end()) + 1 or len(content)
    return content[: found[-1].start()] + content[end:]


def _pattern(key: str) -> re.Pattern[bytes]:
    """A line `KEY=value`, with what may stand before it; the value up to the end of the line."""
    return re.compile(
        rb"^[ \t]*(?:export[ \t]+)?" + re.escape(key).encode() + rb"[ \t]*=[ \t]*(?P<value>[^\r\n]*)", re.MULTILINE
    )
