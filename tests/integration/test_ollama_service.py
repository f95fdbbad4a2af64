"""`ollama serve` as a local service: start, stop, watch and adopt, with the fake Ollama in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from services.engines.ollama.health import ask_health
from services.engines.ollama.watch import OllamaWatch
from services.engines.processes import ProcessRegistry
from services.engines.server_address import Address
from services.engines.supervisor import ServiceError, ServiceStatus
from services.providers.ollama_service import OllamaService, find_ollama
from tests.support.console import wait_until
from tests.support.ollama import TINY_A, FakeOllama
from tests.support.stopwatch import Stopwatch

TIMEOUT = 60.0
MODEL = "tiny-a:latest"

MakeOllama = Callable[..., FakeOllama]
MakeService = Callable[..., OllamaService]


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[FakeOllama]:
    """The fake as installed: not running."""
    fake = FakeOllama(tmp_path / "ollama", models={MODEL: TINY_A})
    yield fake
    fake.close()


@pytest.fixture
def make_service(tmp_path: Path, ollama: FakeOllama) -> Iterator[MakeService]:
    """Create services on one state folder, each like one run of the app; their servers end with the test."""
    made: list[OllamaService] = []
    watches: list[OllamaWatch] = []

    def make(base_url: str | None = None, *, polled: bool = False, **options: object) -> OllamaService:
        registry = ProcessRegistry(tmp_path / "state")
        registry.end_leftovers()
        defaults = {"find_binary": lambda: ollama.binary, "environment": lambda: ollama.environment}
        watch = OllamaWatch(base_url or ollama.url)
        service = OllamaService(watch, registry, **{**defaults, "stop_grace": 1.0, **options})
        made.append(service)
        watches.append(watch)
        if polled:
            watch.start()
        return service

    yield make
    for watch in watches:
        watch.stop()
    for service in made:
        service.close()
        if service.status().ours:
            service.stop()


@pytest.fixture
def service(make_service: MakeService) -> OllamaService:
    return make_service()


def refused(act: Callable[[], ServiceStatus]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        act()
    return caught.value


def load_model(ollama: FakeOllama) -> None:
    ollama.load(MODEL)
    assert len(ollama.runners()) == 1, "a loaded model is held by a runner process"


def wait_for_no_process(ollama: FakeOllama) -> None:
    wait_until(lambda: not ollama.processes(), "server and runner to end", TIMEOUT)


def wait_for(service: OllamaService, state: str) -> ServiceStatus:
    wait_until(lambda: service.status().state == state, f"Ollama to be {state}", TIMEOUT)
    return service.status()


class OtherProgram(BaseHTTPRequestHandler):
    """A server that answers every path with 501."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def web_server(port: int) -> Iterator[None]:
    """A web server other than Ollama on a port."""
    with ThreadingHTTPServer(("127.0.0.1", port), OtherProgram) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        serving.start()
        try:
            yield
        finally:
            server.shutdown()
            serving.join()


def test_before_anything_was_started_it_is_stopped_and_can_be_started(service: OllamaService) -> None:
    status = service.refresh()
    assert (status.state, status.ours, status.local, status.pid, status.version) == ("stopped", False, True, None, None)
    assert (status.can_start, status.can_stop, service.reachable) == (True, False, False)


def test_it_starts_shows_its_data_and_stops(service: OllamaService, ollama: FakeOllama) -> None:
    """Process, start time, version and log of the server that we started; nothing is left after the stop."""
    status = service.start()
    assert (status.state, status.ours, status.port, status.can_start) == ("running", True, ollama.port, False)
    assert status.can_stop
    assert service.reachable
    assert [server.pid for server in ollama.servers()] == [status.pid]
    assert status.uptime_seconds is not None
    assert 0 <= status.uptime_seconds < TIMEOUT
    assert re.fullmatch(r"\d+\.\d+\.\d+", status.version or "")
    assert f"Listening on 127.0.0.1:{ollama.port}" in status.log_tail
    load_model(ollama)

    status = service.stop()
    assert (status.state, status.ours, status.pid, status.version) == ("stopped", False, None, None)
    assert status.error is None
    wait_for_no_process(ollama)


def test_polling_does_not_fill_the_log(service: OllamaService) -> None:
    """Ollama logs every request to stdout: polled once a second, that would be 9 MB a day."""
    service.start()
    for _ in range(5):
        status = service.refresh()
    assert "/api/version" not in status.log_tail
    service.stop()


def test_starting_and_stopping_are_idempotent(service: OllamaService) -> None:
    first = service.start()
    assert service.start().pid == first.pid
    service.stop()
    assert service.stop().state == "stopped"


