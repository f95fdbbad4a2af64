"""The port that every source of models implements, and the values that cross it.

A fetcher is straight-line blocking code; the queue runs it in a worker and stops it through an `Abort`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from services.abort import Abort

Source = Literal["ollama", "huggingface"]
Phase = Literal["resolving", "downloading", "verifying", "writing"]
"""What a transfer is doing: asking what there is, moving bytes, checking them, putting them in their place."""


@dataclass(frozen=True, slots=True)
class Part:
    """One layer or file of a model: bytes here, bytes in all."""

    completed: int
    total: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One observation of a transfer.

    `parts` holds what this observation says, by digest or file name; parts it doesn't mention stay as they were.
    `expected_bytes` is the size of the whole model where the source told it ahead, else None.
    """

    phase: Phase
    parts: Mapping[str, Part] = field(default_factory=dict)
    expected_bytes: int | None = None


class DownloadError(Exception):
    """A download can't be done, or broke off. `code` is for programs, the text for people: what, why, what to do.

    `may_resume` tells whether trying again goes on with what is here already.
    """

    def __init__(self, code: str, message: str, *, may_resume: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.may_resume = may_resume


Report = Callable[[Seen], None]


class Fetcher(Protocol):
    """A place that models come from."""

    @property
    def source(self) -> Source: ...

    def check_name(self, name: str) -> str:
        """The name as this source writes it. Raises DownloadError `invalid_name`; asks nobody."""

    def fetch(self, name: str, report: Report, abort: Abort) -> None:
        """Block until every file of the model is here, checked and in its place.

        Goes on with what an earlier try left. Raises DownloadError, and Aborted within a second of `abort`; either
        way what has arrived stays for the next try.
        """

    def discard(self, name: str) -> None:
        """Forget what a download that was cancelled has left, where that can be done."""
