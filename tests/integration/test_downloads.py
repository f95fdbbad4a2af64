"""Downloads over HTTP: seed 004's stream, the queue, and actions on installed models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import requests

from tests.fakes.hub import FakeHub, Repo
from tests.support.console import DEMO_MODELS, Console, wait_until
from tests.support.hub import hub_environment
from tests.support.ollama import FakeOllama, FakeRegistry
from tests.support.stopwatch import Stopwatch

SIZE = 40_000_000
CAPYBARA = "hf.co/TheBloke/CapybaraHermes-2.5-Mistral-7B-GGUF:Q4_0"
REGISTRY = {"llama3.2:latest": {"size": SIZE}, "mistral:latest": {"size": SIZE}, "phi:latest": {"size": SIZE}}
BASE = "/api/providers/models"

StartConsole = Callable[..., Console]


@pytest.fixture(scope="module")
def shared_ollama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeOllama]:
    models = {"tiny-a:latest": {"size": 7_411_936}}
    with FakeOllama(tmp_path_factory.mktemp("ollama"), models=models, registry=REGISTRY) as fake:
        yield fake


@pytest.fixture
def ollama(shared_ollama: FakeOllama) -> FakeOllama:
    """A server that was started elsewhere, with a registry."""
    return shared_ollama.reset()


@pytest.fixture(scope="module", params=["command", "api"])
def shared(request: pytest.FixtureRequest, start_shared: StartConsole, shared_ollama: FakeOllama) -> Console:
    return start_shared(
        ollama_base_url=shared_ollama.url,
        ollama_binary=shared_ollama.binary if request.param == "command" else "/nowhere/ollama",
        ollama_registry_url="http://127.0.0.1:9",
        disk_margin_gb=0,
        standby="false",
    )


@pytest.fixture
def console(shared: Console, ollama: FakeOllama) -> Iterator[Console]:
    """A console that downloads with Ollama's command, and one without the command that uses the API."""
    yield shared.reset()
    ollama.clear_faults()
    shared.cancel_downloads()
    for name in set(REGISTRY) & set(shared.states()):
        shared.delete(f"{BASE}/{name}")


def test_a_download_streams_its_progress_to_the_end(console, ollama):
    """Seed 004's events: never falling, with bytes, until complete; then the model can be switched to."""
    ollama.set_fault("pull_slow", 20_000_000)
    with closing(download(console, "llama3.2")) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        heard = list(unnamed(answer))
    assert [h["progress"] for h in heard] == sorted(h["progress"] for h in heard)
    moving = [h for h in heard if h["status"] == "downloading" and h["bytes_per_second"]]
    assert moving
    assert all(0 < h["completed_bytes"] <= h["total_bytes"] for h in moving)
    assert (heard[-1]["status"], heard[-1]["progress"]) == ("complete", 100)
    assert "llama3.2:latest" in ollama.tags()
    console.wait_for(lambda s: "llama3.2:latest" in s["models"], "the model to be listed")
    console.switch("llama3.2")


def test_closing_the_stream_stops_nothing_and_all_clients_see_the_same(console, ollama):
    """The job runs on the server: a client that reconnects finds it further on."""
    ollama.set_fault("pull_slow", 10_000_000)
    with closing(download(console, "llama3.2")) as answer:
        first = next(h for h in unnamed(answer) if h["completed_bytes"])
    two = [one(console, first["id"]) for _ in range(2)]
    assert two[0]["id"] == two[1]["id"]
    wait_until(lambda: one(console, first["id"])["completed_bytes"] > first["completed_bytes"], "more bytes")
    ollama.clear_faults()
    wait_until(lambda: one(console, first["id"])["state"] == "complete", "the end")


def test_cancelling_stops_the_transfer_within_a_second(console, ollama):
    """No more bytes arrive, and nothing is installed."""
    job = start(console, ollama, "llama3.2")
    watch = Stopwatch()
    assert console.delete(f"{BASE}/downloads/{job['id']}").json()["status"] == "cancelled"
    wait_until(
        lambda: not ollama.pulls() and bytes_on_disk(ollama) > 1_000_000, "the transfer to stop and write its state"
    )
    assert watch.waited < 1
    arrived = ollama.pulled_bytes("llama3.2")
    assert arrived < SIZE
    time.sleep(0.5)  # ten times the interval between two steps of a transfer
    assert ollama.pulled_bytes("llama3.2") == arrived
    assert "llama3.2:latest" not in ollama.tags()


