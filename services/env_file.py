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
FOLLOW_SECONDS = 60.0


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

    def raw(self) -> bytes | None:
        """The value as it stands there, quotes included; None when there is no such line."""
        return raw_value(self._content(), self._key)

    def write(self, value: str) -> None:
        self._change(lambda content: with_raw(content, self._key, quoted(value)))

    def restore(self, raw: bytes | None) -> None:
        """Have the line as `raw` told it; None takes it out."""
        self._change(
            lambda content: without_line(content, self._key) if raw is None else with_raw(content, self._key, raw)
        )

    def _change(self, change: Callable[[bytes], bytes]) -> None:
        before = self._content()
        after = change(before)
        if after == before:
            return
        try:
            self._replace(after)
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
        self._settled: bytes | None = None
        """What stood there before the choices that are under way: one that fails must not bring back another."""

    def choose(self, model_id: str, switch: Callable[[], Job]) -> Job:
        """Write the choice down, then begin the switch. If that fails, what stood there before stands there again.

        Raises EnvFileError, before anything is switched.
        """
        file = self._file
        if file is None:
            return switch()
        with self._lock:
            if not self._under_way:
                self._settled = file.raw()
            file.write(model_id)
            self._under_way += 1
        try:
            job = switch()
        except BaseException:
            self._end(file, model_id, succeeded=False)
            raise

        def follow() -> None:
            while not job.wait_done(FOLLOW_SECONDS):
                continue
            self._end(file, model_id, succeeded=job.outcome in ("success", "already_loaded"))

        threading.Thread(target=follow, name="env-file", daemon=True).start()
        return job

    def _end(self, file: EnvFile, model_id: str, *, succeeded: bool) -> None:
        with self._lock:
            self._under_way -= 1
            if succeeded:
                self._settled = quoted(model_id)
                return
            try:
                if file.raw() == quoted(model_id):  # else somebody has chosen something else meanwhile
                    file.restore(self._settled)
            except EnvFileError as error:
                log.warning("the choice of a model that failed is still written down", reason=str(error))


def quoted(value: str) -> bytes:
    """A value as a line holds it. Raises EnvFileError for one that no line can hold."""
    if PLAIN.fullmatch(value):
        return value.encode()
    if re.search(r"['\x00-\x1f\x7f]", value):
        raise EnvFileError(f"{value!r} can't be written into a .env file.")
    return f"'{value}'".encode()


def raw_value(content: bytes, key: str) -> bytes | None:
    """The value of the last line that sets `key`, which is the one that counts, without a comment behind it."""
    found = list(_pattern(key).finditer(content))
    return found[-1]["value"] if found else None


def with_raw(content: bytes, key: str, raw: bytes) -> bytes:
    """The content with the last line that sets `key` changed, or one added at its end."""
    found = list(_pattern(key).finditer(content))
    if found:
        start, end = found[-1].span("value")
        return content[:start] + raw + content[end:]
    newline = b"\r\n" if b"\r\n" in content else b"\n"
    gap = b"" if not content or content.endswith(b"\n") else newline
    return content + gap + key.encode() + b"=" + raw + newline


def without_line(content: bytes, key: str) -> bytes:
    """The content without the last line that sets `key`."""
    found = list(_pattern(key).finditer(content))
    if not found:
        return content
    end = content.find(b"\n", found[-1].end()) + 1 or len(content)
    return content[: found[-1].start()] + content[end:]


def _pattern(key: str) -> re.Pattern[bytes]:
    """A line `KEY=value`, with what may stand before and behind it: a quoted value, or one up to ` #` or the end."""
    before = rb"^[ \t]*(?:export[ \t]+)?" + re.escape(key).encode() + rb"[ \t]*=[ \t]*"
    value = rb"""(?P<value>'[^'\r\n]*'|"[^"\r\n]*"|[^\r\n]*?)"""
    return re.compile(before + value + rb"(?=[ \t]*(?:[ \t]\#[^\r\n]*)?\r?$)", re.MULTILINE)
