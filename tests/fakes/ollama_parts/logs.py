"""The server's outputs: log lines in slog's text format on stderr, one line per request on stdout."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from .wire import slog_time


def log(level: str, source: str, message: str, **attributes: object) -> None:
    text = "".join(f" {key}={_quoted(str(value))}" for key, value in attributes.items())
    _write(sys.stderr, f"time={slog_time()} level={level} source={source} msg={_quoted(message)}{text}\n")


def log_request(status: int, seconds: float, client: str, method: str, path: str) -> None:
    stamp = time.strftime("%Y/%m/%d - %H:%M:%S")
    _write(sys.stdout, f'[GIN] {stamp} | {status} | {seconds:12.6f}s | {client:>15} | {method:<8} "{path}"\n')


def _write(stream: TextIO, line: str) -> None:
    try:
        stream.write(line)
        stream.flush()
    except BrokenPipeError:
        # A Go program is ended by SIGPIPE when its stdout or stderr has no reader any more.
        os._exit(141)


def _quoted(text: str) -> str:
    if text and not any(sign in text for sign in ' "=\n\\'):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
