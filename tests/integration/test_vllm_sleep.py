"""vLLM models on a GPU sleep instead of being stopped: a console with real containers and a fake GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.support.console import TIMEOUT, Console, wait_until
from tests.support.docker import DockerEngine
from tests.support.vllm import gpu_entry as entry
from tests.support.vllm import models_running as running
from tests.support.vllm import on_gpu

A, B, C = "org/model-a", "org/model-b", "org/model-c"
NEW, NEWER = "org/new", "org/newer"
"""Models used by one test only, so that what is learned about them starts there."""
REFUSING, DYING, DEAF, ENDING, STUCK = (f"org/{name}" for name in ("refusing", "dying", "deaf", "ending", "stuck"))
MODELS = "".join(
    [
        *(entry(name) for name in (A, B, NEW, NEWER)),
        entry(C, required_gb=79),
        entry(REFUSING, refuse_sleep=True),
        entry(DYING, exit_falling_asleep=True),
        entry(DEAF, refuse_wake=True),
        entry(ENDING, exit_asleep=True),
        entry(STUCK, hang_at="loading_weights"),
    ]
)

StartConsole = Callable[..., Console]


@pytest.fixture(scope="module")
def shared(
    gpu_docker: DockerEngine, start_shared: StartConsole, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Console]:
    names = (A, B, C, NEW, NEWER, REFUSING, DYING, DEAF, ENDING, STUCK)
    yield start_shared(toml=MODELS, standby="false", **on_gpu(gpu_docker, tmp_path_factory.mktemp("vllm"), *names))
    gpu_docker.remove_containers()


@pytest.fixture
def console(console: Console) -> Iterator[Console]:
    """The module's console, reset before and after, because other tests need the GPU as well."""
    yield console
    console.reset()


@pytest.fixture
def start(gpu_docker: DockerEngine, start_console: StartConsole, tmp_path: Path) -> Iterator[StartConsole]:
    """Start a console for this test only, with its own settings."""

    def start(toml: str = entry(A) + entry(B), **settings: object) -> Console:
        return start_console(toml=toml, standby="false", **on_gpu(gpu_docker, tmp_path, A, B), **settings)

    yield start
    gpu_docker.remove_containers()


def plan(console: Console, model: str) -> dict[str, object]:
    return console.post("/v1/models/switch/plan", {"target_model": model}).json()


def gpu_held(console: Console, model: str) -> float:
    device = next(d for d in console.status()["gpu"]["devices"] if d["kind"] == "gpu")
    return float(device["models"].get(model, 0))


def test_a_displaced_model_sleeps_and_the_next_switch_wakes_it(console, gpu_docker):
    """The plan announces sleep; the status shows it; the same container wakes, and requests are answered."""
    console.switch(NEW)
    assert 59 < gpu_held(console, NEW) <= 61
    (unload,) = plan(console, NEWER)["unload"]
    assert unload["model"] == NEW
    assert unload["sleeps"] is True
    assert unload["reload_seconds"] is None  # it has never been woken

    console.switch(NEWER)
    assert console.states() == {**console.states(), NEW: "asleep", NEWER: "running"}
    assert running(gpu_docker) == [NEW, NEWER]
    assert gpu_held(console, NEW) == 1.5
    before = {c["Id"]: c["Created"] for c in gpu_docker.client.containers()}

    events = list(console.switch_stream(NEW))
    assert events[-1][0] == "complete"
    assert any(data.get("detail") == "waking up" for _, data in events)
    progress = [data["progress"] for _, data in events if "progress" in data]
    assert progress == sorted(progress)
    assert console.states() == {**console.states(), NEW: "running", NEWER: "asleep"}
    assert {c["Id"]: c["Created"] for c in gpu_docker.client.containers()} == before
    assert console.ask("Hello", model=NEW).status_code == 200
    assert console.status()["active_model"] == NEW

    (unload,) = plan(console, NEWER)["unload"]
    assert unload["reload_seconds"] < 10  # learned from this wake, separately from the load


def test_a_model_that_refuses_to_sleep_is_stopped(console, gpu_docker):
    """The switch continues as without sleep."""
    console.switch(REFUSING)
    console.switch(B)
    assert console.states()[REFUSING] == "stopped"
    assert running(gpu_docker) == [B]