def test_two_clicks_start_one_server(service: OllamaService, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as clicks:
        answers = [answer.result() for answer in [clicks.submit(service.start), clicks.submit(service.start)]]
    assert len({status.pid for status in answers}) == 1
    assert len(list((tmp_path / "state" / "processes").glob("*.json"))) == 1
    service.stop()


def test_it_starts_again_after_a_stop(service: OllamaService) -> None:
    first = service.start()
    service.stop()
    second = service.start()
    assert second.state == "running"
    assert second.pid != first.pid
    service.stop()


def test_without_the_program_its_installation_is_explained(make_service: MakeService) -> None:
    service = make_service(find_binary=lambda: None)
    error = refused(service.start)
    assert error.code == "ollama_not_found"
    assert "https://ollama.com/download" in error.message
    assert "ollama_binary" in error.message
    status = service.status()
    assert (status.state, status.binary, status.can_start) == ("stopped", None, False)


def test_a_program_that_can_not_be_run_is_named(make_service: MakeService, tmp_path: Path) -> None:
    program = tmp_path / "not-a-program"
    program.write_text("no program")
    program.chmod(0o755)
    error = refused(make_service(find_binary=lambda: str(program)).start)
    assert error.code == "service_failed"
    assert str(program) in error.message


def test_a_port_that_another_program_uses_is_explained(service: OllamaService, ollama: FakeOllama) -> None:
    """The fake fails to bind like the real one; the message names the program on the port, which is this test."""
    with web_server(ollama.port):
        error = refused(service.start)
        assert error.code == "port_in_use"
        assert f"port {ollama.port}" in error.message
        assert f"process {os.getpid()}" in error.message
        assert "ollama_base_url" in error.message
        assert "address already in use" in error.log_tail
        status = service.status()
        assert (status.state, status.error, status.ours) == ("failed", error.message, False)
        assert status.log_tail == error.log_tail
        assert service.dismiss().error is None
        assert "is not Ollama" in (service.refresh().error or "")
    assert service.start().state == "running"
    service.stop()


def test_a_crash_at_the_start_has_its_cause(service: OllamaService, ollama: FakeOllama) -> None:
    ollama.set_fault("crash_on_start", "Error: could not create directory /models: permission denied")
    error = refused(service.start)
    assert error.code == "service_failed"
    assert re.search(r"exit code \d+ while starting: could not create directory /models: permission denied", str(error))
    assert "could not create" in error.log_tail
    assert service.status().state == "failed"
    assert service.status().can_start


def test_a_later_crash_is_shown_until_dismissed(make_service: MakeService, ollama: FakeOllama) -> None:
    """Killed from outside: noticed within a second, explained, and its runner ended."""
    service = make_service(polled=True)
    started = service.start()
    assert started.pid is not None
    load_model(ollama)
    os.kill(started.pid, signal.SIGKILL)
    watch = Stopwatch()
    status = wait_for(service, "failed")
    assert watch.waited < 1
    assert "SIGKILL" in (status.error or "")
    assert "Listening" in status.log_tail
    assert (status.ours, status.can_start, status.pid) == (False, True, None)
    wait_for_no_process(ollama)
    assert service.refresh().state == "failed"
    assert service.dismiss().state == "stopped"


def test_a_server_stopped_from_outside_has_not_failed(service: OllamaService) -> None:
    """Exit code 0 after another program's SIGTERM is not a failure."""
    started = service.start()
    assert started.pid is not None
    os.kill(started.pid, signal.SIGTERM)
    assert wait_for(service, "stopped").error is None


def test_the_next_run_adopts_the_server_and_stops_it_with_its_runner(
    make_service: MakeService, ollama: FakeOllama
) -> None:
    """Closing the app leaves the server running; the next run adopts it."""
    first = make_service(polled=True)
    before = first.start()
    first.close()

    second = make_service(polled=True)
    status = wait_for(second, "running")
    assert (status.ours, status.pid, status.can_stop) == (True, before.pid, True)
    assert status.started_at is not None
    assert before.started_at is not None
    assert abs(status.started_at - before.started_at) < 1
    assert "Listening" in status.log_tail
    assert second.start().pid == before.pid
    load_model(ollama)

    assert second.stop().state == "stopped"
    pid = before.pid
    assert pid is not None
    wait_until(lambda: not psutil.pid_exists(pid), "the server to be reaped by its parent, this process")
    wait_for_no_process(ollama)


def test_a_crash_of_an_adopted_server_is_noticed(make_service: MakeService) -> None:
    make_service().start()
    second = make_service()
    pid = second.refresh().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    watch = Stopwatch()
    status = wait_for(second, "failed")
    assert watch.waited < 1
    assert "by itself" in (status.error or "")


def test_a_server_that_ignores_sigterm_is_killed(service: OllamaService, ollama: FakeOllama) -> None:
    ollama.set_fault("ignore_sigterm", True)
    started = service.start()
    assert started.pid is not None
    assert service.stop().state == "stopped"
    assert not psutil.pid_exists(started.pid)


def test_a_server_started_elsewhere_is_used_and_never_stopped(service: OllamaService, ollama: FakeOllama) -> None:
    ollama.start()
    status = service.start()
    assert (status.state, status.ours, status.can_start, status.can_stop) == ("running", False, False, False)
    assert status.pid is not None, "the process list of this machine shows which program listens"
    error = refused(service.stop)
    assert error.code == "not_ours"
    assert service.refresh().state == "running"
    ollama.stop()
    assert service.refresh().state == "stopped"


def test_a_remote_server_is_neither_started_nor_stopped(make_service: MakeService) -> None:
    """`.invalid` never resolves, so no request reaches another server."""
    service = make_service("http://ollama.invalid:11434")
    assert refused(service.start).code == "remote_service"
    assert refused(service.stop).code == "remote_service"
    status = service.status()
    assert (status.local, status.state, status.can_start, status.can_stop) == (False, "unreachable", False, False)


def test_a_hanging_server_is_unreachable_and_delays_nothing(make_service: MakeService, ollama: FakeOllama) -> None:
    """It accepts connections and never answers; reading the status doesn't wait for it."""
    service = make_service(polled=True)
    service.start()
    ollama.set_fault("hang", True)
    deadline = time.monotonic() + TIMEOUT
    slowest = 0.0
    while service.status().state != "unreachable":
        watch = Stopwatch()
        service.status()
        slowest = max(slowest, watch.waited)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert slowest < 0.1
    assert "hangs" in (service.status().error or "")
    assert service.status().can_stop
    assert service.stop().state == "stopped"


def test_a_server_that_never_answers_is_stopped(make_service: MakeService, ollama: FakeOllama) -> None:
    ollama.set_fault("hang", True)
    service = make_service(start_timeout=0.2)
    error = refused(service.start)
    assert error.code == "service_timeout"
    assert not service.status().ours
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ollama.port)) != 0


