"""A console in front of an Ollama: its models switched, served and watched like any other."""

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
    """A server that somebody else started, with nothing loaded, said or asked."""
    return shared_ollama.reset()


@pytest.fixture(scope="module")
def shared(start_shared: StartConsole, shared_ollama: FakeOllama) -> Console:
    return start_shared(ollama_base_url=shared_ollama.url, ollama_binary=shared_ollama.binary)


@pytest.fixture
def console(shared: Console, ollama: FakeOllama) -> Console:  # noqa: ARG001 — at rest first
    """A console in front of that server, which has seen its models."""
    return seeing(shared.reset())


def seeing(console: Console) -> Console:
    """The console, once Ollama's models are listed and the service is known to run."""
    console.wait_for(lambda s: A in s["models"], "Ollama's models to be listed")
    wait_until(lambda: _service(console)["state"] == "running", "Ollama to be seen")
    return console


@pytest.mark.usefixtures("console")
def test_one_loop_polls_the_server(ollama):
    """Whether it answers, what is loaded and what is installed: one after the other, and by nobody else."""

    def polled() -> list[str]:
        paths = [request["path"] for request in ollama.requests() if request["path"] in POLLED]
        return paths[paths.index(POLLED[0]) :] if POLLED[0] in paths else []

    wait_until(lambda: len(polled()) >= 9, "three rounds")
    assert polled()[:9] == POLLED * 3


def test_models_of_both_engines_stand_side_by_side(console, ollama):
    """One list, one switch, one address; the one that was active is unloaded only when room is needed."""
    assert {A, B, MINI, SMALL} <= set(console.states())
    assert console.model(A)["engine"] == "ollama"
    console.switch(MINI)
    console.switch("tiny-a")  # without its tag
    assert console.status()["active_model"] == A
    assert ollama.ps() == [A]
    answer = console.ask("Hello").json()  # names no model: the active one, by the name that Ollama knows
    assert answer["choices"][0]["message"]["content"]
    assert console.ask("Hello", model="auto").status_code == 200
    assert console.ask("Hello", model="tiny-a", stream=True).text.rstrip().endswith("data: [DONE]")
    assert console.ask("Hello", model=MINI).status_code == 200


