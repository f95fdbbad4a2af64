"""A console with an Ollama: its models are switched, served and watched like any other."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import psutil
import pytest

from tests.support.console import Console, wait_until
from tests.support.ollama import FakeOllama
from tests.support.stopwatch import Stopwatch

MODELS = {
    "tiny-a:latest": {"size": 7_411_936, "hold_mb": 30},
    "tiny-b:latest": {"size": 46_236_961, "hold_mb": 50},
    "tiny-c:latest": {"size": 20_000_000, "hold_mb": 30},
    "tiny-d:latest": {"size": 20_000_000, "hold_mb": 30},
    "broken:latest": {"size": 7_411_936, "broken": True},
}
A, B, BROKEN = "tiny-a:latest", "tiny-b:latest", "broken:latest"
MINI, SMALL = "switchyard-mini", "switchyard-small"
POLLED = ["/api/version", "/api/ps", "/api/tags"]

StartConsole = Callable[..., Console]


@pytest.fixture(scope="module")
def shared_ollama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeOllama]:
    with FakeOllama(tmp_path_factory.mktemp("ollama"), models=MODELS) as fake:
        yield fake


@pytest.fixture
def ollama(shared_ollama: FakeOllama) -> FakeOllama:
    """A server that was started elsewhere, with nothing loaded, logged or requested."""
    return shared_ollama.reset()


@pytest.fixture(scope="module")
def shared(start_shared: StartConsole, shared_ollama: FakeOllama) -> Console:
    return start_shared(ollama_base_url=shared_ollama.url, ollama_binary=shared_ollama.binary)


@pytest.fixture
def console(shared: Console, ollama: FakeOllama) -> Console:  # noqa: ARG001 — at rest first
    """A console with that server, whose models are listed."""
    return wait_for_ollama(shared.reset())


def wait_for_ollama(console: Console) -> Console:
    """The console, once Ollama's models are listed and the service is shown as running."""
    console.wait_for(lambda s: A in s["models"], "Ollama's models to be listed")
    wait_until(lambda: _service(console)["state"] == "running", "Ollama to be seen")
    return console


@pytest.mark.usefixtures("console")
def test_one_loop_polls_the_server(ollama):
    """Service state, loaded and installed models are polled one after the other by one loop only."""

    def polled() -> list[str]:
        paths = [request["path"] for request in ollama.requests() if request["path"] in POLLED]
        return paths[paths.index(POLLED[0]) :] if POLLED[0] in paths else []

    wait_until(lambda: len(polled()) >= 9, "three rounds")
    assert polled()[:9] == POLLED * 3


def test_models_of_both_engines_are_used_side_by_side(console, ollama):
    """One list, one switch, one address; the active model is unloaded only if memory is needed."""
    assert {A, B, MINI, SMALL} <= set(console.states())
    assert console.model(A)["engine"] == "ollama"
    console.switch(MINI)
    console.switch("tiny-a")  # without its tag
    assert console.status()["active_model"] == A
    assert ollama.ps() == [A]
    answer = console.ask("Hello").json()  # without a model: the active one, by the name that Ollama knows
    assert answer["choices"][0]["message"]["content"]
    assert console.ask("Hello", model="auto").status_code == 200
    assert console.ask("Hello", model="tiny-a", stream=True).text.rstrip().endswith("data: [DONE]")
    assert console.ask("Hello", model=MINI).status_code == 200


def test_seed_002_unloads_the_old_model_and_loads_the_new_one(console, ollama):
    """Ollama really holds only the new model, warmed up, and chats go there at once."""
    first = console.post("/ollama/models/switch", {"model": "tiny-a"}).json()
    assert (first["status"], first["old_model"], first["new_model"]) == ("success", None, A)
    second = console.post("/ollama/models/switch", {"model": B}).json()
    assert (second["status"], second["old_model"], second["new_model"]) == ("success", A, B)
    assert second["load_seconds"] > 0
    assert second["note"] == "Model physically unloaded and reloaded in Ollama. No server restart needed."
    assert ollama.ps() == [B]
    assert console.post("/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}).status_code == 200
    assert ollama.output().count("runner started in") == 2  # the chat's options caused no second load


def test_seed_002_keeps_the_old_model_when_the_new_one_fails(console, ollama):
    """The error says why; the old model is restored and in use."""
    console.post("/ollama/models/switch", {"model": A})
    answer = console.post("/ollama/models/switch", {"model": BROKEN})
    assert answer.status_code == 502
    assert "missing tensor" in answer.json()["message"]
    assert f"{A} is running again" in answer.json()["message"]
    assert ollama.ps() == [A]
    assert console.status()["active_model"] == A


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [("nope", 404, "model_not_found"), (MINI, 409, "not_ollama"), ("", 422, "invalid_value")],
)
def test_seed_002_rejects_invalid_names(console, model, status, code):
    """Nothing is unloaded."""
    answer = console.post("/ollama/models/switch", {"model": model})
    assert (answer.status_code, answer.json()["error"]) == (status, code)


