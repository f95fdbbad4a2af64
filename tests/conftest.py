"""Fixtures shared by all suites. `tests/README.md` says which one to use.

From cheapest to most expensive: `client` (Flask's test client, no process), `console` (the module's console, reset),
`start_shared` (for modules that need a different one), `start_console` (one per test: a second of a core).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from tests.support.console import (
    DEMO_MODELS,
    FAKE_LLAMA_SERVER,
    NOTHING_LOCAL,
    Console,
    is_a_setting,
    put_empty_database,
)
from tests.support.docker import DockerEngine, docker_engine

StartConsole = Callable[..., Console]
SLOWEST_FIRST = ("browser", "integration", "engines")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slowest folders first when several workers share the files, so that no worker ends with a long one."""
    if hasattr(config, "workerinput"):
        folders = [*SLOWEST_FIRST, ""]
        items.sort(key=lambda item: min(folders.index(part) for part in folders if part in ("", item.path.parent.name)))


@pytest.fixture
def make_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Flask]]:
    """Make an app like `app`; keyword arguments are settings."""
    from app import create_app  # imported here: it takes half a second, which runs without this fixture save

    for name in [name for name in os.environ if is_a_setting(name)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # so that no settings file of the developer is read
    with ExitStack() as made:

        def make(**settings: object) -> Flask:
            state = tmp_path / "app-state"
            put_empty_database(state)
            values = {"state_dir": state, "models_dir": DEMO_MODELS, **NOTHING_LOCAL, **settings}
            app = create_app(**values)
            services = made.enter_context(closing(app.extensions["switchyard"]))
            services.catalog.refresh()
            monkeypatch.setattr(services.switcher, "wait_first_pass", lambda _timeout: True)  # no engine is polled here
            return app

        yield make


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """The app without a server: its services are built and not started, so no engine and no greenlet runs.

    It lists the demo models; none is loaded.
    """
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """Flask's test client of `app`, for what is pure HTTP."""
    return app.test_client()


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartConsole]:
    """Start consoles that the tests of a module share; keyword arguments are Console's."""
    started: list[Console] = []

    def start(**options: object) -> Console:
        console = Console(tmp_path_factory.mktemp("console"), **options)  # type: ignore[arg-type]
        started.append(console)
        return console.start()

    yield start
    for console in started:
        console.close()


@pytest.fixture(scope="module")
def shared(start_shared: StartConsole) -> Console:
    """The module's console: the embedded engine and the demo models. A module may override it."""
    return start_shared()


@pytest.fixture
def console(shared: Console) -> Console:
    """The module's console as if it had just started: nothing loaded, nothing under way, nothing to report.

    What it learned from earlier tests stays, such as load times and conversations.
    """
    return shared.reset()


@pytest.fixture
def start_console(tmp_path: Path) -> Iterator[StartConsole]:
    """Start real consoles that end with the test; keyword arguments are Console's."""
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
def own_console(start_console: StartConsole) -> Console:
    """A console for this test only, with the embedded engine and the demo models: to end it, or to see it new."""
    return start_console()


@pytest.fixture
def start_with_fakes(start_console: StartConsole) -> StartConsole:
    """Start consoles for this test only whose models run on the fake llama-server."""

    def start(toml: str, **options: object) -> Console:
        return start_console(toml=toml, llamacpp_server=FAKE_LLAMA_SERVER, **options)

    return start


@pytest.fixture(scope="session")
def docker() -> Iterator[DockerEngine]:
    """A real Docker engine per test worker, with the fake vLLM's image; tests remove the containers they create."""
    assert os.geteuid() == 0, "The tests' own Docker engine needs root: run the tests as root."
    with docker_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def gpu_docker() -> Iterator[DockerEngine]:
    """A second Docker engine, which can give GPUs to containers; `tests/fakes/gpu` is their driver."""
    assert os.geteuid() == 0, "The tests' own Docker engine needs root: run the tests as root."
    with docker_engine(gpus=True) as engine:
        yield engine
