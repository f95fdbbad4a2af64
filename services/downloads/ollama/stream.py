"""A pull through Ollama's HTTP API: the lines of `POST /api/pull`."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import suppress

from services.abort import Abort
from services.downloads.fetcher import DownloadError
from services.downloads.ollama.output import PullEvent, Succeeded, explain, parse_line
from services.engines.ollama.names import OllamaName
from services.http import FetchError, HttpRequest, HttpStream, TooSlow, Unreachable

CONNECT_SECONDS = 5.0
MAX_LINE = 65_536
MARGIN_SECONDS = 0.1


def pull_by_stream(
    name: OllamaName, base_url: str, *, insecure: bool, abort: Abort, patience: Callable[[], float]
) -> Generator[list[PullEvent], None, None]:
    """Ask Ollama to pull and yield what it says as it comes; ends with the answer, however that ends.

    `patience()` is how many seconds of silence are bearable from now on; after as many it yields an empty list and
    ends. Closing the iterator closes the connection, on which Ollama stops and keeps what has arrived. Raises Aborted,
    and DownloadError when Ollama can't be reached or refuses.
    """
    request = HttpRequest(
        "POST",
        f"{base_url.rstrip('/')}/api/pull",
        timeout=CONNECT_SECONDS,
        body={"model": name.full, "insecure": insecure, "stream": True},
        most_bytes=MAX_LINE,
    )
    with abort.acting(request.cancel):
        try:
            with request.stream(lambda: patience() + MARGIN_SECONDS) as answer:
                if answer.status != 200:
                    raise explain(_refusal(answer), name.short)
                while line := answer.line():
                    event = parse_line(line)
                    yield [] if event is None else [event]
                    if isinstance(event, Succeeded):
                        return
        except TooSlow:
            yield []
        except Unreachable as error:
            abort.check()
            raise DownloadError(
                "ollama_unreachable",
                f"Ollama is not running at {base_url} ({error}), and downloads its models itself. Start it with"
                " `ollama serve`, then resume.",
                may_resume=True,
            ) from None
        except FetchError:
            pass  # broken off; whoever reads knows whether that was before the end
    abort.check()


def _refusal(answer: HttpStream) -> str:
    """Ollama's error text: JSON for what its API refuses, plain text for what isn't its API."""
    body = answer.read().decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"])
    return f"status {answer.status}, {body.strip() or answer.reason}"