def test_changes_by_another_client_are_shown_and_kept(console, ollama):
    """Loaded by another client: shown and answering. Unloaded by another client: reported, not as a failure."""
    ollama.load("tiny-a")
    console.wait_for(lambda s: s["models"][A]["status"] == "running", "the adoption")
    assert console.status()["active_model"] == A
    ollama.unload("tiny-a")
    gone = console.wait_for(lambda s: s["models"][A]["status"] == "stopped", "the unload to be noticed")
    assert "another program" in gone["models"][A]["warning"]
    assert gone["models"][A]["error"] is None
    assert ollama.ps() == []


def test_a_model_evicted_for_a_failed_load_is_restored(console, ollama):
    """With memory for one model only, Ollama evicts the working one before it finds the other broken."""
    ollama.set_fault("max_loaded", 1)
    console.switch(A)
    answer = console.post("/v1/models/switch", {"target_model": BROKEN, "wait": True})
    assert answer.status_code == 502
    console.wait_for(lambda s: s["models"][A]["status"] == "running", "the old model")
    assert ollama.ps() == [A]
    assert console.status()["active_model"] == A


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_of_the_app_unloads_nothing(console, ollama, end):
    """The next run adopts what Ollama reports as loaded."""
    console.switch(A)
    console.stop() if end == "stop" else console.kill()
    assert ollama.ps() == [A]
    console.start()
    console.wait_for(lambda s: s["models"].get(A, {}).get("status") == "running", "the adoption")
    assert console.status()["active_model"] == A
    assert ollama.output().count("runner started in") == 1


def test_a_server_killed_during_a_switch_fails_the_switch(console, ollama):
    """Within 5 s the switch has failed with the reason, and nothing is shown as loaded that isn't."""
    console.switch(A)
    ollama.set_fault("stuck_load", True)
    console.post("/v1/models/switch", {"target_model": B})
    console.wait_for(lambda s: s["models"][B]["status"] == "loading", "the load")
    watch = Stopwatch()
    ollama.kill()
    ended = console.wait_for(
        lambda s: s["switch"] is None and not {"running", "loading"} & set(console.states().values()), "the end"
    )
    assert watch.waited < 5
    assert ended["models"][B]["status"] == "failed"
    assert ended["active_model"] is None
    assert console.get("/api/model-loading-status").json()["status"] == "error"


def test_cancelling_a_stuck_load_leaves_nothing(console, ollama):
    """The request is cancelled, and Ollama aborts the load."""
    ollama.set_fault("stuck_load", True)
    console.post("/v1/models/switch", {"target_model": A})
    console.wait_for(lambda s: s["models"][A]["status"] == "loading", "the load")
    assert console.delete("/v1/models/switch").json()["status"] == "cancelled"
    ollama.clear_faults()
    assert ollama.ps() == []
    assert console.states()[A] == "stopped"


def test_a_model_that_can_not_be_unloaded_fails_the_switch(start_console, ollama):
    """Another program may be using it: a server that was started elsewhere is not forced."""
    console = wait_for_ollama(start_console(ollama_base_url=ollama.url, unload_timeout_seconds=0.5))
    console.switch(A)
    ollama.set_fault("never_unload", True)
    answer = console.post(f"/v1/models/{A}/stop")
    assert answer.status_code == 502
    assert "did not unload" in answer.json()["message"]
    assert console.states()[A] == "running"
    assert console.ask("Hello", model=A).status_code == 200


def test_a_hanging_ollama_blocks_nothing(console, ollama):
    """Status and pages answer while every request to Ollama hangs."""
    ollama.set_fault("hang", True)
    wait_until(
        lambda: console.get("/api/providers/services/status").json()["services"]["ollama"]["state"] != "running",
        "the hang to be noticed",
    )
    for path in ("/v1/models/status", "/models", "/api/providers/models/status"):
        watch = Stopwatch()
        assert console.get(path).status_code == 200
        assert watch.waited < 0.5