def test_seed_002_unloads_the_old_model_and_loads_the_new_one(console, ollama):
    """Physically: Ollama holds the new model alone, warm, and chats go there at once."""
    first = console.post("/ollama/models/switch", {"model": "tiny-a"}).json()
    assert (first["status"], first["old_model"], first["new_model"]) == ("success", None, A)
    second = console.post("/ollama/models/switch", {"model": B}).json()
    assert (second["status"], second["old_model"], second["new_model"]) == ("success", A, B)
    assert second["load_seconds"] > 0
    assert second["note"] == "Model physically unloaded and reloaded in Ollama. No server restart needed."
    assert ollama.ps() == [B]
    assert console.post("/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}).status_code == 200
    assert ollama.output().count("runner started in") == 2  # the chat asked for nothing that loads it again


def test_seed_002_keeps_the_old_model_when_the_new_one_fails(console, ollama):
    """The error says why, the old one is back and in use."""
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
def test_seed_002_says_what_is_wrong_with_a_name(console, model, status, code):
    """Nothing is unloaded for it."""
    answer = console.post("/ollama/models/switch", {"model": model})
    assert (answer.status_code, answer.json()["error"]) == (status, code)


def test_what_another_client_does_is_noticed_and_not_fought(console, ollama):
    """Loaded by somebody else: shown, answering. Unloaded by somebody else: said, and no failure."""
    ollama.load("tiny-a")
    console.wait_for(lambda s: s["models"][A]["status"] == "running", "the adoption")
    assert console.status()["active_model"] == A
    ollama.unload("tiny-a")
    gone = console.wait_for(lambda s: s["models"][A]["status"] == "stopped", "the loss")
    assert "another program" in gone["models"][A]["warning"]
    assert gone["models"][A]["error"] is None
    assert ollama.ps() == []


def test_what_ollama_evicted_for_a_failed_load_comes_back(console, ollama):
    """With room for one model only, Ollama unloads the working one before it finds the other broken."""
    ollama.set_fault("max_loaded", 1)
    console.switch(A)
    answer = console.post("/v1/models/switch", {"target_model": BROKEN, "wait": True})
    assert answer.status_code == 502
    console.wait_for(lambda s: s["models"][A]["status"] == "running", "the old model")
    assert ollama.ps() == [A]
    assert console.status()["active_model"] == A


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_of_the_app_unloads_nothing(console, ollama, end):
    """The next start finds what is loaded, by Ollama's word, and goes on with it."""
    console.switch(A)
    console.stop() if end == "stop" else console.kill()
    assert ollama.ps() == [A]
    console.start()
    console.wait_for(lambda s: s["models"].get(A, {}).get("status") == "running", "the adoption")
    assert console.status()["active_model"] == A
    assert ollama.output().count("runner started in") == 1


def test_a_server_killed_during_a_switch_ends_it_with_the_truth(console, ollama):
    """Within 5 s: the switch has failed and says why, nothing is shown as loaded that is not."""
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
    """The request is dropped, Ollama gives the load up."""
    ollama.set_fault("stuck_load", True)
    console.post("/v1/models/switch", {"target_model": A})
    console.wait_for(lambda s: s["models"][A]["status"] == "loading", "the load")
    assert console.delete("/v1/models/switch").json()["status"] == "cancelled"
    ollama.clear_faults()
    assert ollama.ps() == []
    assert console.states()[A] == "stopped"


def test_a_model_that_will_not_go_fails_the_switch_and_serves_on(start_console, ollama):
    """Another program may be using it: nothing is forced on a server that isn't ours."""
    console = seeing(start_console(ollama_base_url=ollama.url, unload_timeout_seconds=0.5))
    console.switch(A)
    ollama.set_fault("never_unload", True)
    answer = console.post(f"/v1/models/{A}/stop")
    assert answer.status_code == 502
    assert "did not unload" in answer.json()["message"]
    assert console.states()[A] == "running"
    assert console.ask("Hello", model=A).status_code == 200


def test_an_ollama_that_hangs_freezes_nothing(console, ollama):
    """Status and pages answer while every question to Ollama goes unanswered."""
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
    """Four Ollama and two embedded models under a budget for about two: the books hold and agree with `/api/ps`."""
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
    """Pid, uptime and log while it runs; a restart of the app finds it again; stopping leaves no process."""
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
        gone = console.wait_for(lambda s: s["models"][A]["status"] == "stopped", "its models to go")
        assert gone["models"][A]["error"] is None
        assert fake.processes() == []


def test_a_server_started_beside_an_unfinished_download_keeps_its_pieces(start_console, tmp_path):
    """Ollama would delete partial files that are older than an hour."""
    with closing(FakeOllama(tmp_path / "ollama", registry={"big:latest": {"size": 10**9}})) as fake:
        console = start_console(ollama_base_url=fake.url, ollama_binary=fake.binary, environment=fake.environment)
        headers = {"Accept": "application/json"}
        job = console.post("/api/providers/models/download", {"model": "big"}, headers=headers).json()
        console.post(f"/api/providers/models/downloads/{job['id']}/pause")
        started = console.post("/api/providers/services/start", {"service": "ollama"}).json()
        assert psutil.Process(started["pid"]).environ()["OLLAMA_NOPRUNE"] == "1"


def test_the_configured_model_answers_when_nothing_is_loaded(start_console, ollama):
    """Seed 004's OLLAMA_MODEL: a request that names no model gets it, switched to on the way."""
    console = start_console(ollama_base_url=ollama.url, environment={"OLLAMA_MODEL": "tiny-b"})
    console.wait_for(lambda s: B in s["models"], "the models")
    assert console.ask("Hello").json()["choices"][0]["message"]["content"]
    assert ollama.ps() == [B]


def test_a_foreign_ollama_is_never_stopped(console, ollama):
    """It is used; who started it has to stop it."""
    answer = console.post("/api/providers/services/stop", {"service": "ollama"})
    assert (answer.status_code, answer.json()["error"]) == (409, "not_ours")
    assert ollama.tags()


def test_without_ollama_the_service_says_how_to_get_it(start_console):
    """A missing program has its own message with the next step."""
    console = start_console(ollama_binary="/nowhere/ollama")
    answer = console.post("/api/providers/services/start", {"service": "ollama"})
    assert (answer.status_code, answer.json()["error"]) == (503, "ollama_not_found")
    assert "https://ollama.com/download" in answer.json()["message"]


def test_the_app_stops_at_once_beside_a_hanging_ollama(console, ollama):
    """SIGTERM is not held up by somebody who doesn't answer."""
    ollama.set_fault("hang", True)
    watch = Stopwatch()
    console.stop(signal.SIGTERM)
    assert watch.waited < 10


def _service(console: Console) -> dict:
    return console.get("/api/providers/services/status").json()["services"]["ollama"]
