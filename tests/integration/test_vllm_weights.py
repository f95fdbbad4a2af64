"""Downloading weights for vLLM: the real child process, a fake hub, and the cache read by the real huggingface_hub."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from services.cancellation import Cancelled, CancelToken
from services.downloads.huggingface import vllm_weights
from services.downloads.huggingface.cache import CachedModel
from services.downloads.huggingface.process import HubProcess
from services.downloads.huggingface.vllm_weights import VllmWeights
from services.engines.port import Evidence, LoadFailed, Model
from services.engines.processes import ProcessRegistry
from tests.fakes.hub import COMMIT, FakeHub, Repo, git_id
from tests.support.console import TIMEOUT, free_port, wait_until
from tests.support.hub import RETRY_PAUSE, TINY_MODEL, fill_cache, hub_running
from tests.support.stopwatch import Stopwatch

SHARDS = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 400_000 for n in (1, 2)}
FILES = {
    **SHARDS,
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "added_tokens.json": b"{}",
    "empty.txt": b"",
    "templates/chat.jinja": b"{{ messages }}",
}
UNWANTED = {"pytorch_model.bin": b"the same again", "original/model.safetensors": b"and again", "model.gguf": b"GGUF"}
REPOS = {
    "org/model": Repo({**FILES, **UNWANTED}),
    "org/plain": Repo({**FILES, **UNWANTED}, lfs=False),
    "org/gated": Repo(FILES, gated="hf_secret"),
    "org/gguf": Repo({"model.gguf": b"GGUF"}),
    "org/huge": Repo(TINY_MODEL, sizes={"model.safetensors": 10**18}),
}
TOTAL = sum(map(len, {git_id(content): content for content in FILES.values()}.values()))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with hub_running(REPOS, monkeypatch, tmp_path / "home") as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def weights(hub: FakeHub, cache: Path, tmp_path: Path) -> VllmWeights:
    registry = ProcessRegistry(tmp_path / "state")
    return VllmWeights(cache, HubProcess(registry, hosts=[hub.cdn_host], stall_seconds=20, retry_pause=RETRY_PAUSE))


def listed(source: str = "org/model", **options: object) -> Model:
    return Model("m", "vllm", source, options=options)


class FetchThread(threading.Thread):
    """One `fetch` in a thread of its own, with everything that it reports."""

    def __init__(self, weights: VllmWeights, model: Model | None = None, **environment: str) -> None:
        super().__init__(daemon=True)
        self._act = lambda: weights.fetch(model or listed(), environment, self.seen.append, self.token)
        self.token = CancelToken()
        self.seen: list[Evidence] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.error = error

    def result(self) -> FetchThread:
        """Wait for its end; raise what it raised."""
        self.join(TIMEOUT)
        assert not self.is_alive(), "it did not end"
        if self.error is not None:
            raise self.error
        return self


def repo(cache: Path, name: str = "model") -> Path:
    return cache / "hub" / f"models--org--{name}"


def snapshot(cache: Path, source: str = "org/model") -> dict[str, bytes]:
    """The files that huggingface_hub finds offline."""
    folder = Path(snapshot_download(source, cache_dir=cache / "hub", local_files_only=True))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("source", ["org/model", "org/plain"])
def test_a_downloaded_model_has_huggingface_hubs_layout(weights, cache, source):
    """Blobs named by their etag, relative links, the branch's commit; read by the real library."""
    FetchThread(weights, listed(source)).result()
    assert snapshot(cache, source) == FILES
    folder = repo(cache, source.removeprefix("org/"))
    name = git_id if source == "org/plain" else lambda content: hashlib.sha256(content).hexdigest()
    assert {path.name for path in (folder / "blobs").iterdir()} == {name(content) for content in FILES.values()}
    assert (folder / "refs" / "main").read_text() == COMMIT
    link = os.readlink(folder / "snapshots" / COMMIT / "templates" / "chat.jinja")
    assert link == f"../../../blobs/{name(FILES['templates/chat.jinja'])}"
    assert weights.size_bytes(listed(source)) == 800_000


