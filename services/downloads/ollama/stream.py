"""Pulls a model through Ollama's HTTP API: `POST /api/pull`."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import suppress

from services.cancellation import CancelToken
from services.downloads.fetcher import DownloadError
from services.downloads.ollama.output import PullEvent, PullSucceeded, explain, parse_line
from services.engines.ollama.names import OllamaName
from services.http import FetchError, HttpRequest, HttpStream, TooSlow, Unreachable

CONNECT_SECONDS = 5.0
MAX_LINE = 65_536
MARGIN_SECONDS = 0.1


def pull_by_stream(
    name: OllamaName, base_url: str, *, insecure: bool, token: CancelToken, timeout: Callable[[], float]
) -> Generator[list[PullEvent], None, None]:
    """Request a pull and yield events as they come, until the response ends, however it ends.

    `timeout()` returns the seconds of silence permitted from now on; after these it yields an empty list and ends.
    Closing the iterator closes the connection, on which Ollama stops and keeps partial files. Raises Cancelled, and
    DownloadError if Ollama can't be reached or refuses.
    """
    request = HttpRequest(
        "POST",
        f"{base_url.rstrip('/')}/api/pull",
        timeout=CONNECT_SECONDS,
        body={"model": name.full, "insecure": insecure, "stream": True},
        most_bytes=MAX_LINE,
    )
    with token.cancelling(request.cancel):
        try:
            with request.stream(lambda: timeout() + MARGIN_SECONDS) as answer:
                if answer.status != 200:
                    raise explain(_refusal(answer), name.short)
                while line := answer.line():
                    event = parse_line(line)
                    yield [] if event is None else [event]
                    if isinstance(event, PullSucceeded):
                        return
        except TooSlow:
            yield []
        except Unreachable as error:
            token.check()
            raise DownloadError(
                "ollama_unreachable",
                f"Ollama is not running at {base_url} ({error}), and downloads its models itself. Start it with"
                " `ollama serve`, then resume.",
                may_resume=True,
            ) from None
        except FetchError:
            pass  # the caller knows whether the pull was complete
    token.check()


def _refusal(answer: HttpStream) -> str:
    """Return Ollama's error message: JSON from its API, plain text from anything else."""
    body = answer.read().decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"])
    return f"status {answer.status}, {body.strip() or answer.reason}"
