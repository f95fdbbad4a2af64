"""Fixtures that every suite shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.console import FAKE_LLAMA_SERVER, Console
from tests.support.docker import DockerEngine, docker_engine

StartConsole = Callable[..., Console]


@pytest.fixture
def start_console(tmp_path: Path) -> Iterator[StartConsole]:
    """Starts real consoles that end with the test; keyword arguments are Console's."""
    started: list[Console] = []

    def start(**options: object) -> Console:
        folder = tmp_path / f"console-{len(started)}"
        folder.mkdir()
        console = Console(folder, **options)  # type: ignore[arg-type]
        started.append(console)
        return console.start()

    yield start
    for console in started:
        console.close()


@pytest.fixture
def console(start_console: StartConsole) -> Console:
    """A console with the embedded engine and the demo models."""
    return start_console()


@pytest.fixture
def start_stand_in(start_console: StartConsole) -> StartConsole:
    """Starts consoles whose models run on the stand-in llama-server."""

    def start(toml: str, **options: object) -> Console:
        return start_console(toml=toml, llamacpp_server=FAKE_LLAMA_SERVER, **options)

    return start


@pytest.fixture(scope="session")
def docker() -> Iterator[DockerEngine]:
    """A real Docker engine of the test run's own, with the stand-in vLLM's image; who makes containers removes them."""
    assert os.geteuid() == 0, "A Docker engine of one's own needs root: run the tests as root."
    with docker_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def gpu_docker() -> Iterator[DockerEngine]:
    """Another one, which can hand GPUs to containers; `tests/fakes/gpu` is their driver."""
    assert os.geteuid() == 0, "A Docker engine of one's own needs root: run the tests as root."
    with docker_engine(gpus=True) as engine:
        yield engine