def test_random_switches_never_over_commit(start_console, ollama):
    """Four Ollama and two embedded models with memory for about two: the ledger holds and agrees with `/api/ps`."""
    budget_gb = 0.4
    toml = "".join(
        f'[[models]]\nid = "{m}"\nengine = "ollama"\nsource = "{m}"\nrequired_gb = 0.15\n' for m in list(MODELS)[:4]
    )
    toml += "".join(f'[[models]]\nid = "{m}"\nsource = "{m}.gguf"\nrequired_gb = 0.15\n' for m in (MINI, SMALL))
    console = start_console(toml=toml, ollama_base_url=ollama.url, memory_budget_gb=budget_gb)
    console.wait_for(lambda s: A in s["models"] and not s["models"][A]["error"], "the models")
    overs: list[float] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.05):
            (host,) = [d for d in console.get("/v1/models/status").json()["gpu"]["devices"] if d["kind"] == "host"]
            if sum(host["models"].values()) + host["reserved_gb"] > budget_gb:
                overs.append(sum(host["models"].values()) + host["reserved_gb"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    rng = random.Random(7)
    names = [*list(MODELS)[:4], MINI, SMALL]
    try:
        for _ in range(20):
            target = rng.choice(names)
            console.switch(target)
            status = console.status()
            assert status["active_model"] == target
            running = {m for m, v in status["models"].items() if v["status"] == "running" and v["engine"] == "ollama"}
            assert running == set(ollama.ps())
    finally:
        watching.set()
        watcher.join()
    assert overs == []


def test_ollama_is_started_and_stopped_over_http(start_console, tmp_path):
    """Pid, uptime and log while it runs; adopted after a restart of the app; stopping leaves no process."""
    with closing(FakeOllama(tmp_path / "ollama", models=MODELS)) as fake:
        console = start_console(ollama_base_url=fake.url, ollama_binary=fake.binary, environment=fake.environment)
        assert _service(console)["state"] == "stopped"
        started = console.post("/api/providers/services/start", {"service": "ollama"}).json()
        assert (started["status"], started["service"], started["port"]) == ("started", "ollama", fake.port)
        environment = psutil.Process(started["pid"]).environ()
        assert environment["OLLAMA_CONTEXT_LENGTH"] == "4096"
        assert "OLLAMA_NOPRUNE" not in environment
        console.wait_for(lambda s: A in s["models"], "its models")
        console.switch(A)
        console.stop()
        console.start()
        console.wait_for(lambda s: s["models"].get(A, {}).get("status") == "running", "the adoption")
        found = _service(console)
        assert (found["ours"], found["pid"], found["state"]) == (True, started["pid"], "running")
        assert found["uptime_seconds"] > 0
        assert "Listening on" in found["log_tail"]
        stopped = console.post("/api/providers/services/stop", {"service": "ollama"}).json()
        assert (stopped["status"], stopped["pid"]) == ("stopped", None)
        gone = console.wait_for(lambda s: s["models"][A]["status"] == "stopped", "its models to be unloaded")
        assert gone["models"][A]["error"] is None
        assert fake.processes() == []


def test_a_server_started_with_an_unfinished_download_keeps_its_data(start_console, tmp_path):
    """Ollama would delete partial files that are older than an hour."""
    with closing(FakeOllama(tmp_path / "ollama", registry={"big:latest": {"size": 10**9}})) as fake:
        console = start_console(ollama_base_url=fake.url, ollama_binary=fake.binary, environment=fake.environment)
        headers = {"Accept": "application/json"}
        job = console.post("/api/providers/models/download", {"model": "big"}, headers=headers).json()
        console.post(f"/api/providers/models/downloads/{job['id']}/pause")
        started = console.post("/api/providers/services/start", {"service": "ollama"}).json()
        assert psutil.Process(started["pid"]).environ()["OLLAMA_NOPRUNE"] == "1"


def test_the_configured_model_answers_when_nothing_is_loaded(start_console, ollama):
    """Seed 004's OLLAMA_MODEL: a request without a model switches to it."""
    console = start_console(ollama_base_url=ollama.url, environment={"OLLAMA_MODEL": "tiny-b"})
    console.wait_for(lambda s: B in s["models"], "the models")
    assert console.ask("Hello").json()["choices"][0]["message"]["content"]
    assert ollama.ps() == [B]


def test_an_ollama_started_elsewhere_is_never_stopped(console, ollama):
    """It is used, but only its owner can stop it."""
    answer = console.post("/api/providers/services/stop", {"service": "ollama"})
    assert (answer.status_code, answer.json()["error"]) == (409, "not_ours")
    assert ollama.tags()


def test_without_ollama_the_service_explains_its_installation(start_console):
    """A missing program has its own message, with what to do."""
    console = start_console(ollama_binary="/nowhere/ollama")
    answer = console.post("/api/providers/services/start", {"service": "ollama"})
    assert (answer.status_code, answer.json()["error"]) == (503, "ollama_not_found")
    assert "https://ollama.com/download" in answer.json()["message"]


def test_the_app_stops_at_once_with_a_hanging_ollama(console, ollama):
    """A server that doesn't answer must not delay SIGTERM."""
    ollama.set_fault("hang", True)
    watch = Stopwatch()
    console.stop(signal.SIGTERM)
    assert watch.waited < 10


def _service(console: Console) -> dict:
    return console.get("/api/providers/services/status").json()["services"]["ollama"]
