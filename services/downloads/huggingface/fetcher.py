"""Fetches GGUF models from Hugging Face into the models folder, where the embedded engine finds them."""

from __future__ import annotations

from pathlib import Path

from services.cancellation import CancelToken
from services.downloads.fetcher import Report, Source, TransferUpdate
from services.downloads.huggingface import files, names
from services.downloads.huggingface.process import HubProcess
from services.native_threads import NativeThreadPool

DISCARD_SECONDS = 30.0
"""Time limit for deleting partial files, which may be large."""


class HuggingFaceFetcher:
    """Fetches GGUF files in a child process."""

    source: Source = "huggingface"

    def __init__(self, models_dir: Path, process: HubProcess) -> None:
        self._models_dir = models_dir.absolute()
        self._process = process
        self._disk = NativeThreadPool(1, DISCARD_SECONDS)

    def check_name(self, name: str) -> str:
        return str(names.parse(name))

    def fetch(self, name: str, report: Report, token: CancelToken) -> None:
        """Fetch a model; see `Fetcher.fetch`. The error codes are those of `HubProcess.fetch`, and `invalid_name`."""
        checked = self.check_name(name)
        token.check()
        report(TransferUpdate("resolving"))
        self._process.fetch("models", self._models_dir, checked, report, token)

    def discard(self, name: str) -> None:
        """Delete the partial files that `name` covers, except those that another download is fetching."""
        self._disk(files.discard, self._models_dir, names.parse(name))
