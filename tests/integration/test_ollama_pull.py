"""Ollama's downloads by its command and by its API, and how each handles a misbehaving server."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from services.cancellation import Cancelled, CancelToken
from services.downloads.fetcher import DownloadError, TransferUpdate
from services.downloads.ollama.pull import OllamaFetcher
from services.downloads.ollama.registry import MAX_BYTES, Registries, fetch_manifest
from services.downloads.progress import TransferProgress
from services.engines.ollama.names import OllamaName
from services.engines.processes import ProcessRegistry
from tests.support.console import TIMEOUT, wait_until
from tests.support.ollama import TINY_B, FakeOllama, FakeRegistry
from tests.support.stopwatch import Stopwatch

NOBODY = "http://127.0.0.1:9"
SUCCESS = b'{"status":"pulling manifest"}\n{"status":"success"}\n'

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """An HTTP server on a free loopback port that answers every request with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def answering(status: int, body: bytes, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test: no more children, threads and file descriptors than before."""
    children, threads, files = len(psutil.Process().children()), threading.active_count(), _open_files()
    yield
    wait_until(lambda: threading.active_count() <= threads, "threads to end")
    assert len(psutil.Process().children()) == children
    assert _open_files() <= files


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def program(folder: Path, code: str) -> str:
    """A fake command of a few lines of Python; `say` writes to stderr."""
    path = folder / "ollama"
    prelude = "import os, signal, subprocess, sys, time\ndef say(text): os.write(2, text.encode())\n"
    path.write_text(f"#!{sys.executable} -S\n{prelude}{code}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def by_command(folder: Path, code: str, **settings: object) -> OllamaFetcher:
    binary = program(folder, code)
    return OllamaFetcher(
        "http://127.0.0.1:9", find_binary=lambda: binary, **{"registries": Registries(NOBODY), **settings}
    )


def by_stream(url: str, **settings: object) -> OllamaFetcher:
    return OllamaFetcher(url, find_binary=lambda: None, registries=Registries(NOBODY), **settings)


def failure(fetcher: OllamaFetcher, name: str = "tiny-b") -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        fetcher.fetch(name, lambda _: None, CancelToken())
    return caught.value


@dataclass
class RunningFetch:
    """A fetch in a thread of its own, as the queue runs it."""

    fetcher: OllamaFetcher
    name: str = "tiny-b"
    seen: list[TransferUpdate] = field(default_factory=list)
    ended_by: BaseException | None = None

    def __enter__(self) -> RunningFetch:
        self.token = CancelToken()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.token.cancel()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()

    def wait_for(self, phase: str) -> None:
        wait_until(lambda: any(seen.phase == phase for seen in self.seen), f"the phase {phase}")

    def stop(self) -> float:
        """Abort it; return how many seconds it took to end."""
        watch = Stopwatch()
        self.token.cancel()
        self._thread.join(TIMEOUT)
        return watch.waited

    def _run(self) -> None:
        try:
            self.fetcher.fetch(self.name, self.seen.append, self.token)
        except (Cancelled, DownloadError) as error:
            self.ended_by = error


@dataclass
class Pulls:
    """A fake Ollama with a registry, and a fetcher by command or API."""

    ollama: FakeOllama
    registry: FakeRegistry
    way: str

    def fetcher(self, **settings: object) -> OllamaFetcher:
        binary = self.ollama.binary if self.way == "command" else None
        return OllamaFetcher(
            self.ollama.url,
            find_binary=lambda: binary,
            registries=Registries(self.registry.url, insecure=True),
            **settings,
        )

    def at(self, seen: TransferUpdate) -> int:
        return sum(part.completed for part in seen.parts.values())

    def bytes_on_disk(self) -> int:
        """Bytes on Ollama's disk; 0 while a pull runs, or is just writing its state."""
        try:
            return self.ollama.pulled_bytes("tiny-b")
        except json.JSONDecodeError:
            return 0


@pytest.fixture(params=["command", "stream"])
def pulls(request, tmp_path, monkeypatch) -> Iterator[Pulls]:
    """A running Ollama whose registry offers tiny-b, of 46 MB."""
    offered = {"tiny-b:latest": TINY_B}
    with FakeRegistry(offered) as registry, FakeOllama(tmp_path / "ollama", registry=offered) as ollama:
        ollama.configure(registry_url=registry.url, bytes_per_second=400_000_000, blob_seconds=0.01)
        monkeypatch.setenv("FAKE_OLLAMA", ollama.environment["FAKE_OLLAMA"])  # for the command that the test starts
        yield Pulls(ollama, registry, request.param)


class TestBothFetchers:
    """Complete pulls, by the command and by the API, with the same expectations."""

    def test_a_model_is_downloaded_with_its_size_known_in_advance(self, pulls):
        """Phases in order, percent rising to the end, every layer complete, and the exact size from the registry."""
        pulls.ollama.configure(bytes_per_second=80_000_000)
        seen: list[TransferUpdate] = []
        pulls.fetcher().fetch("tiny-b", seen.append, CancelToken())
        assert pulls.ollama.tags() == ["tiny-b:latest"]
        phases = list(dict.fromkeys(one.phase for one in seen))
        assert phases == [phase for phase in ("resolving", "downloading", "verifying", "writing") if phase in phases]
        assert "downloading" in phases
        assert "writing" in phases
        progress = TransferProgress()
        figures = [progress.advance(one, number * 0.1) for number, one in enumerate(seen)]
        assert figures[-1].percent == 99
        assert len({figure.percent for figure in figures}) > 4
        assert figures[-1].completed_bytes == figures[-1].total_bytes == TINY_B["size"]
        assert {one.expected_bytes for one in seen[1:]} == {TINY_B["size"]}

    def test_an_installed_model_is_done_at_once(self, pulls):
        """Its layers are only verified."""
        pulls.fetcher().fetch("tiny-b", lambda _: None, CancelToken())
        watch = Stopwatch()
        pulls.fetcher().fetch("tiny-b:latest", lambda _: None, CancelToken())
        assert watch.waited < 2

    def test_an_abort_stops_within_a_second_and_the_next_attempt_continues(self, pulls):
        """What has arrived is kept, and the next attempt continues from there."""
        pulls.ollama.set_fault("pull_slow", 10_000_000)
        with RunningFetch(pulls.fetcher()) as running:
            wait_until(lambda: any(pulls.at(seen) > 3_000_000 for seen in running.seen[:]), "some of it to arrive")
            assert running.stop() < 1
            assert isinstance(running.ended_by, Cancelled)
        wait_until(lambda: pulls.bytes_on_disk() > 0, "Ollama to have stopped")
        kept = pulls.bytes_on_disk()
        assert kept < TINY_B["size"]
        pulls.ollama.clear_faults()
        seen: list[TransferUpdate] = []
        pulls.fetcher().fetch("tiny-b", seen.append, CancelToken())
        first = next(pulls.at(one) for one in seen if one.parts)
        assert kept - 1_000_000 < first  # the command shows whole MB
        assert pulls.ollama.tags() == ["tiny-b:latest"]

    def test_an_unknown_name(self, pulls):
        """The registry doesn't have it; Ollama reports that."""
        error = failure(pulls.fetcher(), "nosuch")
        assert (error.code, error.may_resume) == ("unknown_model", False)
        assert "nosuch" in error.message

    def test_ollama_killed_in_the_middle(self, pulls):
        """In both cases no error is reported, and the command even exits with 0."""
        pulls.ollama.set_fault("pull_kill_server_at", 30)
        error = failure(pulls.fetcher())
        assert (error.code, error.may_resume) == ("interrupted", True)

    @pytest.mark.parametrize(
        ("fault", "value", "code"),
        [
            ("pull_error_at", {"percent": 20, "error": "something odd"}, "download_failed"),
            ("disk_full_at", 20, "disk_full"),
            ("digest_mismatch", True, "digest_mismatch"),
            ("registry_down", True, "registry_unreachable"),
        ],
    )
    def test_an_error_in_the_middle(self, pulls, fault, value, code):
        """The response began normally."""
        pulls.ollama.set_fault(fault, value)
        error = failure(pulls.fetcher())
        assert (error.code, error.may_resume) == (code, True)

    def test_a_stalled_transfer_fails(self, pulls):
        """Ollama repeats the same figures: the transfer is stalled, and what has arrived is kept."""
        pulls.ollama.set_fault("pull_stuck_at", 20)
        error = failure(pulls.fetcher(stall_seconds=0.4))
        assert (error.code, error.may_resume) == ("stalled", True)

    def test_ollama_is_not_running(self, pulls):
        """The same code by command and API, and what to do."""
        pulls.ollama.kill()
        error = failure(pulls.fetcher())
        assert (error.code, error.may_resume) == ("ollama_unreachable", True)
        assert "ollama serve" in error.message

    def test_without_a_manifest_the_download_works(self, pulls):
        """Sizes are then known as Ollama reaches each layer."""
        seen: list[TransferUpdate] = []
        binary = pulls.ollama.binary if pulls.way == "command" else None
        OllamaFetcher(pulls.ollama.url, find_binary=lambda: binary, registries=Registries(NOBODY)).fetch(
            "tiny-b", seen.append, CancelToken()
        )
        assert {one.expected_bytes for one in seen} == {None}
        assert pulls.ollama.tags() == ["tiny-b:latest"]


class TestCommand:
    """The command, misbehaving in various ways."""

    def test_how_the_command_is_started(self, tmp_path):
        """Arguments, environment, a process group of its own, and none of our stdin and stdout."""
        notes = tmp_path / "notes"
        keys = "('OLLAMA_HOST', 'TERM', 'NO_COLOR')"
        code = f"""
with open({str(notes)!r}, "w") as file:
    print(sys.argv[1:], [os.environ[key] for key in {keys}], os.getpgid(0) == os.getpid(), file=file)
    print(os.readlink("/proc/self/fd/0"), os.readlink("/proc/self/fd/1"), file=file)
say("success ")"""
        by_command(tmp_path, code, registries=Registries(NOBODY, insecure=True)).fetch(
            "user/x:7b", lambda _: None, CancelToken()
        )
        assert notes.read_text(encoding="utf-8").splitlines() == [
            f"['pull', '--insecure', 'user/x:7b'] ['{NOBODY}', 'dumb', '1'] True",
            "/dev/null /dev/null",
        ]

    def test_exit_code_0_alone_is_no_success(self, tmp_path):
        """If Ollama's server ends meanwhile, the command exits with 0 and no error."""
        error = failure(by_command(tmp_path, "say('pulling manifest \\x1b[K')"))
        assert (error.code, error.may_resume) == ("interrupted", True)

    def test_success_counts_with_any_exit_code(self, tmp_path):
        """`success` is printed only once the model is complete."""
        seen: list[TransferUpdate] = []
        by_command(tmp_path, "say('success \\x1b[K')\nsys.exit(3)").fetch("tiny-b", seen.append, CancelToken())
        assert seen

    def test_a_killed_command_is_reported_by_its_exit(self, tmp_path):
        """It was killed."""
        error = failure(by_command(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"))
        assert error.code == "interrupted"
        assert "SIGKILL" in error.message

    def test_its_error_is_explained(self, tmp_path):
        """A recorded error, with exit code 1."""
        error = failure(
            by_command(tmp_path, "say('\\nError: pull model manifest: file does not exist\\n')\nsys.exit(1)")
        )
        assert error.code == "unknown_model"

    def test_a_command_that_hangs_after_success_is_ended(self, tmp_path):
        """The model is complete, so nothing waits for the command."""
        by_command(tmp_path, "say('success \\n')\ntime.sleep(60)").fetch("tiny-b", lambda _: None, CancelToken())

    def test_a_command_whose_child_keeps_stderr_open_ends(self, tmp_path):
        """The end of the process counts, even if another process keeps the pipe open."""
        code = "subprocess.Popen(['sleep', '5'])\nsay('pulling manifest \\n')"
        assert failure(by_command(tmp_path, code)).code == "interrupted"

    @pytest.mark.parametrize("ending", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN)"])
    def test_an_abort_ends_it_within_a_second_even_if_it_ignores_signals(self, tmp_path, ending):
        """By SIGINT, then SIGKILL."""
        with RunningFetch(
            by_command(tmp_path, f"{ending}\nsay('verifying sha256 digest \\n')\ntime.sleep(60)")
        ) as running:
            running.wait_for("verifying")
            assert running.stop() < 1
            assert isinstance(running.ended_by, Cancelled)

    def test_a_command_that_repeats_itself_is_stalled(self, tmp_path):
        """Frames keep coming, but without any change."""
        code = "while True:\n    say('pulling 2a8270a5fd3e:  62% ▕█ ▏  28 MB/ 46 MB\\n')\n    time.sleep(0.05)"
        error = failure(by_command(tmp_path, code, stall_seconds=0.5))
        assert (error.code, error.may_resume) == ("stalled", True)

    def test_a_silent_command_is_stalled(self, tmp_path):
        """Not even a frame comes."""
        assert failure(by_command(tmp_path, "time.sleep(60)", stall_seconds=0.3)).code == "stalled"

    def test_a_running_command_is_recorded(self, tmp_path):
        """So that the next run of the app ends it if this one is killed; the record is deleted at its end."""
        registry = ProcessRegistry(tmp_path / "state")
        code = "say('verifying sha256 digest \\n')\ntime.sleep(60)"
        with RunningFetch(by_command(tmp_path, code, registry=registry)) as running:
            running.wait_for("verifying")
            (record,) = (tmp_path / "state" / "processes").glob("*.json")
            assert json.loads(record.read_text(encoding="utf-8"))["pid"] in [
                child.pid for child in psutil.Process().children()
            ]
            running.stop()
            assert not record.exists()

    def test_the_api_is_used_if_the_command_can_not_be_started(self):
        """Its path may be outdated."""
        with serving(answering(200, SUCCESS)) as url:
            fetcher = OllamaFetcher(url, find_binary=lambda: "/nowhere/ollama", registries=Registries(NOBODY))
            fetcher.fetch("tiny-b", lambda _: None, CancelToken())

    def test_a_remote_ollama_is_used_by_its_api(self):
        """The command on this machine may not fit the other server: it isn't even searched for."""
        looked = []
        fetcher = OllamaFetcher(
            "http://ollama.invalid:11434", find_binary=lambda: looked.append(1) or "/x", registries=Registries(NOBODY)
        )
        assert failure(fetcher).code == "ollama_unreachable"
        assert not looked


class TestStream:
    """The API, misbehaving in various ways."""

    def test_the_request_body(self):
        """The request asks for a stream of the model by its full name."""
        orders = []

        def answer(request: BaseHTTPRequestHandler) -> None:
            orders.append((request.path, request.headers["Content-Type"]))
            answering(200, SUCCESS)(request)

        with serving(answer) as url:
            by_stream(url).fetch("tiny-b", lambda _: None, CancelToken())
        assert orders == [("/api/pull", "application/json")]

    def test_a_server_that_does_not_run(self):
        """Ollama is not running; the message says how to start it."""
        error = failure(by_stream(NOBODY))
        assert (error.code, error.may_resume) == ("ollama_unreachable", True)
        assert "not running" in error.message

    def test_a_refusal_is_explained(self):
        """A status with an error in JSON."""
        with serving(answering(400, b'{"error":"invalid model name"}')) as url:
            assert failure(by_stream(url)).code == "invalid_name"

    def test_a_server_other_than_ollama_is_quoted(self):
        """Plain text, as for an unknown path."""
        with serving(answering(405, b"405 method not allowed")) as url:
            error = failure(by_stream(url))
        assert error.code == "download_failed"
        assert "405 method not allowed" in error.message

    @pytest.mark.parametrize("length", ["1000", None])
    def test_an_interrupted_stream_is_no_success(self, length):
        """With or without an announced length."""

        def answer(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            if length:
                request.send_header("Content-Length", length)
            request.end_headers()
            request.wfile.write(b'{"status":"pulling manifest"}\n{"stat')

        with serving(answer) as url:
            error = failure(by_stream(url))
        assert (error.code, error.may_resume) == ("interrupted", True)

    def test_a_closed_connection_without_a_response_is_interrupted(self):
        """The server closed the connection without a response."""
        with serving(lambda _: None) as url:
            assert failure(by_stream(url)).code == "interrupted"

    @pytest.mark.parametrize(
        "said", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b'HTTP/1.1 200 OK\r\n\r\n{"status":"pulling manifest"}\n']
    )
    def test_an_abort_ends_the_wait_at_once(self, said):
        """While waiting for the response or for a line; the server sees the connection close."""
        with _silent_server(said) as (url, accepted), RunningFetch(by_stream(url)) as running:
            wait_until(lambda: bool(accepted), "the request")
            assert running.stop() < 1
            assert isinstance(running.ended_by, Cancelled)
            accepted[0].settimeout(5)
            while accepted[0].recv(65_536):
                pass  # first the request itself, then the end

    @pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n\r\n"])
    def test_a_silent_server_is_stalled(self, said):
        """Before the response or in it."""
        with _silent_server(said) as (url, _):
            assert failure(by_stream(url, stall_seconds=0.3)).code == "stalled"

    def test_a_stream_that_repeats_itself_is_stalled(self):
        """Ollama repeats the last figures while its own connection is dead."""

        def answer(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.end_headers()
            try:
                while True:
                    request.wfile.write(b'{"digest":"sha256:2a8270a5fd3e4003","total":100,"completed":7}\n')
                    time.sleep(0.02)
            except OSError:
                pass

        with serving(answer) as url:
            assert failure(by_stream(url, stall_seconds=0.4)).code == "stalled"

    def test_an_abort_before_the_start_sends_no_request(self):
        """Not even for sizes."""
        token = CancelToken()
        token.cancel()
        with pytest.raises(Cancelled):
            by_stream(NOBODY).fetch("tiny-b", lambda _: None, token)


@contextmanager
def _silent_server(said: bytes) -> Iterator[tuple[str, list[socket.socket]]]:
    """Accepts one connection, sends these bytes and nothing more; the list then holds the connection."""
    accepted: list[socket.socket] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def accept() -> None:
            connection, _ = listener.accept()
            connection.sendall(said)
            accepted.append(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", accepted
        finally:
            thread.join(5)
            for connection in accepted:
                connection.close()


class TestRegistry:
    """Total sizes from the registry's manifest."""

    MANIFEST = json.dumps(
        {
            "schemaVersion": 2,
            "config": {"digest": "sha256:2b3ec63a04e7", "size": 416},
            "layers": [{"digest": "sha256:2a8270a5fd3e", "size": 46_236_384}, {"digest": "sha256:f02d", "size": 59}],
        }
    ).encode()

    def test_a_manifest_gives_the_id_the_size_and_the_layers(self):
        """The id that Ollama lists is the manifest's checksum; the configuration counts towards the size."""
        asked = []

        def answer(request: BaseHTTPRequestHandler) -> None:
            asked.append((request.path, request.headers["Accept"]))
            answering(200, self.MANIFEST)(request)

        with serving(answer) as url:
            manifest = fetch_manifest(OllamaName.parse("tiny-b"), Registries(url))
        assert asked == [
            ("/v2/library/tiny-b/manifests/latest", "application/vnd.docker.distribution.manifest.v2+json")
        ]
        assert manifest.digest == hashlib.sha256(self.MANIFEST).hexdigest()
        assert manifest.size_bytes == 46_236_384 + 416 + 59
        assert manifest.layers["sha256:2a8270a5fd3e"] == 46_236_384

    def test_a_host_in_the_name_is_contacted(self):
        """On this machine without TLS."""
        with serving(answering(200, self.MANIFEST)) as url:
            host = url.removeprefix("http://")
            name = OllamaName.parse(f"{host}/user/tiny-b:7b")
            assert fetch_manifest(name, Registries(NOBODY, (host,))).size_bytes > 46_000_000

    @pytest.mark.parametrize(
        ("status", "code"), [(404, "unknown_model"), (401, "access_denied"), (500, "registry_unreachable")]
    )
    def test_a_refusal_has_a_code(self, status, code):
        """Not found, not allowed, or out of order."""
        with serving(answering(status, b"{}")) as url, pytest.raises(DownloadError) as caught:
            fetch_manifest(OllamaName.parse("tiny-b"), Registries(url))
        assert caught.value.code == code

    @pytest.mark.parametrize(
        "answer",
        [
            answering(200, b"<html>"),
            answering(200, b"[]"),
            answering(200, b'{"config": {"digest": "x", "size": -1}, "layers": []}'),
            answering(200, b" " * (MAX_BYTES + 1)),
            answering(302, b"", Location="file:///etc/hostname"),
            answering(302, b"", Location="ftp://127.0.0.1/x"),
        ],
        ids=["html", "list", "negative", "too large", "to a file", "to ftp"],
    )
    def test_an_invalid_manifest_is_refused(self, answer):
        """A redirect to another scheme than HTTP isn't followed either."""
        with serving(answer) as url, pytest.raises(DownloadError) as caught:
            fetch_manifest(OllamaName.parse("tiny-b"), Registries(url))
        assert caught.value.code == "registry_unreachable"

    def test_a_registry_can_not_redirect_to_another_host(self):
        """For example to a service of this machine: that is not contacted."""
        asked = []

        def elsewhere(request: BaseHTTPRequestHandler) -> None:
            asked.append(request.path)
            answering(200, self.MANIFEST)(request)

        with (
            serving(elsewhere) as other,
            serving(answering(307, b"", Location=f"{other}/v2/x")) as url,
            pytest.raises(DownloadError) as caught,
        ):
            fetch_manifest(OllamaName.parse("tiny-b"), Registries(url))
        assert caught.value.code == "registry_unreachable"
        assert asked == []

    def test_an_unreachable_registry(self):
        """The connection is refused at once."""
        with pytest.raises(DownloadError) as caught:
            fetch_manifest(OllamaName.parse("tiny-b"), Registries(NOBODY))
        assert (caught.value.code, caught.value.may_resume) == ("registry_unreachable", True)

    def test_an_abort_works_while_the_registry_hangs(self):
        """The request to the registry is abandoned."""
        with _silent_server(b"") as (url, accepted):
            fetcher = OllamaFetcher(NOBODY, find_binary=lambda: None, registries=Registries(url))
            with RunningFetch(fetcher) as running:
                wait_until(lambda: bool(accepted), "the request")
                assert running.stop() < 1
                assert isinstance(running.ended_by, Cancelled)


def test_an_invalid_name_is_refused_without_a_request():
    """With the same error code by command and API."""
    fetcher = by_stream(NOBODY)
    for call in (lambda: fetcher.check_name("-x"), lambda: fetcher.fetch("-x", lambda _: None, CancelToken())):
        with pytest.raises(DownloadError) as caught:
            call()
        assert caught.value.code == "invalid_name"
    assert fetcher.check_name("llama3.2") == "llama3.2:latest"


WORKER = """
from gevent import monkey
monkey.patch_all()
import sys, threading
import gevent
from services.cancellation import Cancelled, CancelToken
from services.downloads.ollama.pull import OllamaFetcher
from services.downloads.ollama.registry import Registries
from tests.support.stopwatch import Stopwatch

binary = sys.argv[2] or None
fetcher = OllamaFetcher(sys.argv[1], find_binary=lambda: binary, registries=Registries("http://127.0.0.1:9"))
token, ended = CancelToken(), []
def run():
    try:
        fetcher.fetch("tiny-b", lambda seen: None, token)
    except Cancelled:
        ended.append(watch.waited)
thread = threading.Thread(target=run)
thread.start()
turns = 0
for _ in range(50):
    gevent.sleep(0.01)
    turns += 1
watch = Stopwatch()
token.cancel()
thread.join(60)
print(turns, ended[0] < 1)
"""


def _under_gevent(url: str, binary: str) -> None:
    """Run the worker; its output says how often other greenlets ran, and whether the abort took less than a second."""
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, url, binary], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert worker.stdout.splitlines()[-1] == "50 True", worker.stdout + worker.stderr


def test_under_gevent_a_silent_command_blocks_nothing(tmp_path):
    """Waiting for it doesn't block the thread that all greenlets share; an abort from another greenlet works."""
    _under_gevent(NOBODY, program(tmp_path, "time.sleep(60)"))


def test_under_gevent_a_silent_api_blocks_nothing():
    """The same for the API."""
    with _silent_server(b"HTTP/1.1 200 OK\r\n\r\n") as (url, _):
        _under_gevent(url, "")
