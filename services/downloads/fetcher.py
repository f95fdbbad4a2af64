"""The port that every source of models implements, and the values that cross it.

A fetcher is blocking code; the queue runs it in a thread and cancels it through a `CancelToken`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from services.cancellation import CancelToken

Source = Literal["ollama", "huggingface"]
Phase = Literal["resolving", "downloading", "verifying", "writing"]
"""Phase of a transfer: listing files, moving bytes, checking them, moving files to their place."""


@dataclass(frozen=True, slots=True)
class FileProgress:
    """Progress of one layer or file of a model: bytes done, bytes in total."""

    completed: int
    total: int


@dataclass(frozen=True, slots=True)
class TransferUpdate:
    """One observation of a transfer.

    `parts` has the progress of the files or layers observed, by digest or name; others are unchanged. `expected_bytes`
    is the size of the whole model if the source told it in advance.
    """

    phase: Phase
    parts: Mapping[str, FileProgress] = field(default_factory=dict)
    expected_bytes: int | None = None


class DownloadError(Exception):
    """A download is refused or failed. `code` is for programs; the text is for people: what, why, what to do.

    `may_resume`: a retry continues from the partial files.
    """

    def __init__(self, code: str, message: str, *, may_resume: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.may_resume = may_resume


Report = Callable[[TransferUpdate], None]


class Fetcher(Protocol):
    """A source of models."""

    @property
    def source(self) -> Source: ...

    def check_name(self, name: str) -> str:
        """Normalise a name. Raises DownloadError `invalid_name`. No I/O."""

    def fetch(self, name: str, report: Report, token: CancelToken) -> None:
        """Block until every file of the model is here, verified and in place.

        Continues from what an earlier try left. Raises DownloadError, and Cancelled within a second of the
        cancellation; partial files stay for the next try.
        """

    def discard(self, name: str) -> None:
        """Delete the partial files of a cancelled download, if the source supports that."""
