"""Weights for vLLM: the real child process, a fake hub, and the cache read back by the real huggingface_hub."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from services.abort import Abort, Aborted
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


class Fetching(threading.Thread):
    """One `fetch` in a thread of its own, and all that it reports."""

    def __init__(self, weights: VllmWeights, model: Model | None = None, **environment: str) -> None:
        super().__init__(daemon=True)
        self._act = lambda: weights.fetch(model or listed(), environment, self.seen.append, self.abort)
        self.abort = Abort()
        self.seen: list[Evidence] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.error = error

    def result(self) -> Fetching:
        """Wait for its end; raises what it raised."""
        self.join(TIMEOUT)
        assert not self.is_alive(), "it did not end"
        if self.error is not None:
            raise self.error
        return self


def repo(cache: Path, name: str = "model") -> Path:
    return cache / "hub" / f"models--org--{name}"


def snapshot(cache: Path, source: str = "org/model") -> dict[str, bytes]:
    """What huggingface_hub finds without asking anybody."""
    folder = Path(snapshot_download(source, cache_dir=cache / "hub", local_files_only=True))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("source", ["org/model", "org/plain"])
def test_a_model_lies_in_the_cache_as_huggingface_hub_has_it(weights, cache, source):
    """Blobs by their etag, relative links, the commit of the branch; read back by the real library."""
    Fetching(weights, listed(source)).result()
    assert snapshot(cache, source) == FILES
    folder = repo(cache, source.removeprefix("org/"))
    name = git_id if source == "org/plain" else lambda content: hashlib.sha256(content).hexdigest()
    assert {path.name for path in (folder / "blobs").iterdir()} == {name(content) for content in FILES.values()}
    assert (folder / "refs" / "main").read_text() == COMMIT
    link = os.readlink(folder / "snapshots" / COMMIT / "templates" / "chat.jinja")
    assert link == f"../../../blobs/{name(FILES['templates/chat.jinja'])}"
    assert weights.size_bytes(listed(source)) == 800_000


def test_progress_goes_by_bytes_and_reaches_the_end(hub, weights):
    """Never back, from nothing to all, in words with both amounts."""
    hub.faults.bytes_per_second = 800_000
    hub.faults.cut_after, hub.faults.cuts, hub.faults.refuse_ranges = 200_000, 1, True
    seen = Fetching(weights).result().seen
    assert {evidence.stage for evidence in seen} == {"downloading"}
    fractions = [evidence.fraction for evidence in seen if evidence.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.01
    assert fractions[-1] == 1.0
    assert len(set(fractions)) > 4
    assert any(re.fullmatch(r"0\.[1-7] of 0\.8 MB of the weights", evidence.detail or "") for evidence in seen)


def test_a_cut_connection_goes_on_where_it_was(hub, weights, cache):
    """By a range; what has arrived does not come again."""
    hub.faults.cut_after, hub.faults.cuts = 300_000, 1
    Fetching(weights).result()
    assert snapshot(cache) == FILES
    assert [request.range for request in hub.requests_to("cdn") if request.range] != []
    assert hub.sent <= TOTAL + 65_536


def test_stopping_ends_the_bytes_within_a_second_and_the_next_load_goes_on(hub, weights, cache):
    """Half a model is in nobody's way: no revision leads to it."""
    hub.faults.bytes_per_second = 200_000
    fetching = Fetching(weights)
    wait_until(lambda: any((e.fraction or 0) > 0.1 for e in fetching.seen), "some bytes")
    watch = Stopwatch()
    fetching.abort()
    with pytest.raises(Aborted):
        fetching.result()
    assert watch.waited < 1.0
    kept = sum(path.stat().st_size for path in (repo(cache) / "blobs").iterdir())
    assert kept > 40_000
    assert not (repo(cache) / "refs").exists()

    hub.faults.bytes_per_second = None
    sent = hub.sent
    again = Fetching(weights).result()
    assert hub.sent - sent <= TOTAL - kept + 8_192  # what was under way
    assert next(e.fraction for e in again.seen if e.fraction is not None) == pytest.approx(kept / TOTAL)
    assert snapshot(cache) == FILES


def test_what_is_there_is_not_asked_for_again(hub, weights):
    """One listing, no evidence of a download."""
    Fetching(weights).result()
    hub.requests.clear()
    again = Fetching(weights).result()
    assert [request.path for request in hub.requests] == ["/api/models/org/model"]
    assert again.seen == []


def test_offline_takes_what_is_there_and_asks_nobody(hub, weights, cache):
    """HF_HUB_OFFLINE of its container; without the files it says which are missing."""
    with pytest.raises(LoadFailed, match=r"HF_HUB_OFFLINE is set.*lacks of org/model: all of its files"):
        Fetching(weights, HF_HUB_OFFLINE="1").result()
    fill_cache(cache, "org/model", TINY_MODEL)
    Fetching(weights, HF_HUB_OFFLINE="1").result()
    next((repo(cache) / "snapshots").rglob("model.safetensors")).resolve().unlink()
    with pytest.raises(LoadFailed, match=r"lacks of org/model: model\.safetensors\. Unset it"):
        Fetching(weights, HF_HUB_OFFLINE="true").result()
    assert hub.requests == []
    assert weights.size_bytes(listed()) is None


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_down_stops_no_model_that_is_there(weights, cache):
    """Whole in the cache: it loads, soon. Not there: it says what to check."""
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(LoadFailed, match=r"can't be reached.*Check the network"):
        Fetching(weights, HF_ENDPOINT=gone).result()
    fill_cache(cache, "org/model", TINY_MODEL)
    assert Fetching(weights, HF_ENDPOINT=gone).result().seen == []


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
def test_what_cant_be_brought_is_said(hub, weights, model, words):
    """In words, with what to do, before a byte of it has come."""
    with pytest.raises(LoadFailed, match=words):
        Fetching(weights, model).result()
    assert hub.sent <= sum(map(len, TINY_MODEL.values()))


