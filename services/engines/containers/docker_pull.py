"""Pulls images: adds up the progress of their layers, and can be cancelled at any time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from docker.errors import APIError  # type: ignore[import-untyped]

from services.cancellation import Cancelled, CancelToken
from services.engines.containers.docker_errors import FAILURES, words_of
from services.engines.containers.docker_stream import DockerStream
from services.engines.containers.port import ContainerError, ImageMissing, PullReport

DONE_STATUSES = ("Verifying Checksum", "Download complete", "Extracting", "Pull complete", "Already exists")
UNKNOWN_IMAGE = ("manifest unknown", "not found", "does not exist", "access denied")

Line = dict[str, Any]
"""One line of Docker's response: `{"id": layer, "status": text, "progressDetail": {"current", "total"}}` (API 1.41)."""


@dataclass(slots=True)
class _Layer:
    done: int = 0
    size: int | None = None


class Layers:
    """Bytes of an image that have arrived, from Docker's lines. Never decreases, although Docker retries."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def update(self, line: Mapping[str, Any]) -> None:
        key, status = line.get("id"), line.get("status", "")
        if key is None or (key not in self._layers and status.startswith("Pulling from")):
            return
        layer = self._layers.setdefault(key, _Layer())
        if status in DONE_STATUSES:
            layer.size = layer.done if layer.size is None else layer.size
            layer.done = layer.size
        elif status == "Downloading":
            detail = line.get("progressDetail") or {}
            size = max(int(detail.get("total") or 0), layer.size or 0)
            layer.done = max(layer.done, int(detail.get("current") or 0))
            layer.size = max(size, layer.done) if size > 0 else None

    @property
    def done(self) -> int:
        return sum(layer.done for layer in self._layers.values())

    @property
    def total(self) -> int | None:
        """None until the size of every layer is known; small ones report no size before they are complete."""
        sizes = [layer.size for layer in self._layers.values()]
        known = [size for size in sizes if size is not None]
        return sum(known) if sizes and len(known) == len(sizes) else None


class Pull:
    """One pull. A thread reads Docker's response, which may pause for long, so that `run` can be cancelled at any time.

    `ask` begins the pull; `explain` converts exceptions of `ask` and its stream to the port's errors.
    """

    def __init__(
        self, image: str, ask: Callable[[], DockerStream[Line]], explain: Callable[[Exception], ContainerError]
    ) -> None:
        self._image = image
        self._ask = ask
        self._explain = explain
        self._messages: queue.SimpleQueue[Line | Exception | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._lines: DockerStream[Line] | None = None
        self._over = False

    def run(self, report: PullReport, token: CancelToken) -> None:
        """Block until the image is complete. Raises Cancelled, ImageMissing and other ContainerErrors."""
        token.on_cancel(lambda: self._messages.put(Cancelled()))
        layers = Layers()
        threading.Thread(target=self._read, name=f"pull-{self._image}", daemon=True).start()
        try:
            while (message := self._messages.get()) is not None:
                if isinstance(message, Exception):
                    raise message
                if "error" in message:
                    raise refused(self._image, str(message["error"]))
                layers.update(message)
                report(layers.done, layers.total)
        finally:
            self._stop_reading()

    def _read(self) -> None:
        try:
            lines = self._ask()
            with self._lock:
                self._lines = lines
                over = self._over
            if over:
                lines.close()
            for line in lines:
                self._messages.put(line)
            self._messages.put(None)
        except APIError as error:
            self._messages.put(refused(self._image, words_of(error)))
        except FAILURES as error:
            self._messages.put(self._explain(error))
        except Exception as error:  # `run` waits for a message, and raises it
            self._messages.put(error)

    def _stop_reading(self) -> None:
        """Close the stream; Docker aborts a pull when its client disconnects."""
        with self._lock:
            self._over = True
            lines = self._lines
        if lines is not None:
            lines.close()


def refused(image: str, words: str) -> ContainerError:
    """Convert Docker's message about a failed pull to one of the port's errors."""
    if any(mark in words.lower() for mark in UNKNOWN_IMAGE):
        return ImageMissing(
            f"There is no image {image} to pull, or it needs a login: {words}. Check its name, or run docker login."
        )
    if "no space left" in words.lower():
        return ContainerError(f"Docker's disk is full, so {image} can't be pulled. Make room: docker system prune")
    return ContainerError(f"Docker could not pull {image}: {words}. Check this machine's network, then try again.")
