"""The fake Ollama behaves like the recorded Ollama 0.24.0.

The tests can also run on a real Ollama: OLLAMA_TEST_BINARY names its command and OLLAMA_TEST_MODEL a small model to
pull. Tests that need the fake's models or fault switches use the fixture `fake` and are skipped on a real Ollama.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.console import free_port, wait_until
from tests.support.ollama import TINY_A, TINY_B, FakeOllama, FakeRegistry
from tests.support.ollama_transcripts import FOLDER, exchanges, frames

REAL_BINARY = os.environ.get("OLLAMA_TEST_BINARY")
REAL_MODEL = os.environ.get("OLLAMA_TEST_MODEL", "")
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Ollama:
    """A running server and its command."""

    port: int
    binary: str
    environment: dict[str, str]
    model: str
    http: requests.Session = field(default_factory=requests.Session)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, **body: Any) -> requests.Response:
        return self.http.post(self.url + path, json=body, timeout=60)

    def ps(self) -> list[dict[str, Any]]:
        loaded: list[dict[str, Any]] = self.http.get(f"{self.url}/api/ps", timeout=10).json()["models"]
        return loaded

    def chat(self, **body: Any) -> requests.Response:
        return self.http.post(
            f"{self.url}/api/chat", json={"model": self.model, "messages": HELLO, **body}, timeout=60, stream=True
        )

    def empty(self) -> None:
        for model in self.ps():
            self.post("/api/generate", model=model["name"], keep_alive=0)
        wait_until(lambda: not self.ps(), "no model to be loaded")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.binary, *arguments],
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )


@pytest.fixture(scope="module")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeOllama]:
    if REAL_BINARY:
        pytest.skip("this asks for what only the fake has")
    models = {
        "tiny-a:latest": TINY_A,
        "tiny-b:latest": TINY_B,
        "brokentensor:latest": {"broken": True, "hold_mb": 1},
        "tiny-e:latest": {"embedding_only": True, "hold_mb": 1},
        "cloudy:cloud": {"cloud": True},
        "half:latest": {"vram_share": 0.6, "loaded_size": 1000, "hold_mb": 1},
    }
    with FakeOllama(tmp_path_factory.mktemp("ollama"), models) as fake:
        yield fake


@pytest.fixture
def fake(fake_model: FakeOllama) -> Iterator[FakeOllama]:
    """The fake behind the fixture `ollama`, with nothing loaded."""
    for name in fake_model.ps():
        fake_model.unload(name)
    yield fake_model
    fake_model.clear_faults()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[FakeOllama]:
    """A fake for one test, not started yet; it can pull `big`, of 250 MB."""
    if REAL_BINARY:
        pytest.skip("this asks for what only the fake has")
    fake = FakeOllama(tmp_path / "ollama", {"tiny-a:latest": TINY_A}, {"big:latest": {"size": 250_000_000}})
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Ollama]:
    """The server under test: the real Ollama if one is configured, else the fake."""
    if REAL_BINARY is None:
        fake: FakeOllama = request.getfixturevalue("fake_model")
        ollama = Ollama(fake.port, fake.binary, fake.environment, "tiny-a")
        ollama.http.trust_env = False
        with closing(ollama.http):
            yield ollama
        return
    port = free_port()
    environment = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(tmp_path_factory.mktemp("real"))}
    ollama = Ollama(port, REAL_BINARY, environment, REAL_MODEL)
    ollama.http.trust_env = False
    process = subprocess.Popen(
        [REAL_BINARY, "serve"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: ollama.command("list").returncode == 0, "the real Ollama to answer")
        assert ollama.command("pull", "--insecure", REAL_MODEL).returncode == 0
        with closing(ollama.http):
            yield ollama
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture
def ollama(server: Ollama) -> Ollama:
    server.empty()
    return server


def same(port: int, recording: str, only: slice = slice(None), **renamed: str) -> None:
    """Repeat the requests of a recording and compare heads and bodies, with times and numbers masked."""
    for exchange in exchanges(recording)[only]:
        now, recorded = exchange.again(port, **renamed)
        if "later" in exchange.title:
            continue
        assert now == recorded, f"{recording}: {exchange.title}"


@pytest.mark.parametrize(
    "recording",
    [
        "10-api-version",
        "10-root",
        "12-api-ps-before",
        "14-generate-unload-notloaded",
        "15-generate-load-30m",
        "20-generate-nostream",
        "21-generate-errors",
        "22-chat-nostream",
        "22-chat-stream",
        "23-chat-errors",
        "25-v1-chat-nostream",
        "25-v1-chat-stream",
        "26-v1-errors",
    ],
)
def test_answers_match_the_recordings(ollama: Ollama, recording: str) -> None:
    same(ollama.port, recording, tiny_a=ollama.model)


def test_model_lists_match_the_recordings(own: FakeOllama) -> None:
    """Sizes, details and order (the newest first) match too."""
    own.configure(models={"tiny-a:latest": TINY_A, "tiny-b:latest": TINY_B})
    with own:
        same(own.port, "11-api-tags")
        same(own.port, "24-v1-models")
        own.load("tiny-a", "30m")
        same(own.port, "12-api-ps-after")


def test_keep_alive_is_parsed_as_recorded(fake: FakeOllama) -> None:
    """Numbers are seconds, strings have a unit, null keeps the previous value; the year 2319 means for ever."""
    # In the recording, /api/ps still lists a model that is being unloaded: delay the unload for that request.
    fake.set_fault("unload_after", 0.3)
    fake.load("tiny-a", "30m")
    same(fake.port, "16-generate-keepalive-edge")


def test_failed_loads_match_the_recordings(fake: FakeOllama) -> None:
    same(fake.port, "54-load-fail", slice(0, 6))
    same(fake.port, "54-load-fail", slice(-6, -1), tiny_a="tiny-e")


def test_the_failed_load_of_a_broken_model_evicts_the_working_one(fake: FakeOllama) -> None:
    fake.set_fault("max_loaded", 1)
    same(fake.port, "56-max1-load-a-then-b")


def test_an_unload_waits_for_running_answers(fake: FakeOllama, ollama: Ollama) -> None:
    """The request is answered at once; the model stays until the streamed chat ends, and serves another meanwhile."""
    fake.set_fault("slow_tokens", 0.05)
    fake.set_fault("unload_after", 0.3)
    same(fake.port, "58-unload-while-generating", slice(0, 1))
    with ollama.chat() as streaming:
        lines = streaming.iter_lines()
        next(lines)
        same(fake.port, "58-unload-while-generating", slice(1, 5))
        assert json.loads(list(lines)[-1])["done_reason"] in {"stop", "length"}
    wait_until(lambda: not ollama.ps(), "the model to go")


def test_a_load_waits_for_a_busy_model(fake: FakeOllama, ollama: Ollama) -> None:
    fake.set_fault("max_loaded", 1)
    fake.set_fault("slow_tokens", 0.03)
    same(fake.port, "57-max1-busy-a-request-b", slice(0, 1))
    with ollama.chat() as streaming:
        same(fake.port, "57-max1-busy-a-request-b", slice(1, 3))
        assert b'"done":true' in streaming.content


def test_the_idle_model_with_the_shortest_keep_alive_is_evicted(fake: FakeOllama) -> None:
    fake.set_fault("max_loaded", 2)
    fake.load("tiny-a", "1m")
    fake.load("half", "30m")
    fake.load("tiny-b", "5m")
    assert set(fake.ps()) == {"half:latest", "tiny-b:latest"}


def test_pull_events_match_the_recordings(own: FakeOllama) -> None:
    """Each layer is reported with its size, layers already present only by name; errors are lines of a 200 response."""
    own.configure(bytes_per_second=200_000_000)
    with FakeRegistry({"tiny-b:latest": TINY_B}) as registry, own:
        for recording in ("45-api-pull-ndjson", "45-api-pull-ndjson-uptodate", "45-api-pull-nostream"):
            same(own.port, recording, registry=registry.host)
        assert own.tags()[0] == f"{registry.host}/library/tiny-b:latest"
        same(own.port, "46-api-pull-errors", registry=registry.host)
        assert own.tags() == ["tiny-a:latest"]


def test_only_local_hosts_and_origins_are_accepted(ollama: Ollama) -> None:
    def asked(**headers: str) -> int:
        return ollama.http.get(f"{ollama.url}/api/version", headers=headers, timeout=10).status_code

    assert asked(Host="example.com") == 403
    assert asked(Origin="https://example.com") == 403
    assert asked(Host="localhost:1", Origin="http://localhost:5000") == 200


def test_other_options_reload_the_model(ollama: Ollama) -> None:
    """A /v1 request can't set options, so it reloads the model with the default ones."""

    def context() -> int:
        return int(ollama.ps()[0]["context_length"])

    ollama.post("/api/generate", model=ollama.model, options={"num_ctx": 512})
    assert context() == 512
    ollama.post("/api/generate", model=ollama.model, options={"num_ctx": 256})
    assert context() == 256
    ollama.post("/v1/chat/completions", model=ollama.model, messages=HELLO, max_tokens=1)
    assert context() > 512


