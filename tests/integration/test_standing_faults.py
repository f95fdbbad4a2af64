"""One fault after the other at a running console: whoever doesn't need what has failed goes on, and all comes back."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import psutil
import pytest
import requests

from tests.support.console import DEMO_MODELS, FAKE_LLAMA_SERVER, TIMEOUT, Console, fake_model, wait_until
from tests.support.faults import Faults, few_descriptors
from tests.support.stopwatch import Stopwatch

VLLM = """
[[models]]
id = "docked"
engine = "vllm"
source = "/models/docked"
size_gb = 1
required_gb = 2
"""
Started = tuple[Console, Faults]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, start_shared: Callable[..., Console]) -> Iterator[Started]:
    models = tmp_path_factory.mktemp("models")
    shutil.copy(DEMO_MODELS / "switchyard-mini.gguf", models)
    with Faults(tmp_path_factory.mktemp("faults"), models) as faults:
        console = start_shared(
            toml=fake_model("good", "hold:20") + fake_model("other") + VLLM,
            models_dir=models,
            environment=faults.environment,
            llamacpp_server=FAKE_LLAMA_SERVER,
        )
        yield console, faults
        console.close()


@pytest.fixture
def console(started: Started) -> Console:
    """At rest, with a model that answers."""
    return started[0].reset()


@pytest.fixture
def faults(started: Started) -> Faults:
    return started[1]


def worker(console: Console) -> psutil.Process:
    assert console.process is not None
    return psutil.Process(console.process.pid).children()[0]


def gpu_of(console: Console) -> dict[str, Any]:
    """The GPU in the status."""
    return next(device for device in console.status()["gpu"]["devices"] if device["kind"] == "gpu")


def begin_a_chat(console: Console) -> requests.Response:
    return requests.post(f"{console.url}/chats", data={"text": "Hello"}, allow_redirects=False, timeout=TIMEOUT)


def assert_it_serves(console: Console) -> None:
    """What needs neither disk nor driver nor Docker: status, pages, and a model that runs."""
    assert console.status()["active_model"] == "good"
    assert console.get("/models").status_code == 200
    assert console.ask("Hello").status_code == 200


def test_a_full_disk(console: Console, faults: Faults) -> None:
    """Nothing is unloaded for a load that could not be recorded; what can't be kept is said."""
    console.switch("good")
    with faults.full_disk():
        assert_it_serves(console)
        refused = console.post("/v1/models/switch", {"target_model": "other"})
        assert (refused.status_code, refused.json()["error"]) == (503, "state_unwritable")
        chat = begin_a_chat(console)
        assert (chat.status_code, chat.headers["Retry-After"]) == (503, "5")
        assert console.states()["good"] == "running"
    console.switch("other")
    assert begin_a_chat(console).status_code == 303


def test_a_driver_that_hangs(console: Console, faults: Faults) -> None:
    """The last figures stand, models are switched to and answer, and the driver is heard again."""
    gpu = gpu_of(console)
    with faults.hanging_driver():
        wait_until(lambda: "driver hangs" in console.output(), "the hang to be noticed")
        watch = Stopwatch()
        assert [gpu_of(console) for _ in range(20)] == [gpu] * 20
        assert watch.waited < 1, "nobody waits for the driver"
        console.switch("good")
        assert_it_serves(console)
    wait_until(lambda: "answers again" in console.output(), "the driver to be heard again")


def test_the_app_stops_though_the_driver_hangs(console: Console, faults: Faults) -> None:
    before = console.output().count("driver hangs")
    with faults.hanging_driver():
        wait_until(lambda: console.output().count("driver hangs") > before, "it to hang")
        assert console.stop() == 0


def test_a_docker_that_hangs(console: Console, faults: Faults) -> None:
    """A load there fails in words, in its time; meanwhile everything else goes on."""
    console.switch("good")
    answers: list[requests.Response] = []

    def load() -> None:
        wish = {"target_model": "docked", "wait": True}
        answers.append(requests.post(f"{console.url}/v1/models/switch", json=wish, timeout=TIMEOUT))

    with faults.hanging_docker():
        asking = threading.Thread(target=load, daemon=True)
        asking.start()
        while asking.is_alive():
            assert_it_serves(console)
            asking.join(0.5)
    assert answers[0].status_code == 502, answers[0].text
    assert "Docker" in answers[0].json()["message"]


def test_a_models_folder_that_is_slow(console: Console, faults: Faults) -> None:
    """It froze everybody at each look for new files."""
    console.switch("good")
    waits = []
    with faults.slow_models(1.0):
        for _ in range(30):  # over more than one look, of which there is one every two seconds
            watch = Stopwatch()
            assert_it_serves(console)
            waits.append(watch.waited)
            time.sleep(0.1)
    assert max(waits) < 0.9, waits


def test_too_few_descriptors(console: Console) -> None:
    """Nobody is taken on, who is there goes on; once there is room those who waited are answered."""
    console.switch("good")
    with ExitStack() as opened:
        with few_descriptors(worker(console), spare=3):
            waiting = [opened.enter_context(closing(ask_for_the_status(console))) for _ in range(20)]
            assert console.status()["active_model"] == "good"
        for connection in waiting:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert_it_serves(console)


def ask_for_the_status(console: Console) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", console.port), TIMEOUT)
    connection.sendall(b"GET /v1/models/status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return connection