def test_progress_counts_bytes_up_to_the_end(hub, weights):
    """It never decreases, goes from 0 to 1, and the text has both amounts."""
    hub.faults.bytes_per_second = 800_000
    hub.faults.cut_after, hub.faults.cuts, hub.faults.refuse_ranges = 200_000, 1, True
    seen = FetchThread(weights).result().seen
    assert {evidence.stage for evidence in seen} == {"downloading"}
    fractions = [evidence.fraction for evidence in seen if evidence.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.01
    assert fractions[-1] == 1.0
    assert len(set(fractions)) > 4
    assert any(re.fullmatch(r"0\.[1-7] of 0\.8 MB of the weights", evidence.detail or "") for evidence in seen)


def test_an_interrupted_transfer_continues(hub, weights, cache):
    """With a range request; what has arrived is not sent again."""
    hub.faults.cut_after, hub.faults.cuts = 300_000, 1
    FetchThread(weights).result()
    assert snapshot(cache) == FILES
    assert [request.range for request in hub.requests_to("cdn") if request.range] != []
    assert hub.sent <= TOTAL + 65_536


def test_an_abort_stops_within_a_second_and_the_next_load_continues(hub, weights, cache):
    """An incomplete model doesn't disturb other programs: no revision leads to it."""
    hub.faults.bytes_per_second = 200_000
    fetching = FetchThread(weights)
    wait_until(lambda: any((e.fraction or 0) > 0.1 for e in fetching.seen), "some bytes")
    watch = Stopwatch()
    fetching.token.cancel()
    with pytest.raises(Cancelled):
        fetching.result()
    assert watch.waited < 1.0
    kept = sum(path.stat().st_size for path in (repo(cache) / "blobs").iterdir())
    assert kept > 40_000
    assert not (repo(cache) / "refs").exists()

    hub.faults.bytes_per_second = None
    sent = hub.sent
    again = FetchThread(weights).result()
    assert hub.sent - sent <= TOTAL - kept + 8_192  # the bytes in transit
    assert next(e.fraction for e in again.seen if e.fraction is not None) == pytest.approx(kept / TOTAL)
    assert snapshot(cache) == FILES


def test_complete_files_are_not_downloaded_again(hub, weights):
    """One listing, and no download is reported."""
    FetchThread(weights).result()
    hub.requests.clear()
    again = FetchThread(weights).result()
    assert [request.path for request in hub.requests] == ["/api/models/org/model"]
    assert again.seen == []


def test_offline_only_the_cache_is_used(hub, weights, cache):
    """HF_HUB_OFFLINE in its container's environment; if files are missing, the error names them."""
    with pytest.raises(LoadFailed, match=r"HF_HUB_OFFLINE is set.*lacks of org/model: all of its files"):
        FetchThread(weights, HF_HUB_OFFLINE="1").result()
    fill_cache(cache, "org/model", TINY_MODEL)
    FetchThread(weights, HF_HUB_OFFLINE="1").result()
    next((repo(cache) / "snapshots").rglob("model.safetensors")).resolve().unlink()
    with pytest.raises(LoadFailed, match=r"lacks of org/model: model\.safetensors\. Unset it"):
        FetchThread(weights, HF_HUB_OFFLINE="true").result()
    assert hub.requests == []
    assert weights.size_bytes(listed()) is None


@pytest.mark.usefixtures("hub")
def test_a_complete_model_loads_without_the_hub(weights, cache):
    """A complete model loads, soon; for a missing one the error says what to check."""
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(LoadFailed, match=r"can't be reached.*Check the network"):
        FetchThread(weights, HF_ENDPOINT=gone).result()
    fill_cache(cache, "org/model", TINY_MODEL)
    assert FetchThread(weights, HF_ENDPOINT=gone).result().seen == []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (listed("org/gated"), "org/gated is gated.*set HF_TOKEN"),
        (listed("org/nobody"), "has no model org/nobody.*Check the spelling"),
        (listed("org/gguf"), "no weights that vLLM loads"),
        (listed("org/huge"), "have to be downloaded|Make room"),
        (listed(revision="gone"), "no revision gone"),
        (listed(revision="../x"), "The option revision is wrong"),
    ],
)
def test_a_failed_download_is_explained(hub, weights, model, words):
    """The error says what to do, and nothing is downloaded."""
    with pytest.raises(LoadFailed, match=words):
        FetchThread(weights, model).result()
    assert hub.sent <= sum(map(len, TINY_MODEL.values()))


@pytest.mark.usefixtures("hub")
def test_the_models_token_and_revision_are_used(weights, cache):
    """From its container's environment and its option."""
    FetchThread(weights, listed("org/gated", revision=COMMIT), HF_TOKEN="hf_secret").result()
    assert list((repo(cache, "gated") / "snapshots").iterdir()) == [repo(cache, "gated") / "snapshots" / COMMIT]
    assert weights.size_bytes(listed("org/gated", revision=COMMIT)) == 800_000
    assert weights.size_bytes(listed("org/gated")) is None


@pytest.mark.usefixtures("hub")
def test_file_sizes_are_in_the_order_of_loading(cache):
    """By file name, with numbers in numeric order; unknown until the files are there."""
    weights = VllmWeights(cache, HubProcess())
    files = {f"model-{n}.safetensors": bytes(n * 1000) for n in (1, 2, 10)}
    fill_cache(cache, "org/many", {**TINY_MODEL, "model.safetensors": bytes(500), **files})
    assert weights.shard_bytes(listed("org/many")) == ()
    weights.size_bytes(listed("org/many"))
    assert weights.shard_bytes(listed("org/many")) == (1000, 2000, 10_000, 500)
    weights.size_bytes(listed("org/model"))
    assert weights.shard_bytes(listed("org/model")) == ()