def test_a_resumed_download_continues_where_it_was(console, ollama):
    """From Ollama's own partial files."""
    job = start(console, ollama, "llama3.2")
    paused = console.post(f"{BASE}/downloads/{job['id']}/pause").json()
    assert paused["state"] == "paused"
    wait_until(lambda: not ollama.pulls(), "the pull to end")
    arrived = ollama.pulled_bytes("llama3.2")
    assert arrived > 0
    resumed = console.post(f"{BASE}/downloads/{job['id']}/resume").json()
    assert resumed["state"] in ("queued", "downloading")
    assert ollama.pulled_bytes("llama3.2") >= arrived
    ollama.clear_faults()
    wait_until(lambda: one(console, job["id"])["state"] == "complete", "the end")


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_of_the_app_continues_the_download(console, ollama, end):
    """Without a new request; what has arrived is used."""
    job = start(console, ollama, "llama3.2")
    console.stop() if end == "stop" else console.kill()
    wait_until(lambda: not ollama.pulls() or end == "kill", "the pull to end")
    console.start()
    wait_until(lambda: one(console, job["id"])["state"] == "downloading", "the download to continue")
    ollama.clear_faults()
    wait_until(lambda: one(console, job["id"])["state"] == "complete", "the end")
    wait_until(lambda: not ollama.pulls(), "all pulls to end")


def test_the_queue_runs_two_downloads_at_once(console, ollama):
    """Two at once by default; the third has position 1."""
    ollama.set_fault("pull_slow", 3_000_000)
    jobs = [download(console, name, accept="application/json").json() for name in ("llama3.2", "mistral", "phi")]
    assert [one(console, j["id"])["state"] for j in jobs] == ["downloading", "downloading", "queued"]
    assert one(console, jobs[2]["id"])["position"] == 1
    again = download(console, "phi:latest", accept="application/json").json()
    assert again["id"] == jobs[2]["id"]
    console.delete(f"{BASE}/downloads/{jobs[0]['id']}")
    wait_until(lambda: one(console, jobs[2]["id"])["state"] == "downloading", "the third one's turn")


@pytest.mark.parametrize(
    ("fault", "value", "code", "words"),
    [
        ("pull_error_at", {"percent": 30, "error": "dial tcp: no such host"}, "registry_unreachable", "registry"),
        ("disk_full_at", 40, "disk_full", "disk"),
        ("digest_mismatch", True, "digest_mismatch", "again"),
    ],
)  # fmt: skip
def test_a_failure_is_explained_and_can_be_retried(console, ollama, fault, value, code, words):
    """The last event says what happened and what to do; without the fault a retry succeeds."""
    ollama.set_fault(fault, value)
    with closing(download(console, "llama3.2")) as answer:
        heard = list(unnamed(answer))
    assert (heard[-1]["status"], heard[-1]["error"]) == ("error", code)
    assert words in heard[-1]["message"].lower()
    ollama.clear_faults()
    console.post(f"{BASE}/downloads/{heard[-1]['id']}/resume")
    wait_until(lambda: one(console, heard[-1]["id"])["state"] == "complete", "the retry")


def test_an_unknown_name_fails_at_the_registry_an_invalid_one_at_once(console):
    """For an invalid name no process is started."""
    with closing(download(console, "nosuch")) as answer:
        last = list(unnamed(answer))[-1]
    assert (last["status"], last["error"]) == ("error", "unknown_model")
    for name in ("bad name!!", "--insecure", "../../etc/passwd", "a" * 301, "x;reboot"):
        refused = download(console, name)
        assert refused.status_code == 422, name
        assert refused.json()["error"] in ("invalid_name", "invalid_value")


def test_an_unknown_download_is_404(console):
    """404 in the contract's shape, for every method."""
    for answer in (
        console.post(f"{BASE}/downloads/nope/pause"),
        console.post(f"{BASE}/downloads/nope/resume"),
        console.delete(f"{BASE}/downloads/nope"),
    ):
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


def test_a_full_disk_is_detected_before_the_transfer(start_console, ollama):
    """The configured margin stays free."""
    console = start_console(ollama_base_url=ollama.url, ollama_binary=ollama.binary, disk_margin_gb=10_000_000)
    with closing(download(console, "llama3.2")) as answer:
        last = list(unnamed(answer))[-1]
    assert (last["status"], last["error"]) == ("error", "disk_full")
    assert "disk_margin_gb" in last["message"]


def test_installed_recommended_and_deleted_models(start_console, ollama):
    """The lists show what is installed; deleting unloads first, frees the reported bytes, and removes the model."""
    console = start_console(ollama_base_url=ollama.url, ollama_binary=ollama.binary, disk_margin_gb=0)
    listed = console.get(f"{BASE}/recommendations").json()["recommendations"]
    assert [(r["model"], r["recommended"], r["installed"]) for r in listed] == [
        (CAPYBARA, True, False),
        ("llama3.2", False, False),
        ("mistral", False, False),
    ]
    with closing(download(console, "llama3.2")) as answer:
        assert list(unnamed(answer))[-1]["status"] == "complete"
    console.wait_for(lambda s: "llama3.2:latest" in s["models"], "the model")
    assert [r["installed"] for r in console.get(f"{BASE}/recommendations").json()["recommendations"]] == [
        False,
        True,
        False,
    ]
    console.switch("llama3.2")
    deleted = console.delete(f"{BASE}/llama3.2").json()
    assert (deleted["status"], deleted["model"]) == ("deleted", "llama3.2:latest")
    assert deleted["freed_bytes"] == pytest.approx(SIZE, rel=0.01)
    assert ollama.ps() == []
    assert "llama3.2:latest" not in ollama.tags()
    assert "llama3.2:latest" not in console.states()
    assert console.delete(f"{BASE}/llama3.2").status_code == 404


