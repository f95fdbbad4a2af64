"""The fake Hugging Face hub for tests: started, named in the environment, and used through the real fetcher."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.cancellation import CancelToken
from services.downloads.fetcher import DownloadError, TransferUpdate
from services.downloads.huggingface.fetcher import HuggingFaceFetcher
from tests.fakes.hub import COMMIT, FakeHub, Repo, git_id
from tests.support.console import TIMEOUT

RETRY_PAUSE = 0.02
TINY_MODEL = {"config.json": b"{}", "tokenizer.json": b"{} ", "model.safetensors": b"weights" * 100}
"""The files, by name, that make a model loadable by vLLM."""

SHARDED_MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{} ",
    **{f"model-0000{n}-of-00006.safetensors": bytes([n]) * 200_000 for n in range(1, 7)},
}
"""One of as many shards as the recorded starts of vLLM count; 1.2 MB."""


@contextmanager
def hub_running(repos: Mapping[str, Repo], monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub finds through the environment, without this machine's own token and cache."""
    with FakeHub(repos) as hub:
        for name, value in hub_environment(hub, home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def hub_environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """Environment for a console, or for this process. The fake's CDN is on this machine, so it has to be allowed."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "SWITCHYARD_DOWNLOAD_HOSTS": hub.cdn_host,
    }


class Fetch(threading.Thread):
    """One `fetch` in a thread of its own, with everything that it reports."""

    def __init__(self, fetcher: HuggingFaceFetcher, name: str) -> None:
        super().__init__(daemon=True)
        self._fetcher = fetcher
        self._model = name
        self.token = CancelToken()
        self.seen: list[TransferUpdate] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._fetcher.fetch(self._model, self.seen.append, self.token)
        except Exception as error:
            self.error = error

    def result(self) -> Fetch:
        """Wait for its end; raise what it raised."""
        self.join(TIMEOUT)
        assert not self.is_alive(), "the fetch did not end"
        if self.error is not None:
            raise self.error
        return self

    def failure(self) -> DownloadError:
        """Wait for its end; return the DownloadError that it must have raised."""
        with pytest.raises(DownloadError) as caught:
            self.result()
        return caught.value

    def arrived(self, path: str) -> int:
        """The completed bytes of a file, according to the last report about it."""
        return next((seen.parts[path].completed for seen in reversed(self.seen) if path in seen.parts), 0)

    def phases(self) -> list[str]:
        """The phases in order, without repetitions."""
        phases = [seen.phase for seen in self.seen]
        return [phase for before, phase in zip([None, *phases], phases, strict=False) if phase != before]


def fill_cache(hub_cache: Path, repo_id: str, files: Mapping[str, bytes]) -> None:
    """Put a model into a cache below `hub_cache` (which holds the folder `hub`), as huggingface_hub stores it."""
    folder = hub_cache / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for made in (folder / "blobs", folder / "refs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        (folder / "blobs" / git_id(content)).write_bytes(content)
        (snapshot / path).symlink_to(f"../../blobs/{git_id(content)}")
    (folder / "refs" / "main").write_text(COMMIT)
