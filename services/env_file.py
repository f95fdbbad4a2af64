"""Writes the chosen model into one line of a compose project's `.env` file."""

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
"""Values that need no quotes, such as every id of a listed model."""
MODE = 0o600
FOLLOW_SECONDS = 60.0


class EnvFileError(Exception):
    """The file can't be read or written. The text is for people."""


class EnvFile:
    """One line `KEY=value` of a file that belongs to somebody else. All other bytes are preserved.

    Writes are atomic: a new file replaces the old one; a symbolic link is followed. Methods raise EnvFileError.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def raw(self) -> bytes | None:
        """Return the value as written, quotes included; None without such a line."""
        return raw_value(self._content(), self._key)

    def write(self, value: str) -> None:
        self._change(lambda content: with_raw(content, self._key, quoted(value)))

    def restore(self, raw: bytes | None) -> None:
        """Set the value to `raw` as returned by `raw()`; None removes the line."""
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
    """Writes the model chosen for the compose project. Without a configured file it only switches."""

    def __init__(self, file: EnvFile | None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._under_way = 0
        self._settled: bytes | None = None
        """The value before all choices under way: a failed one must not restore another that also failed."""

    def choose(self, model_id: str, switch: Callable[[], Job]) -> Job:
        """Write the choice, then begin the switch. If the switch fails, restore the previous value.

        Raises EnvFileError before anything is switched.
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
                if file.raw() == quoted(model_id):  # else it was changed by another choice or program meanwhile
                    file.restore(self._settled)
            except EnvFileError as error:
                log.warning("the .env file still names a model whose switch failed", reason=str(error))


def quoted(value: str) -> bytes:
    """Quote a value for a `.env` line. Raises EnvFileError for a value that can't be quoted."""
    if PLAIN.fullmatch(value):
        return value.encode()
    if re.search(r"['\x00-\x1f\x7f]", value):
        raise EnvFileError(f"{value!r} can't be written into a .env file.")
    return f"'{value}'".encode()


def raw_value(content: bytes, key: str) -> bytes | None:
    """Return the value of the last line that sets `key`, which is the effective one, without a trailing comment."""
    found = list(_pattern(key).finditer(content))
    return found[-1]["value"] if found else None


def with_raw(content: bytes, key: str, raw: bytes) -> bytes:
    """Return the content with the last line that sets `key` changed, or a line appended."""
    found = list(_pattern(key).finditer(content))
    if found:
        start, end = found[-1].span("value")
        return content[:start] + raw + content[end:]
    newline = b"\r\n" if b"\r\n" in content else b"\n"
    gap = b"" if not content or content.endswith(b"\n") else newline
    return content + gap + key.encode() + b"=" + raw + newline


def without_line(content: bytes, key: str) -> bytes:
    """Return the content without the last line that sets `key`."""
    found = list(_pattern(key).finditer(content))
    if not found:
        return content
    end = content.find(b"\n", found[-1].end()) + 1 or len(content)
    return content[: found[-1].start()] + content[end:]


def _pattern(key: str) -> re.Pattern[bytes]:
    """Match a line `KEY=value` with `export` and comment: a quoted value, or one up to ` #` or the end of the line."""
    before = rb"^[ \t]*(?:export[ \t]+)?" + re.escape(key).encode() + rb"[ \t]*=[ \t]*"
    value = rb"""(?P<value>'[^'\r\n]*'|"[^"\r\n]*"|[^\r\n]*?)"""
    return re.compile(before + value + rb"(?=[ \t]*(?:[ \t]\#[^\r\n]*)?\r?$)", re.MULTILINE)