def test_a_hanging_cache_delays_nothing(cache, monkeypatch):
    """The catalogue asks every two seconds: the last result is used until the disk answers."""
    weights, go_on, sizes = VllmWeights(cache, HubProcess()), threading.Event(), CachedModel._sizes
    fill_cache(cache, "org/model", TINY_MODEL)
    assert weights.size_bytes(listed("org/model")) == 700

    def hang(model: CachedModel) -> dict[str, int | None]:
        assert go_on.wait(TIMEOUT)
        return sizes(model)

    monkeypatch.setattr(vllm_weights, "SCAN_SECONDS", 0.05)
    monkeypatch.setattr(CachedModel, "_sizes", hang)
    fill_cache(cache, "org/other", TINY_MODEL)
    for _ in range(3):
        assert weights.size_bytes(listed("org/model")) == 700
        assert weights.size_bytes(listed("org/other")) is None
    go_on.set()
    wait_until(lambda: weights.size_bytes(listed("org/other")) == 700, "the disk to answer")


@pytest.mark.usefixtures("hub")
def test_the_disk_margin_stays_free(cache):
    """disk_margin_gb applies here too."""
    weights = VllmWeights(cache, HubProcess(), margin_bytes=10**18)
    with pytest.raises(LoadFailed, match="stay free"):
        FetchThread(weights).result()


@pytest.mark.parametrize(
    "model",
    [
        listed("/models/mine"),
        listed("gpt2"),
        listed("org/model:Q4_K_M"),
        listed(arguments=["--load-format", "dummy"]),
        listed(arguments=["--download-dir=/elsewhere"]),
    ],
)
def test_models_not_from_the_hub_are_left_to_vllm(hub, weights, model):
    """Paths, and models that load from elsewhere."""
    assert FetchThread(weights, model).result().seen == []
    assert hub.requests == []
    assert weights.size_bytes(model) is None


def test_a_models_own_cache_folder_is_left_to_vllm(hub, weights):
    """A model's own HF_HOME is not the mounted cache."""
    FetchThread(weights, HF_HOME="/data").result()
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_an_unwritable_cache_is_explained_and_a_complete_model_loads(weights, cache):
    """A file is in the way of a folder, because the tests run as root, which may write everywhere else."""
    repo(cache).mkdir(parents=True)
    (repo(cache) / "blobs").write_text("in the way")
    with pytest.raises(LoadFailed, match=r"The Hugging Face cache .* can't be written.*sudo chown -R .*hub_cache_dir"):
        FetchThread(weights).result()
    (repo(cache) / "blobs").unlink()
    fill_cache(cache, "org/model", TINY_MODEL)
    digest = hashlib.sha256(FILES["config.json"]).hexdigest()
    (repo(cache) / "blobs" / f"{digest}.{digest[:16]}.incomplete").mkdir()
    FetchThread(weights).result()
    assert snapshot(cache) == TINY_MODEL


@pytest.mark.usefixtures("hub")
def test_partial_files_of_other_programs_are_left_alone(weights, cache):
    """Our own of an older version are deleted; huggingface_hub's, which may be in use, stay."""
    blobs = repo(cache) / "blobs"
    blobs.mkdir(parents=True)
    digest = "ab" * 32
    theirs = [blobs / f"{digest}.0123abcd.incomplete", blobs / f"{digest}.incomplete"]
    ours = blobs / f"{digest}.{digest[:16]}.incomplete"
    for path in (*theirs, ours):
        path.write_bytes(b"part")
    FetchThread(weights).result()
    assert all(path.exists() for path in theirs)
    assert not ours.exists()
    assert snapshot(cache) == FILES


def test_a_blob_completed_by_another_program_is_used(hub, weights, cache):
    """Each program has its own temporary name, and one rename to the final name: both succeed."""
    hub.faults.bytes_per_second = 400_000
    fetching = FetchThread(weights)
    wait_until(lambda: any((e.fraction or 0) > 0.05 for e in fetching.seen), "some bytes")
    first = SHARDS["model-00001-of-00002.safetensors"]
    whole = repo(cache) / "blobs" / hashlib.sha256(first).hexdigest()
    (whole.parent / "theirs").write_bytes(first)
    (whole.parent / "theirs").rename(whole)
    inode = whole.stat().st_ino
    hub.faults.bytes_per_second = None
    fetching.result()
    assert snapshot(cache) == FILES
    assert whole.stat().st_ino == inode
    assert list((repo(cache) / "blobs").glob("*.incomplete")) == []


def test_corrupt_files_are_not_loaded(hub, weights, cache):
    """Detected by their digest; the next attempt downloads them again."""
    hub.faults.flip = True
    hub.repos["org/one"] = Repo({**TINY_MODEL})
    with pytest.raises(LoadFailed, match="arrived damaged"):
        FetchThread(weights, listed("org/one")).result()
    assert not (repo(cache, "one") / "refs").exists()
    hub.faults.flip = False
    FetchThread(weights, listed("org/one")).result()
    assert snapshot(cache, "org/one") == TINY_MODEL
