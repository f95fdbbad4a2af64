"""The Docker card of the Models page: its text in each state, and no connection to Docker without a vLLM model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask

from services.config import ModelEntry
from services.container import Services
from services.engines.containers.docker_errors import explain
from services.engines.containers.docker_runtime import DockerRuntime
from services.engines.containers.port import RuntimeStatus
from services.providers.docker_service import DockerService, DockerStatus

MODEL = ModelEntry(id="org/model", engine="vllm", source="org/model")
MakeApp = Callable[..., Flask]


class FakeDocker:
    """A Docker whose status is set by the test."""

    host = "unix:///run/docker.sock"

    def __init__(self, answer: RuntimeStatus) -> None:
        self.answer = answer
        self.closed = False

    def available(self) -> RuntimeStatus:
        return self.answer

    def close(self) -> None:
        self.closed = True


def card(app: Flask) -> str:
    """The card's HTML on the page."""
    page = app.test_client().get("/models").text
    return page[page.index('id="docker-card"') : page.index("</section>", page.index('id="docker-card"'))]


def show(app: Flask, status: DockerStatus, monkeypatch: pytest.MonkeyPatch) -> str:
    services: Services = app.extensions["switchyard"]
    monkeypatch.setattr(services.docker_service, "status", lambda: status)
    services.board.touch()
    return card(app)


def test_without_a_vllm_model_docker_is_not_called(app: Flask) -> None:
    """By default no state looks like a fault, the page has no link to the card, and no connection is made."""
    services: Services = app.extensions["switchyard"]
    services.docker_service.start_watching()
    assert services.docker_service.status().state == "unused"
    assert "Not in use" in card(app)
    assert "Docker is optional" in card(app)
    assert 'class="mark' not in card(app)
    assert 'href="#docker"' not in app.test_client().get("/models").text


def test_a_socket_without_a_daemon_is_shown_with_advice(make_app: MakeApp, tmp_path: Path) -> None:
    """With Docker's real client: the card names the socket, and the top of the page links to the card."""
    app = make_app(models=[MODEL.model_dump()], docker_host=f"unix://{tmp_path}/docker.sock")
    services: Services = app.extensions["switchyard"]
    assert services.docker_service.refresh().state == "not_running"
    assert "Not running" in card(app)
    assert "sudo systemctl start docker" in card(app)
    assert f"<dd>{tmp_path}/docker.sock</dd>" in card(app)
    assert 'href="#docker"' in app.test_client().get("/models").text


def test_without_docker_installed_the_card_links_to_its_installation(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an alarming state, like Ollama's card."""
    app = make_app(models=[MODEL.model_dump()], docker_host=f"unix://{tmp_path}/docker.sock")
    services: Services = app.extensions["switchyard"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert services.docker_service.refresh().state == "not_installed"
    assert "Not installed" in card(app)
    assert "https://docs.docker.com/engine/install/" in card(app)
    assert 'class="mark' not in card(app)


@pytest.mark.parametrize(
    ("error", "word", "advice"),
    [
        (PermissionError(13, "Permission denied"), "Not allowed", "usermod -aG docker"),
        (TimeoutError("timed out"), "Not responding", "docker info"),
    ],
)
def test_a_docker_that_refuses_or_hangs_is_shown_with_advice(
    app: Flask, monkeypatch: pytest.MonkeyPatch, error: Exception, word: str, advice: str
) -> None:
    """With the same text as a failing load."""
    cause = explain(error, "say how it is", FakeDocker.host, 15)
    shown = show(app, DockerStatus(cause.problem, FakeDocker.host, error=str(cause)), monkeypatch)
    assert word in shown
    assert advice in shown
    assert 'class="mark failed"' in shown


def test_an_unusable_address_is_shown() -> None:
    """An invalid DOCKER_HOST is not reported as a fault of Docker."""
    service = DockerService(lambda: DockerRuntime("ssh://elsewhere"), used=True)
    status = service.refresh()
    assert (status.state, status.socket) == ("unusable", None)
    assert "unix:// or tcp://" in str(status.error)
    service.close()


def test_a_running_docker_shows_its_version_and_socket(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """It also shows whether Docker can give GPUs to containers."""
    shown = show(app, DockerStatus("running", FakeDocker.host, "29.1.0", nvidia=True), monkeypatch)
    for words in ("Running", "29.1.0", "/run/docker.sock", "NVIDIA runtime"):
        assert words in shown
    assert "service-error" not in shown


def test_a_change_is_reported_once_and_the_client_is_closed() -> None:
    """Pages update when Docker's state changes, not at each poll."""
    docker = FakeDocker(RuntimeStatus(False, error="It is down.", problem="not_running"))
    changes: list[str] = []
    service = DockerService(lambda: docker, used=True, on_change=lambda: changes.append(service.status().state))
    service.refresh()
    service.refresh()
    docker.answer = RuntimeStatus(True, "29.1.0")
    service.refresh()
    assert changes == ["not_running", "running"]
    service.close()
    assert docker.closed