def test_stopping_cancels_a_start(make_service: MakeService, ollama: FakeOllama) -> None:
    ollama.set_fault("hang", True)
    service = make_service()
    with ThreadPoolExecutor(1) as clicks:
        start = clicks.submit(service.start)
        wait_until(lambda: service.status().ours, "the server process")
        assert service.status().state == "starting"
        assert service.status().can_stop
        assert service.stop().state == "stopped"
        assert refused(start.result).code == "start_cancelled"
    assert service.refresh().error is None


def test_every_change_is_reported(make_service: MakeService) -> None:
    """A page that shows the service is updated at each change, not once a second."""
    told: list[str] = []
    made = make_service(on_change=lambda: told.append(made.status().state))
    made.start()
    made.stop()
    for _ in range(3):
        made.refresh()
    assert [state for state, before in zip(told, ["", *told], strict=False) if state != before] == [
        "starting",
        "running",
        "stopping",
        "stopped",
    ]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello", "is not Ollama"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "is not Ollama"),
        (b"", "was cut"),
    ],
)
def test_another_server_at_the_address_is_recognised(answer: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        seen = ask_health(f"http://127.0.0.1:{server.getsockname()[1]}")
        serving.join()
    assert seen.version is None
    assert words in (seen.error or "")


@pytest.mark.parametrize(
    ("url", "authority", "local"),
    [
        ("http://127.0.0.1:11434", "127.0.0.1:11434", True),
        ("http://localhost:11434/", "localhost:11434", True),
        ("http://[::1]:11434", "[::1]:11434", True),
        ("http://127.0.0.1", "127.0.0.1:80", True),
        ("https://127.0.0.1:11434", "127.0.0.1:11434", False),
        ("http://192.168.1.20:11434", "192.168.1.20:11434", False),
        ("https://ollama.example.com", "ollama.example.com:443", False),
    ],
)
def test_local_addresses_are_recognised(url: str, authority: str, local: bool) -> None:
    """A TLS address isn't local: `ollama serve` has no TLS, so a proxy answers there."""
    address = Address.parse(url)
    assert (address.authority, address.local) == (authority, local)


def test_the_program_is_the_configured_one_or_the_one_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ollama"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_ollama(None) is None
    assert find_ollama(str(program)) is None
    program.write_text("#!/bin/sh\n")
    assert find_ollama(str(program)) is None, "it isn't executable"
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert find_ollama(None) == str(program)
    assert find_ollama(str(program)) == str(program)
    assert find_ollama(str(tmp_path / "elsewhere")) is None