def test_a_sleeping_model_that_keeps_too_much_memory_is_stopped(start, gpu_docker):
    """The measurement contradicts the estimate; the next plan uses the measurement."""
    console = start(entry(A, asleep_bytes=30_000_000_000) + entry(B), memory_timeout_seconds=1)
    console.switch(A)
    assert plan(console, B)["unload"][0]["sleeps"] is True
    console.switch(B)
    assert console.states()[A] == "stopped"
    assert running(gpu_docker) == [B]
    console.switch(A)
    assert plan(console, B)["unload"][0]["sleeps"] is False


def test_a_model_still_answering_is_stopped_instead_of_put_to_sleep(start, gpu_docker):
    """vLLM crashes when put to sleep while it generates, so a model still busy after the drain time is stopped."""
    console = start(entry(A, slow_tokens=1.5) + entry(B), drain_timeout_seconds=1)
    console.switch(A)
    question = {"model": A, "messages": [{"role": "user", "content": "Hello"}]}
    asking = threading.Thread(
        target=lambda: requests.post(f"{console.url}/v1/chat/completions", json=question, timeout=60), daemon=True
    )
    asking.start()
    console.wait_for(lambda s: s["models"][A]["in_flight"] == 1, "the request to be in flight")
    console.switch(B)
    assert console.states()[A] == "stopped"
    assert running(gpu_docker) == [B]
    asking.join(TIMEOUT)
    assert not asking.is_alive()


def test_a_model_that_exits_while_falling_asleep_is_not_shown_asleep(console, gpu_docker):
    """It exits while it is being unloaded; it must not be shown as asleep, nor be counted in the ledger."""
    console.switch(DYING)
    console.switch(B)
    console.wait_for(lambda s: s["models"][DYING]["status"] in ("failed", "stopped"), "its exit to be noticed")
    assert running(gpu_docker) == [B]
    assert gpu_held(console, DYING) == 0


def test_a_model_that_does_not_wake_is_loaded_again(console):
    """In the same switch, which succeeds."""
    console.switch(DEAF)
    console.switch(B)
    assert console.states()[DEAF] == "asleep"
    console.switch(DEAF)
    assert console.ask("Hello", model=DEAF).status_code == 200


def test_without_enough_host_memory_no_model_sleeps(start, gpu_docker):
    """Sleeping models' weights would be stored there."""
    console = start(memory_budget_gb=0.01)
    console.switch(A)
    assert plan(console, B)["unload"][0]["sleeps"] is False
    console.switch(B)
    assert running(gpu_docker) == [B]


def test_sleep_can_be_turned_off(start, gpu_docker):
    """For all models by the setting, for one by its option."""
    console = start(vllm_sleep=False)
    console.switch(A)
    console.switch(B)
    assert running(gpu_docker) == [B]


def test_a_sleeping_model_is_stopped_on_request_and_for_its_memory(console, gpu_docker):
    """Unload stops a sleeping model; so does a switch to a model that needs nearly the whole GPU."""
    console.switch(A)
    console.switch(B)
    assert console.post(f"/v1/models/{A}/stop").status_code == 200
    assert console.states()[A] == "stopped"
    assert running(gpu_docker) == [B]
    console.switch(A)
    assert console.states()[B] == "asleep"
    console.switch(C)
    assert running(gpu_docker) == [C]


def test_the_exit_of_a_sleeping_model_is_noticed(console):
    """It can't be woken any more, so it isn't shown as asleep."""
    console.switch(ENDING)
    console.switch(B)
    console.wait_for(lambda s: s["models"][ENDING]["status"] in ("failed", "stopped"), "its exit to be noticed")
    console.switch(ENDING)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_of_the_app_adopts_sleeping_models(console, gpu_docker, end):
    """It can then be woken as before."""
    console.switch(A)
    console.switch(B)
    console.stop() if end == "stop" else console.kill()
    console.start()
    console.wait_for(lambda s: (s["models"][A]["status"], s["models"][B]["status"]) == ("asleep", "running"), "both")
    assert console.status()["active_model"] == B
    console.switch(A)
    assert running(gpu_docker) == [A, B]


def test_a_cancelled_switch_wakes_the_sleeping_model(console, gpu_docker):
    """It runs as before, without a load."""
    console.switch(A)
    console.post("/v1/models/switch", {"target_model": STUCK})
    wait_until(lambda: running(gpu_docker) == [A, STUCK], "the container to start")
    console.delete("/v1/models/switch")
    console.wait_for(lambda s: s["models"][A]["status"] == "running" and not s["switch"], "the old model to run")
    assert console.status()["active_model"] == A
    assert console.ask("Hello", model=A).status_code == 200