def test_a_recommended_model_may_be_called_by_the_name_that_people_use(start_console, tmp_path):
    """Ollama's library lacks `capybarahermes-2.5-mistral-7b`: it is downloaded from where it is, and used by either."""
    other = "capybarahermes-2.5-mistral-7b"
    with FakeOllama(tmp_path / "o", models={CAPYBARA: {}}) as fake:
        console = start_console(ollama_base_url=fake.url, ollama_binary=fake.binary, ollama_model=other)
        console.wait_for(lambda s: CAPYBARA in s["models"], "the model")
        recommended = console.get(f"{BASE}/recommendations").json()["recommendations"][0]
        assert (recommended["model"], recommended["aliases"], recommended["model_id"]) == (CAPYBARA, [other], CAPYBARA)
        assert console.switch(other)["model"] == CAPYBARA
        headers = {"Accept": "application/json"}
        assert console.post(f"{BASE}/download", {"model": other}, headers=headers).json()["model"] == CAPYBARA


def test_a_newer_version_in_the_registry_is_shown_and_downloaded(start_console, tmp_path):
    """Another digest in the registry means "update available"; downloading the model again updates it."""
    with FakeRegistry({"llama3.2:latest": {"size": SIZE}}) as registry, FakeOllama(tmp_path / "o") as fake:
        fake.configure(registry_url=registry.url)
        console = start_console(
            ollama_base_url=fake.url, ollama_binary=fake.binary, ollama_registry_url=registry.url, disk_margin_gb=0
        )
        with closing(download(console, "llama3.2")) as answer:
            assert list(unnamed(answer))[-1]["status"] == "complete"
        console.wait_for(lambda s: "llama3.2:latest" in s["models"], "the model")
        assert console.post(f"{BASE}/updates").json() == {"update_available": []}
        registry.publish("llama3.2:latest", size=SIZE, version=2)
        assert console.post(f"{BASE}/updates").json() == {"update_available": ["llama3.2:latest"]}
        (model,) = console.get(f"{BASE}/status").json()["ollama"]["models"]
        assert model["update_available"] is True
        with closing(download(console, "llama3.2")) as answer:
            assert list(unnamed(answer))[-1]["status"] == "complete"
        wait_until(
            lambda: not console.get(f"{BASE}/status").json()["ollama"]["models"][0]["update_available"], "the update"
        )


def test_a_gguf_file_from_the_hub_is_listed_and_answers(start_console, tmp_path):
    """Saved in the models folder, it is listed and can be switched to; deleting the model removes the file."""
    models = tmp_path / "models"
    models.mkdir()
    gguf = (DEMO_MODELS / "switchyard-mini.gguf").read_bytes()
    with FakeHub({"owner/tiny": Repo({"tiny-Q4_K_M.gguf": gguf})}) as hub:
        environment = hub_environment(hub, tmp_path / "hub-home")
        console = start_console(models_dir=models, environment=environment, disk_margin_gb=0)
        with closing(download(console, "owner/tiny", source="huggingface")) as answer:
            heard = list(unnamed(answer))
        assert heard[-1]["status"] == "complete", heard[-1]
        model_id = "owner/tiny/tiny-Q4_K_M"
        console.wait_for(lambda s: model_id in s["models"], "the model")
        console.switch(model_id)
        assert console.ask("Who are you?").json()["choices"][0]["message"]["content"]
        assert console.delete(f"{BASE}/{model_id}").json()["freed_bytes"] == len(gguf)
        assert list(models.rglob("*.gguf")) == []
        assert model_id not in console.states()


def download(console: Console, model: str, source: str = "ollama", accept: str = "*/*") -> requests.Response:
    body = {"model": model, "source": source}
    return console.post(f"{BASE}/download", body, stream=True, headers={"Accept": accept})


def start(console: Console, ollama: FakeOllama, model: str) -> dict[str, Any]:
    """Start a slow download, and wait for its first bytes."""
    ollama.set_fault("pull_slow", 4_000_000)
    job = download(console, model, accept="application/json").json()
    wait_until(lambda: one(console, job["id"])["completed_bytes"] > 1_000_000, "the first bytes")
    return job


def one(console: Console, download_id: str) -> dict[str, Any]:
    return next(d for d in console.get(f"{BASE}/downloads").json()["downloads"] if d["id"] == download_id)


def bytes_on_disk(ollama: FakeOllama) -> int:
    """Bytes on Ollama's disk; 0 while a pull runs, or is just writing its state."""
    try:
        return ollama.pulled_bytes("llama3.2")
    except json.JSONDecodeError:
        return 0


def unnamed(answer: requests.Response) -> Iterator[dict[str, Any]]:
    """Seed 004's events: data without an event name."""
    for line in answer.iter_lines(decode_unicode=True):
        assert not line.startswith("event:")
        if line.startswith("data: "):
            yield json.loads(line[6:])