def test_a_derived_model_is_loaded_with_its_parameters(ollama: Ollama) -> None:
    with ollama.post("/api/create", model="derived", **{"from": ollama.model}, parameters={"num_ctx": 512}) as answer:
        assert json.loads(answer.text.splitlines()[-1]) == {"status": "success"}
    ollama.post("/api/generate", model="derived", keep_alive=1)
    assert [(model["name"], model["context_length"]) for model in ollama.ps()] == [("derived:latest", 512)]
    assert "sha256-" in ollama.post("/api/show", model="derived").json()["modelfile"]
    gone = ollama.http.delete(f"{ollama.url}/api/delete", json={"model": "derived"}, timeout=10)
    assert gone.status_code == 200
    assert [model["name"] for model in ollama.ps()] == ["derived:latest"], "a delete doesn't unload"


def test_a_stream_ends_with_usage_when_requested(ollama: Ollama) -> None:
    answer = ollama.post(
        "/v1/chat/completions",
        model=ollama.model,
        messages=HELLO,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    *_, usage, done = [line for line in answer.text.splitlines() if line]
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 3
    assert done == "data: [DONE]"


def test_the_command_prints_its_version_and_tables(ollama: Ollama) -> None:
    assert b"ollama version is " in ollama.command("--version").stdout
    assert ollama.command("ps").stdout.split() == b"NAME ID SIZE PROCESSOR CONTEXT UNTIL".split()
    ollama.post("/api/generate", model=ollama.model, keep_alive="30m")
    assert re.search(rb"100% [CG]PU  +\d+  +29 minutes from now", ollama.command("ps").stdout)
    assert ollama.model.encode() in ollama.command("list").stdout


@pytest.mark.parametrize(
    ("name", "recording"), [("nosuch-model-at-all", "pull-unknown-name"), ("bad name!!", "pull-bad-name")]
)
def test_a_refused_pull_prints_the_recorded_error(ollama: Ollama, name: str, recording: str) -> None:
    pulled = ollama.command("pull", name)
    assert (pulled.returncode, pulled.stdout) == (1, b"")
    assert pulled.stderr == (FOLDER / f"{recording}.bin").read_bytes()


def test_a_pull_without_a_server_prints_the_recorded_error(ollama: Ollama) -> None:
    environment = os.environ | {"OLLAMA_HOST": f"127.0.0.1:{free_port()}"}
    pulled = subprocess.run([ollama.binary, "pull", "tiny-a"], env=environment, capture_output=True, timeout=30)
    assert pulled.returncode == 1
    assert pulled.stderr == (FOLDER / "pull-no-server.bin").read_bytes()


def test_a_server_whose_port_is_taken_exits_with_an_error(ollama: Ollama) -> None:
    ended = ollama.command("serve")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr.decode() == f"Error: listen tcp 127.0.0.1:{ollama.port}: bind: address already in use\n"


def test_a_pull_draws_the_recorded_frames(own: FakeOllama) -> None:
    """Only numbers may differ: escape codes, 18-cell bars, aligned sizes and the speed after a second are the same."""
    own.configure(registry={"tiny-b:latest": TINY_B}, bytes_per_second=30_000_000, blob_seconds=0.25)
    with own:
        drawn = pull(own, "tiny-b")
    assert (drawn.returncode, drawn.stdout) == (0, b"")
    # Timing decides which rows a frame combines, but not how they are drawn.
    recorded, now = (pictures(bytes_) for bytes_ in ((FOLDER / "pull-piped-slow.bin").read_bytes(), drawn.stderr))
    in_order = iter(recorded)
    assert all(picture in in_order for picture in now)
    assert (now[0], now[-1]) == (recorded[0], recorded[-1])
    assert any("SPEED ETA" in picture for picture in now)
    assert any("DONE" in picture for picture in now[:-1])


def pictures(drawn: bytes) -> list[str]:
    """The frames without spinners and cursor movements (each frame moves up over the previous one, as is checked)."""
    found: list[str] = []
    rows = 1
    for frame in frames(drawn):
        assert frame.count("\x1b[A") == rows - 1
        rows = frame.removesuffix("\n").count("\n") + 1
        still = frame.replace("\x1b[A", "")
        if "⠋" not in frame and still not in found[-1:]:
            found.append(still)
    return found


def pull(fake: FakeOllama, name: str) -> subprocess.CompletedProcess[bytes]:
    return Ollama(fake.port, fake.binary, fake.environment, name).command("pull", name)


def start_pull(fake: FakeOllama, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [fake.binary, "pull", name], env=os.environ | fake.environment, stderr=subprocess.PIPE, start_new_session=True
    )


def test_an_interrupted_pull_dies_by_the_signal_and_resumes_later(own: FakeOllama) -> None:
    own.configure(bytes_per_second=400_000_000)
    own.set_fault("pull_stuck_at", 40)
    with own:
        with start_pull(own, "big") as puller:
            assert puller.stderr is not None
            seen = b""
            while b" 40% " not in seen:
                seen += os.read(puller.stderr.fileno(), 4096)
            puller.send_signal(signal.SIGINT)
            assert puller.wait(10) == -signal.SIGINT
        wait_until(lambda: own.pulled_bytes("big") > 99_000_000, "the parts to be written")
        own.clear_faults()
        pulled = pull(own, "big")
        assert frames(pulled.stderr)[-1].endswith("success \x1b[K\x1b[?25h\x1b[?2026l\n")
        assert re.findall(rb"(\d+)%", pulled.stderr)[0] >= b"40", "it begins where it was"
        assert own.tags() == ["big:latest", "tiny-a:latest"]


def test_a_server_crash_during_a_pull_ends_the_command_without_an_error(own: FakeOllama) -> None:
    """The command exits with 0 but prints no `success`; unfinished parts of 100 MB are lost."""
    own.configure(bytes_per_second=200_000_000)
    own.set_fault("pull_kill_server_at", 60)
    own.start()
    pulled = pull(own, "big")
    assert pulled.returncode == 0
    assert b"success" not in pulled.stderr
    assert frames(pulled.stderr)[-1] in [
        frame.replace(" SPEED ETA", "") for frame in frames((FOLDER / "pull-server-ended.bin").read_bytes())
    ]
    assert 49_000_000 < own.pulled_bytes("big") <= 50_000_000, "the last, short part alone was finished"


def test_closing_the_connection_stops_the_transfer_unless_another_client_waits(own: FakeOllama) -> None:
    own.configure(bytes_per_second=100_000_000)
    with own:
        first = own.http.post(f"{own.url}/api/pull", json={"model": "big"}, stream=True, timeout=10)
        with requests.Session() as other:
            other.trust_env = False
            second = other.post(f"{own.url}/api/pull", json={"model": "big"}, stream=True, timeout=10)
            lines = second.iter_lines()
            for line in lines:
                if json.loads(line).get("completed", 0) > 20_000_000:
                    break
            first.close()
            before = json.loads(next(lines))["completed"]
            assert [json.loads(next(lines))["completed"] for _ in range(5)][-1] > before
            assert own.pulled_bytes("big") < 50_000_000, "parts are written when they or the transfer end"
            second.close()
        wait_until(lambda: 20_000_000 < own.pulled_bytes("big") < 250_000_000, "the transfer to stop")
        stopped = own.pulled_bytes("big")
        own.stop()
        own.start()
        assert own.pulled_bytes("big") == stopped, "a restart keeps what is there"


def last_event(fake: FakeOllama, name: str = "big") -> dict[str, Any]:
    answer = fake.http.post(f"{fake.url}/api/pull", json={"model": name}, timeout=30)
    assert answer.status_code == 200
    event: dict[str, Any] = json.loads(answer.text.splitlines()[-1])
    return event


def test_pulls_fail_as_configured(own: FakeOllama) -> None:
    own.configure(bytes_per_second=1_000_000_000)
    with own:
        own.set_fault("pull_error_at", {"percent": 30, "error": "max retries exceeded: EOF"})
        assert last_event(own) == {"error": "max retries exceeded: EOF"}
        own.clear_faults()
        own.set_fault("disk_full_at", 50)
        assert re.fullmatch(r"write /.*/sha256-[0-9a-f]{64}-partial: no space left on device", last_event(own)["error"])
        own.clear_faults()
        own.set_fault("registry_down")
        assert "connect: connection refused" in last_event(own)["error"]
        own.clear_faults()
        own.set_fault("digest_mismatch")
        assert last_event(own)["error"].startswith("digest mismatch, file must be downloaded again: want sha256:")
        own.clear_faults()
        assert last_event(own) == {"status": "success"}


def test_an_update_replaces_the_weights(own: FakeOllama) -> None:
    """A model's digest is the hash of its manifest's bytes, the same at the registry and on the server."""
    with FakeRegistry({"tiny-b": TINY_B}) as registry, own:
        own.configure(registry_url=registry.url, bytes_per_second=1_000_000_000)

        def pulled() -> tuple[list[str], str]:
            events = own.http.post(f"{own.url}/api/pull", json={"model": "tiny-b"}, timeout=30).text.splitlines()
            manifest = own.http.get(f"{registry.url}/v2/library/tiny-b/manifests/latest", timeout=10).content
            model = own.http.get(f"{own.url}/api/tags", timeout=10).json()["models"][0]
            assert model["digest"] == hashlib.sha256(manifest).hexdigest()
            return [json.loads(line)["status"] for line in events], model["digest"]

        _, before = pulled()
        registry.publish("tiny-b", **TINY_B, version=2)
        told, after = pulled()
        assert told[-3:] == ["writing manifest", "removing unused layers", "success"]
        assert after != before


def test_a_loaded_model_is_a_process_that_holds_its_memory(own: FakeOllama) -> None:
    """The process grows during the load; the model is listed only once it is ready; the log shows the progress."""
    own.set_fault("slow_load", 0.6)
    own.start(OLLAMA_DEBUG="1")
    loading = threading.Thread(target=own.load, args=("tiny-a",), daemon=True)
    loading.start()
    sizes: list[int] = []
    while loading.is_alive():
        names = own.ps()
        sizes += [runner.memory_info().rss for runner in own.runners()]
        assert not names or "llama runner started in" in own.output()
        loading.join(0.03)
    assert sizes[0] < sizes[-1] - 10_000_000
    assert len(set(sizes)) > 3, "it grows step by step"
    assert 'level=DEBUG source=server.go:1438 msg="model load progress 0.50"' in own.output()
    assert re.search(r'level=INFO source=server.go:1432 msg="llama runner started in \d\.\d\d seconds"', own.output())
    own.kill()
    assert [runner.is_running() for runner in own.runners()] == [True], "a killed server orphans its runner"
    own.start()
    assert (own.ps(), own.tags()) == ([], ["tiny-a:latest"])
    own.load("tiny-a")
    assert len(own.runners()) == 2
    assert own.stop() == 0
    assert len(own.runners()) == 1, "a server that is asked to end takes its own along"


def test_a_client_that_disconnects_aborts_the_load(own: FakeOllama) -> None:
    own.set_fault("stuck_load")
    with own:
        with pytest.raises(requests.ReadTimeout):
            own.http.post(f"{own.url}/api/generate", json={"model": "tiny-a"}, timeout=0.3)
        wait_until(lambda: not own.runners(), "the runner to end")
        assert "client connection closed before server finished loading, aborting load" in own.output()
        assert own.ps() == []


def test_a_crash_during_a_load_ends_the_server(own: FakeOllama) -> None:
    own.set_fault("crash_at_load")
    own.start()
    with pytest.raises(requests.ConnectionError):
        own.load("tiny-a")
    assert own.process is not None
    assert own.process.wait(10) == -signal.SIGKILL


def test_starts_fail_as_configured(own: FakeOllama) -> None:
    server = Ollama(own.port, own.binary, own.environment, "tiny-a")
    own.set_fault("crash_on_start", "Error: the fake was told to fail")
    ended = server.command("serve")
    assert (ended.returncode, ended.stderr) == (2, b"Error: the fake was told to fail\n")
    own.clear_faults()
    own.set_fault("port_in_use")
    ended = server.command("serve")
    assert (ended.returncode, b"bind: address already in use" in ended.stderr) == (1, True)


def test_answers_and_unloads_fail_as_configured(own: FakeOllama) -> None:
    own.start()
    ollama = Ollama(own.port, own.binary, own.environment, "tiny-a", own.http)
    own.set_fault("stream_error_at", 2)
    *said, last = [json.loads(line) for line in ollama.chat().iter_lines()]
    assert (len(said), list(last)) == (2, ["error"])
    answer = ollama.post("/v1/chat/completions", model="tiny-a", messages=HELLO, stream=True)
    assert (answer.status_code, "[DONE]" in answer.text) == (200, False)
    assert '"error":{"message":' in answer.text.splitlines()[-2]
    own.clear_faults()
    own.set_fault("never_unload")
    ollama.post("/api/generate", model="tiny-a", keep_alive=0)
    own.set_fault("slow_ps", 0.2)
    assert own.ps() == ["tiny-a:latest"]
    own.clear_faults()
    wait_until(lambda: not own.ps(), "the model to go")
    own.load("tiny-a", -1)
    own.set_fault("evict_after", 0)
    wait_until(lambda: not own.ps(), "the model to be evicted")
    own.set_fault("hang")
    with pytest.raises(requests.ReadTimeout):
        own.http.get(f"{own.url}/api/version", timeout=0.2)
    own.clear_faults()
    own.set_fault("ignore_sigterm")
    assert own.process is not None
    own.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        own.process.wait(0.2)
    assert own.tags() == ["tiny-a:latest"]
    own.clear_faults()
    assert own.stop() == 0


def test_cloud_embedding_and_partly_offloaded_models_are_listed(fake: FakeOllama, ollama: Ollama) -> None:
    """A cloud model names its remote host, an embedding loads its model, and /api/ps shows the share on the GPU."""
    tags = {model["name"]: model for model in fake.http.get(f"{fake.url}/api/tags", timeout=10).json()["models"]}
    assert tags["cloudy:cloud"]["remote_model"] == "cloudy"
    assert tags["cloudy:cloud"]["remote_host"] == "https://ollama.com:443"
    assert "remote_host" not in tags["tiny-a:latest"]
    vectors = ollama.post("/api/embed", model="tiny-e", input=["a", "b"]).json()["embeddings"]
    assert [len(vector) for vector in vectors] == [256, 256]
    fake.load("half")
    told = {model["name"]: (model["size"], model["size_vram"]) for model in ollama.ps()}
    assert told["half:latest"] == (1000, 600)
    assert "tiny-e:latest" in told
    assert b"40%/60% CPU/GPU" in ollama.command("ps").stdout


def test_the_fake_records_its_requests(fake: FakeOllama) -> None:
    fake.load("tiny-a", "7m")
    assert fake.requests("/api/generate")[-1] == {
        "method": "POST",
        "path": "/api/generate",
        "body": {"model": "tiny-a", "keep_alive": "7m"},
    }