@pytest.mark.usefixtures("hub")
def test_the_token_and_the_revision_are_those_of_the_model(weights, cache):
    """From its container's environment and its option."""
    Fetching(weights, listed("org/gated", revision=COMMIT), HF_TOKEN="hf_secret").result()
    assert list((repo(cache, "gated") / "snapshots").iterdir()) == [repo(cache, "gated") / "snapshots" / COMMIT]
    assert weights.size_bytes(listed("org/gated", revision=COMMIT)) == 800_000
    assert weights.size_bytes(listed("org/gated")) is None


@pytest.mark.usefixtures("hub")
def test_the_sizes_of_its_files_are_told_in_the_order_in_which_they_are_loaded(cache):
    """By their names, with numbers counted as such; none as long as they are not here."""
    weights = VllmWeights(cache, HubProcess())
    files = {f"model-{n}.safetensors": bytes(n * 1000) for n in (1, 2, 10)}
    fill_cache(cache, "org/many", {**TINY_MODEL, "model.safetensors": bytes(500), **files})
    assert weights.shard_bytes(listed("org/many")) == ()
    weights.size_bytes(listed("org/many"))
    assert weights.shard_bytes(listed("org/many")) == (1000, 2000, 10_000, 500)
    weights.size_bytes(listed("org/model"))
    assert weights.shard_bytes(listed("org/model")) == ()


def test_a_cache_that_hangs_holds_up_nobody(cache, monkeypatch):
    """The catalogue asks every two seconds: what was last seen stands until its disk answers."""
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
def test_room_that_has_to_stay_free_is_respected(cache):
    """disk_margin_gb counts here too."""
    weights = VllmWeights(cache, HubProcess(), margin_bytes=10**18)
    with pytest.raises(LoadFailed, match="stay free"):
        Fetching(weights).result()


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
def test_what_is_no_matter_of_the_hub_is_left_to_vllm(hub, weights, model):
    """Paths, and what is to be loaded from elsewhere."""
    assert Fetching(weights, model).result().seen == []
    assert hub.requests == []
    assert weights.size_bytes(model) is None


def test_another_place_in_the_container_is_left_to_vllm(hub, weights):
    """A model's own HF_HOME is not the cache that is mounted."""
    Fetching(weights, HF_HOME="/data").result()
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cant_be_written_says_what_to_do_and_a_whole_model_loads(weights, cache):
    """Other things stand where its files should be: root, who runs the tests, may write everywhere else."""
    repo(cache).mkdir(parents=True)
    (repo(cache) / "blobs").write_text("in the way")
    with pytest.raises(LoadFailed, match=r"The Hugging Face cache .* can't be written.*sudo chown -R .*hub_cache_dir"):
        Fetching(weights).result()
    (repo(cache) / "blobs").unlink()
    fill_cache(cache, "org/model", TINY_MODEL)
    digest = hashlib.sha256(FILES["config.json"]).hexdigest()
    (repo(cache) / "blobs" / f"{digest}.{digest[:16]}.incomplete").mkdir()
    Fetching(weights).result()
    assert snapshot(cache) == TINY_MODEL


@pytest.mark.usefixtures("hub")
def test_unfinished_files_of_others_are_left_alone(weights, cache):
    """Of an older version ours goes; huggingface_hub's, which may be in use, stays."""
    blobs = repo(cache) / "blobs"
    blobs.mkdir(parents=True)
    digest = "ab" * 32
    theirs = [blobs / f"{digest}.0123abcd.incomplete", blobs / f"{digest}.incomplete"]
    ours = blobs / f"{digest}.{digest[:16]}.incomplete"
    for path in (*theirs, ours):
        path.write_bytes(b"part")
    Fetching(weights).result()
    assert all(path.exists() for path in theirs)
    assert not ours.exists()
    assert snapshot(cache) == FILES


def test_a_blob_that_another_program_finishes_meanwhile_is_taken(hub, weights, cache):
    """Its own name for what is under way, one step to the last name: both end well."""
    hub.faults.bytes_per_second = 400_000
    fetching = Fetching(weights)
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


def test_damaged_bytes_are_not_loaded(hub, weights, cache):
    """By their digest; the next try brings them whole."""
    hub.faults.flip = True
    hub.repos["org/one"] = Repo({**TINY_MODEL})
    with pytest.raises(LoadFailed, match="arrived damaged"):
        Fetching(weights, listed("org/one")).result()
    assert not (repo(cache, "one") / "refs").exists()
    hub.faults.flip = False
    Fetching(weights, listed("org/one")).result()
    assert snapshot(cache, "org/one") == TINY_MODEL
