"""The Docker card of the Models page: what it says in each state, and that nobody asks Docker who does not use it."""

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
    """Answers with what the test puts into `answer`."""

    host = "unix:///run/docker.sock"

    def __init__(self, answer: RuntimeStatus) -> None:
        self.answer = answer
        self.closed = False

    def available(self) -> RuntimeStatus:
        return self.answer

    def close(self) -> None:
        self.closed = True


def card(app: Flask) -> str:
    """The card as the page shows it."""
    page = app.test_client().get("/models").text
    return page[page.index('id="docker-card"') : page.index("</section>", page.index('id="docker-card"'))]


def show(app: Flask, status: DockerStatus, monkeypatch: pytest.MonkeyPatch) -> str:
    services: Services = app.extensions["switchyard"]
    monkeypatch.setattr(services.docker_service, "status", lambda: status)
    services.board.touch()
    return card(app)


def test_without_a_vllm_model_docker_is_not_asked_and_the_card_is_quiet(app: Flask) -> None:
    """The default: no state that looks like a fault, no link at the top, no connection."""
    services: Services = app.extensions["switchyard"]
    services.docker_service.start_watching()
    assert services.docker_service.status().state == "unused"
    assert "Not in use" in card(app)
    assert "Docker is optional" in card(app)
    assert 'class="mark' not in card(app)
    assert 'href="#docker"' not in app.test_client().get("/models").text


def test_a_socket_where_nobody_listens_is_told_with_what_to_do(make_app: MakeApp, tmp_path: Path) -> None:
    """By Docker's real client; the card names the socket, and the top of the page leads to it."""
    app = make_app(models=[MODEL.model_dump()], docker_host=f"unix://{tmp_path}/docker.sock")
    services: Services = app.extensions["switchyard"]
    assert services.docker_service.refresh().state == "not_running"
    assert "Not running" in card(app)
    assert "sudo systemctl start docker" in card(app)
    assert f"<dd>{tmp_path}/docker.sock</dd>" in card(app)
    assert 'href="#docker"' in app.test_client().get("/models").text


def test_where_docker_is_not_installed_the_card_says_where_to_get_it(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quietly, as of Ollama."""
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
def test_a_docker_that_refuses_or_hangs_is_told_with_what_to_do(
    app: Flask, monkeypatch: pytest.MonkeyPatch, error: Exception, word: str, advice: str
) -> None:
    """In the words that a load would fail with."""
    cause = explain(error, "say how it is", FakeDocker.host, 15)
    shown = show(app, DockerStatus(cause.problem, FakeDocker.host, error=str(cause)), monkeypatch)
    assert word in shown
    assert advice in shown
    assert 'class="mark failed"' in shown


def test_an_address_that_can_not_be_used_is_told() -> None:
    """It is no fault of Docker's."""
    service = DockerService(lambda: DockerRuntime("ssh://elsewhere"), used=True)
    status = service.refresh()
    assert (status.state, status.socket) == ("unusable", None)
    assert "unix:// or tcp://" in str(status.error)
    service.close()


def test_a_running_docker_shows_its_version_and_socket(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that it can give GPUs to containers."""
    shown = show(app, DockerStatus("running", FakeDocker.host, "29.1.0", nvidia=True), monkeypatch)
    for words in ("Running", "29.1.0", "/run/docker.sock", "NVIDIA runtime"):
        assert words in shown
    assert "service-error" not in shown


def test_a_change_is_reported_once_and_the_client_is_closed() -> None:
    """So that pages look again when it comes back, and not each time it is asked."""
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
