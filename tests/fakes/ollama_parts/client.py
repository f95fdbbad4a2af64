"""The command's client side: `pull`, `list` and `ps` send requests to the server at OLLAMA_HOST."""

from __future__ import annotations

import calendar
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from typing import Any

from .progress import Bar, Display, Spinner
from .settings import listen_address
from .wire import human_bytes

NO_SERVER = "could not connect to ollama server, run 'ollama serve' to start it"


class CommandFailed(Exception):
    """The text is printed after `Error: `."""


def pull(name: str, insecure: bool) -> None:
    """Pull a model. Raises CommandFailed. Returns normally if the server dies: only `success` is success."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _ask("HEAD", "/")
    display = Display()
    try:
        _show(_events(name, insecure), display)
    finally:
        display.stop()


def _show(events: Iterator[dict[str, Any]], display: Display) -> None:
    bars: dict[str, Bar] = {}
    spinner: Spinner | None = None
    status = ""
    for event in events:
        if "error" in event:
            raise CommandFailed(event["error"])
        digest = event.get("digest")
        if digest and not event.get("completed"):
            continue
        if spinner is not None and (digest or event["status"] != status):
            spinner.stop()
        if digest:
            if digest not in bars:
                bars[digest] = Bar(f"pulling {digest[7:19]}:", event["total"], event["completed"])
                display.add(bars[digest])
            bars[digest].set(event["completed"])
        elif event["status"] != status:
            status = event["status"]
            spinner = Spinner(status)
            display.add(spinner)


def _events(name: str, insecure: bool) -> Iterator[dict[str, Any]]:
    body = json.dumps({"model": name} | ({"insecure": True} if insecure else {}))
    connection = HTTPConnection(*listen_address())
    try:
        connection.request("POST", "/api/pull", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status >= 400:
            raise CommandFailed(f"{response.status} {response.reason}: {json.loads(response.read())['error']}")
        while line := response.readline():
            yield json.loads(line)
    except (OSError, HTTPException, json.JSONDecodeError):
        return
    finally:
        connection.close()


def table_of_models() -> None:
    rows = [
        [model["name"], model["digest"][:12], human_bytes(model["size"]), "About a minute ago"]
        for model in json.loads(_ask("GET", "/api/tags"))["models"]
    ]
    _table(["NAME", "ID", "SIZE", "MODIFIED"], rows)


def table_of_loaded() -> None:
    rows = [
        [
            model["name"],
            model["digest"][:12],
            human_bytes(model["size"]),
            _processor(model["size"], model["size_vram"]),
            str(model["context_length"]),
            _until(model["expires_at"]),
        ]
        for model in json.loads(_ask("GET", "/api/ps"))["models"]
    ]
    _table(["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"], rows)


def _processor(size: int, vram: int) -> str:
    if vram == 0:
        return "100% CPU"
    if vram == size:
        return "100% GPU"
    on_cpu = round((size - vram) / size * 100)
    return f"{on_cpu}%/{100 - on_cpu}% CPU/GPU"


def _until(expires_at: str) -> str:
    if int(expires_at[:4]) > 2200:
        return "Forever"
    moment = calendar.timegm(time.strptime(expires_at[:19], "%Y-%m-%dT%H:%M:%S"))
    minutes = math.floor((moment - time.time()) / 60)
    return f"{minutes} minutes from now" if minutes >= 0 else "Stopping..."


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    print("    ".join(padded[0]) + " ")
    for row in padded[1:]:
        print("    ".join(row) + "    ")


def _ask(method: str, path: str) -> bytes:
    connection = HTTPConnection(*listen_address(), timeout=30)
    try:
        connection.request(method, path)
        return connection.getresponse().read()
    except (OSError, HTTPException):
        raise CommandFailed(NO_SERVER) from None
    finally:
        connection.close()


def run(arguments: list[str]) -> int:
    """The exit code of `ollama pull|list|ps …`."""
    command, *rest = arguments
    names = [word for word in rest if not word.startswith("-")]
    try:
        if command == "pull":
            pull(names[0], "--insecure" in rest)
        elif command == "ps":
            table_of_loaded()
        else:
            table_of_models()
    except CommandFailed as failure:
        print(f"Error: {failure}", file=sys.stderr)
        return 1
    return 0
