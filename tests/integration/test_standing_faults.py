"""Faults of the environment at a running console: what doesn't need the failed part works, and everything recovers."""

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


def start_a_chat(console: Console) -> requests.Response:
    return requests.post(f"{console.url}/chats", data={"text": "Hello"}, allow_redirects=False, timeout=TIMEOUT)


def assert_it_serves(console: Console) -> None:
    """Assert that status, pages and a running model work, which need neither disk nor driver nor Docker."""
    assert console.status()["active_model"] == "good"
    assert console.get("/models").status_code == 200
    assert console.ask("Hello").status_code == 200


def test_a_full_disk(console: Console, faults: Faults) -> None:
    """Nothing is unloaded for a load that could not be recorded; requests that must write fail with a clear error."""
    console.switch("good")
    with faults.full_disk():
        assert_it_serves(console)
        refused = console.post("/v1/models/switch", {"target_model": "other"})
        assert (refused.status_code, refused.json()["error"]) == (503, "state_unwritable")
        chat = start_a_chat(console)
        assert (chat.status_code, chat.headers["Retry-After"]) == (503, "5")
        assert console.states()["good"] == "running"
    console.switch("other")
    assert start_a_chat(console).status_code == 303


def test_a_hanging_driver(console: Console, faults: Faults) -> None:
    """The last figures stay, models can be switched to and answer, and the driver recovers."""
    gpu = gpu_of(console)
    with faults.hanging_driver():
        wait_until(lambda: "driver hangs" in console.output(), "the hang to be logged")
        watch = Stopwatch()
        assert [gpu_of(console) for _ in range(20)] == [gpu] * 20
        assert watch.waited < 1, "nothing waits for the driver"
        console.switch("good")
        assert_it_serves(console)
    wait_until(lambda: "answers again" in console.output(), "the driver to answer again")


def test_the_app_stops_with_a_hanging_driver(console: Console, faults: Faults) -> None:
    before = console.output().count("driver hangs")
    with faults.hanging_driver():
        wait_until(lambda: console.output().count("driver hangs") > before, "the hang to be logged")
        assert console.stop() == 0


def test_a_hanging_docker(console: Console, faults: Faults) -> None:
    """A load there fails in time with a clear error; everything else works meanwhile."""
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


def test_a_slow_models_folder(console: Console, faults: Faults) -> None:
    """Each scan for new files blocked the whole app."""
    console.switch("good")
    waits = []
    with faults.slow_models(1.0):
        for _ in range(30):  # longer than one scan; there is one every two seconds
            watch = Stopwatch()
            assert_it_serves(console)
            waits.append(watch.waited)
            time.sleep(0.1)
    assert max(waits) < 0.9, waits


def test_too_few_descriptors(console: Console) -> None:
    """New connections wait, existing ones are served; once there are descriptors the waiting ones are answered."""
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
