"""A pull through Ollama's HTTP API: the lines of `POST /api/pull`.

Uses http.client, whose socket is at hand before the first byte is sent: shutting that down is what stops a transfer at
once, whatever it is waiting for. Proxies are not asked.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit

from services.abort import Abort
from services.downloads.fetcher import DownloadError
from services.downloads.ollama.output import PullEvent, Succeeded, explain, parse_line
from services.engines.ollama.names import OllamaName
from services.http import tls_context

CONNECT_SECONDS = 0.8
"""One try to connect; short, so that an abort is noticed within a second."""
CONNECT_TRIES = 6
MAX_LINE = 65_536
MARGIN_SECONDS = 0.1


def pull_by_stream(
    name: OllamaName, base_url: str, *, insecure: bool, abort: Abort, patience: Callable[[], float]
) -> Generator[list[PullEvent], None, None]:
    """Order the pull and yield what Ollama says as it comes; ends with the answer, however that ends.

    `patience()` is how many seconds of silence are bearable from now on; after as many it yields an empty list and
    ends. Closing the iterator closes the connection, on which Ollama stops and keeps what has arrived. Raises Aborted,
    and DownloadError when Ollama can't be reached or refuses.
    """
    order = json.dumps({"model": name.full, "insecure": insecure, "stream": True})
    with closing(_connect(base_url, abort)) as connection:
        link: socket.socket = connection.sock
        abort.applies_to(partial(_shut, link))
        try:
            link.settimeout(patience() + MARGIN_SECONDS)
            connection.request("POST", "/api/pull", order, {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                if answer.status != 200:
                    raise explain(_refusal(answer), name.short)
                while line := answer.readline(MAX_LINE):
                    event = parse_line(line)
                    yield [] if event is None else [event]
                    if isinstance(event, Succeeded):
                        return
                    link.settimeout(patience() + MARGIN_SECONDS)
        except TimeoutError:
            yield []
        except (OSError, HTTPException):
            pass  # broken off; whoever reads knows whether that was before the end
    abort.check()


def _connect(base_url: str, abort: Abort) -> HTTPConnection:
    parts = urlsplit(base_url)
    reason: OSError | None = None
    for _ in range(CONNECT_TRIES):
        abort.check()
        connection = (
            HTTPSConnection(parts.netloc, timeout=CONNECT_SECONDS, context=tls_context())
            if parts.scheme == "https"
            else HTTPConnection(parts.netloc, timeout=CONNECT_SECONDS)
        )
        try:
            connection.connect()
            return connection
        except TimeoutError as error:
            connection.close()
            reason = error
        except OSError as error:
            connection.close()
            reason = error
            break
    raise DownloadError(
        "ollama_unreachable",
        f"Ollama is not running at {base_url} ({_say(reason)}), and downloads its models itself. Start it with"
        " `ollama serve`, then resume.",
        may_resume=True,
    )


def _refusal(answer: HTTPResponse) -> str:
    """Ollama's error text: JSON for what its API refuses, plain text for what isn't its API."""
    body = answer.read(MAX_LINE).decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"])
    return f"status {answer.status}, {body.strip() or answer.reason}"


def _say(error: OSError | None) -> str:
    return "no answer" if error is None or isinstance(error, TimeoutError) else error.strerror or str(error)


def _shut(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
