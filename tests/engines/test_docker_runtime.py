"""The container runtime on a real Docker engine; its containers run the fake vLLM."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cancellation import Cancelled, CancelToken
from services.engines import out_of_memory
from services.engines.containers.docker_pull import Layers
from services.engines.containers.docker_runtime import SLOW_FACTOR, DockerRuntime
from services.engines.containers.port import (
    MANAGED_LABEL,
    MODEL_LABEL,
    SPEC_LABEL,
    ContainerError,
    ContainerGone,
    ContainerSpec,
    ImageMissing,
    Mount,
    NameTaken,
    NoGpuRuntime,
    NotOurs,
    RuntimeDown,
    RuntimeForbidden,
    RuntimeHangs,
)
from tests.support.console import NO_OLLAMA, ROOT, TIMEOUT, free_port, wait_until
from tests.support.docker import FAKE_VLLM_IMAGE, TRANSCRIPTS, DockerEngine
from tests.support.image_registry import image_registry
from tests.support.stopwatch import Stopwatch

LIMIT = 0.2
"""Seconds that a call may take where Docker hangs."""
NOBODY = 65_534
LABELS = {MODEL_LABEL: "tiny"}


def spec(name: str = "tiny", *arguments: str, image: str = FAKE_VLLM_IMAGE, **faults: object) -> ContainerSpec:
    return ContainerSpec(
        name=name,
        image=image,
        port=8000,
        command=("tiny/model", *arguments),
        environment={"FAKE_VLLM": json.dumps({"load_seconds": 0, **faults})},
        labels=LABELS,
    )


@pytest.fixture
def runtime(docker: DockerEngine) -> Iterator[DockerRuntime]:
    runtime = DockerRuntime(docker.host)
    yield runtime
    runtime.close()
    docker.remove_containers()


@pytest.fixture
def hasty(docker: DockerEngine) -> Iterator[DockerRuntime]:
    """A connected runtime with short time limits."""
    runtime = DockerRuntime(docker.host, timeout=LIMIT)
    wait_until(lambda: runtime.available().running, "Docker to answer in a hurry")
    yield runtime
    runtime.close()


def run(runtime: DockerRuntime, order: ContainerSpec) -> str:
    container_id = runtime.create(order)
    runtime.start(container_id)
    return container_id


def answers(runtime: DockerRuntime, container_id: str) -> bool:
    port = runtime.inspect(container_id).host_port
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def test_a_container_is_created_started_stopped_and_removed(runtime: DockerRuntime):
    """Each state is reported: created, running with a port on loopback, exited, and gone after its removal."""
    order = spec()
    container_id = runtime.create(order)
    made = runtime.inspect(container_id)
    assert (made.state, made.host_port, made.exit_code, made.started_at, made.pid) == (
        "created",
        None,
        None,
        None,
        None,
    )
    assert (made.managed, made.model, made.spec_hash) == (True, "tiny", order.spec_hash)

    runtime.start(container_id)
    running = runtime.inspect(container_id)
    assert (running.state, running.exit_code) == ("running", None)
    assert running.started_at == pytest.approx(time.time(), abs=30)
    wait_until(lambda: answers(runtime, container_id), "the fake to answer")
    pids = runtime.pids(container_id)
    assert running.pid in pids
    assert len(pids) == 2, "an init and the fake"

    runtime.stop(container_id, grace=10)
    ended = runtime.inspect(container_id)
    assert (ended.state, ended.exit_code, ended.host_port, ended.oom_killed) == ("exited", 0, None, False)
    assert runtime.pids(container_id) == ()
    assert "shutdown triggered" in runtime.logs_tail(container_id, 1)

    runtime.remove(container_id)
    assert runtime.by_name("tiny") is None
    assert runtime.find({}) == []


def test_docker_receives_the_whole_spec_and_no_restart_policy(
    docker: DockerEngine, runtime: DockerRuntime, tmp_path: Path
):
    order = ContainerSpec(
        name="full",
        image=FAKE_VLLM_IMAGE,
        port=9000,
        command=("m", "--port", "9000"),
        environment={"HF_TOKEN": "hf_x"},
        labels={MODEL_LABEL: "m"},
        mounts=(
            Mount(str(tmp_path), "/root/.cache/huggingface", read_only=True),
            Mount("compiled", "/root/.cache/vllm"),
        ),
        gpus=("GPU-1", "GPU-2"),
        shm_bytes=1 << 30,
    )
    told = docker.client.inspect_container(runtime.create(order))
    host, config = told["HostConfig"], told["Config"]
    assert config["Labels"] == {MODEL_LABEL: "m", MANAGED_LABEL: "1", SPEC_LABEL: order.spec_hash}
    assert config["Cmd"] == ["m", "--port", "9000"]
    assert "HF_TOKEN=hf_x" in config["Env"]
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["Init"] is True
    assert host["PortBindings"] == {"9000/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["GPU-1", "GPU-2"]
    assert (host["ShmSize"], host["IpcMode"]) == (1 << 30, "private")
    mounts = {m["Destination"]: (m["Type"], m.get("Name") or m["Source"], m["RW"]) for m in told["Mounts"]}
    assert mounts == {
        "/root/.cache/huggingface": ("bind", str(tmp_path), False),
        "/root/.cache/vllm": ("volume", "compiled", True),
    }
    shared = runtime.create(ContainerSpec("shared", FAKE_VLLM_IMAGE, 8000, host_ipc=True))
    host = docker.client.inspect_container(shared)["HostConfig"]
    assert (host["IpcMode"], host["DeviceRequests"]) == ("host", None)


def test_progress_bars_arrive_while_they_are_drawn(runtime: DockerRuntime):
    """The states of a bar have no newline, yet each arrives before the next is written; joined, they are the log."""
    container_id = runtime.create(spec(load_seconds=1.5))
    pieces = []
    with closing(runtime.attach(container_id)) as output:
        runtime.start(container_id)
        for piece in output:
            pieces.append(piece)
            if b"startup complete" in piece:
                break
    assert b"\rLoading safetensors checkpoint shards:  50% Completed | 3/6 [00:00<00:00, 23.40it/s]" in pieces
    recorded = (TRANSCRIPTS / "ok-eager.log").read_text().replace("models/tiny-b", "tiny/model")
    assert recorded.split()[: len(b"".join(pieces).split())] == b"".join(pieces).decode().split()


def test_an_attached_output_ends_with_its_container(runtime: DockerRuntime):
    container_id = runtime.create(spec(log="missing-model"))
    with closing(runtime.attach(container_id)) as output:
        runtime.start(container_id)
        written = b"".join(output)
    assert b"HFValidationError" in written
    assert runtime.wait(container_id, 10) == 1


def test_closing_a_stream_ends_the_thread_that_reads_it(runtime: DockerRuntime):
    container_id = runtime.create(spec(hang_at="starting"))
    stream = runtime.attach(container_id)
    runtime.start(container_id)
    seen: list[object] = []
    reader = threading.Thread(target=lambda: seen.extend(stream), daemon=True)
    reader.start()
    wait_until(lambda: bool(seen) or "version" in runtime.logs_tail(container_id, 10), "the fake to hang")
    stream.close()
    reader.join(TIMEOUT)
    assert not reader.is_alive()
    assert list(stream) == []
    stream.close()


def test_an_unread_stream_closes_at_once(runtime: DockerRuntime):
    """This happens when a load is cancelled before its container has started."""
    container_id = runtime.create(spec())
    stream = runtime.attach(container_id)
    stream.close()
    assert list(stream) == []


def test_another_runtime_finds_the_containers_by_their_labels(docker: DockerEngine, runtime: DockerRuntime):
    """The app's next run relies on it: it finds the model's containers, but no foreign one with the same label."""
    order = spec()
    container_id = run(runtime, order)
    runtime.create(ContainerSpec("other", FAKE_VLLM_IMAGE, 8000, labels={MODEL_LABEL: "other"}))
    docker.run_foreign("foreign", ["m"], labels=LABELS)
    with closing(DockerRuntime(docker.host)) as another:
        (found,) = another.find(LABELS)
        assert (found.id, found.name, found.state, found.spec_hash) == (
            container_id,
            "tiny",
            "running",
            order.spec_hash,
        )
        assert {container.name for container in another.find({})} == {"tiny", "other"}
        assert another.by_name("tiny") == found
        assert another.by_name(container_id[:12]) is None, "the beginning of an id is no name"


@pytest.mark.parametrize(
    ("order", "code"),
    [
        (spec(exit_ready=0), 0),
        (spec(log="corrupt-shard"), 1),
        (spec(out_of_memory=True), 1),
        (spec("tiny", "--no-such-flag"), 2),
    ],
    ids=["after it was ready", "damaged file", "out of GPU memory", "bad argument"],
)
def test_the_exit_code_of_the_container_is_reported(runtime: DockerRuntime, order: ContainerSpec, code: int):
    container_id = run(runtime, order)
    assert runtime.wait(container_id, 20) == code
    assert runtime.inspect(container_id).exit_code == code


def test_waiting_for_a_running_container_times_out(runtime: DockerRuntime):
    container_id = run(runtime, spec())
    watch = Stopwatch()
    assert runtime.wait(container_id, 0.2) is None
    assert watch.waited < 5


def test_a_container_that_ignores_sigterm_is_killed_after_the_grace_period(runtime: DockerRuntime):
    container_id = run(runtime, spec(ignore_sigterm=True))
    wait_until(lambda: answers(runtime, container_id), "the fake to answer")
    runtime.stop(container_id, grace=0.5)
    assert runtime.inspect(container_id).exit_code == 137


def test_an_out_of_memory_kill_is_reported(docker: DockerEngine, runtime: DockerRuntime):
    """The kernel's out-of-memory killer is triggered by a memory limit, which Switchyard itself never sets."""
    kills = out_of_memory.oom_kills()
    environment = {"FAKE_VLLM": json.dumps({"load_seconds": 0, "hold_mb": 300})}
    greedy = docker.run_foreign(
        "greedy", ["m"], labels={MANAGED_LABEL: "1"}, environment=environment, mem_limit="64m", memswap_limit="64m"
    )
    assert runtime.wait(greedy, 20) == 137
    assert runtime.inspect(greedy).oom_killed
    assert out_of_memory.killed_since(kills), "which is how a kill that Docker says nothing of is told"


def test_the_kernel_kills_a_container_before_the_console_when_memory_runs_out(runtime: DockerRuntime):
    """The container's process has the engines' OOM score, which is higher than the console's."""
    container = runtime.inspect(run(runtime, spec()))
    score = int(Path(f"/proc/{container.pid}/oom_score_adj").read_text())
    assert score == out_of_memory.engine_score() > int(Path("/proc/self/oom_score_adj").read_text())


def test_a_foreign_container_with_the_same_name_is_left_alone(docker: DockerEngine, runtime: DockerRuntime):
    """The foreign container is neither replaced nor stopped nor removed, and the error says what to do."""
    foreign = docker.run_foreign("tiny", ["m"])
    with pytest.raises(NameTaken, match="docker rename tiny") as caught:
        runtime.create(spec())
    assert caught.value.holder is not None
    assert (caught.value.holder.id, caught.value.holder.managed) == (foreign, False)
    for act in (lambda: runtime.stop(foreign, 1), lambda: runtime.remove(foreign)):
        with pytest.raises(NotOurs, match="did not make the container tiny"):
            act()
    assert runtime.inspect(foreign).state == "running"


def test_creating_a_container_twice_names_the_existing_one(runtime: DockerRuntime):
    first = runtime.create(spec())
    with pytest.raises(NameTaken) as caught:
        runtime.create(spec())
    assert caught.value.holder is not None
    assert (caught.value.holder.id, caught.value.holder.managed) == (first, True)


def test_a_container_removed_by_another_program_is_reported_as_gone(docker: DockerEngine, runtime: DockerRuntime):
    """Every query raises ContainerGone; `stop` and `remove` succeed."""
    container_id = run(runtime, spec())
    docker.client.remove_container(container_id, force=True)
    calls: list[Callable[[], object]] = [
        lambda: runtime.inspect(container_id),
        lambda: runtime.start(container_id),
        lambda: runtime.attach(container_id),
        lambda: runtime.wait(container_id, 1),
        lambda: runtime.logs_tail(container_id, 5),
        lambda: runtime.pids(container_id),
    ]
    for call in calls:
        with pytest.raises(ContainerGone, match="something else removed it"):
            call()
    runtime.stop(container_id, 1)
    runtime.remove(container_id)


def test_waiting_ends_when_the_container_is_removed(docker: DockerEngine, runtime: DockerRuntime):
    container_id = run(runtime, spec())
    remover = threading.Timer(0.2, docker.client.remove_container, (container_id,), {"force": True})
    remover.start()
    assert runtime.wait(container_id, 20) == 137
    remover.join()


CALLS: dict[str, Callable[[DockerRuntime], object]] = {
    "create": lambda r: r.create(spec("second")),
    "attach": lambda r: r.attach("tiny"),
    "logs_tail": lambda r: r.logs_tail("tiny", 5),
    "wait": lambda r: r.wait("tiny", 0),
    "inspect": lambda r: r.inspect("tiny"),
    "by_name": lambda r: r.by_name("tiny"),
    "find": lambda r: r.find(LABELS),
    "pids": lambda r: r.pids("tiny"),
    "image_present": lambda r: r.image_present(FAKE_VLLM_IMAGE),
    "start": lambda r: r.start("tiny"),
    "stop": lambda r: r.stop("tiny", 0),
    "remove": lambda r: r.remove("tiny"),
}


SLOW = ("start", "stop", "remove")
"""Calls that a healthy daemon may take longer for, so that they have a longer limit."""


def test_a_hanging_daemon_blocks_no_call_longer_than_its_limit(
    docker: DockerEngine, runtime: DockerRuntime, hasty: DockerRuntime
):
    """It holds for existing and new connections; when the daemon responds again, the runtime works again."""
    container_id = run(runtime, spec())
    with docker.hanging():
        for name, call in CALLS.items():
            watch = Stopwatch()
            with pytest.raises(RuntimeHangs, match="docker info"):
                call(hasty)
            assert watch.waited < (SLOW_FACTOR * LIMIT if name in SLOW else LIMIT) + 0.5, name
        with closing(DockerRuntime(docker.host, timeout=LIMIT)) as fresh:
            status = fresh.available()
    assert (status.running, status.version) == (False, None)
    assert "did not say how it is within" in str(status.error)
    wait_until(lambda: hasty.available().running, "the runtime to be back")
    assert runtime.inspect(container_id).state == "running"


def test_a_stopped_daemon_is_reported_and_used_again_after_its_restart(docker: DockerEngine, runtime: DockerRuntime):
    """An open stream ends when the daemon stops."""
    container_id = runtime.create(spec())
    output = runtime.attach(container_id)
    runtime.start(container_id)
    wait_until(lambda: answers(runtime, container_id), "the fake to answer")
    with closing(output), docker.stopped():
        assert isinstance(b"".join(output), bytes)
        for name, call in CALLS.items():
            with pytest.raises(RuntimeDown, match="systemctl start docker"):
                call(runtime)
            assert not runtime.available().running, name
    status = runtime.available()
    assert (status.running, status.error, status.nvidia) == (True, None, False)
    assert (status.version or "").count(".") == 2
    assert runtime.inspect(container_id).state == "exited"


def test_the_error_says_that_docker_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = DockerRuntime(f"unix://{tmp_path}/none.sock").available().error
    assert error is not None
    assert "not installed" in error
    assert "docs.docker.com" in error


def test_a_user_without_access_to_docker_is_told_which_group_to_join(docker: DockerEngine):
    """A child process runs as a user without rights on the socket."""
    assert DockerRuntime(docker.host).available().running, "all that is needed is imported before rights are given up"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            DockerRuntime(docker.host).image_present("any")
        except RuntimeForbidden as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        assert b"usermod -aG docker nobody" in said.read()


def test_docker_host_is_honoured_and_proxies_are_not(docker: DockerEngine, monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("DOCKER_HOST", docker.host)
    with closing(DockerRuntime()) as runtime:
        assert runtime.available().running
    with HTTPServer(("127.0.0.1", 0), _DaemonOnTcp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
        with closing(DockerRuntime()) as runtime:
            status = runtime.available()
        server.shutdown()
    assert (status.version, status.nvidia) == ("29.1.0", True)
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")
    assert "does not answer at tcp://" in str(DockerRuntime().available().error)
    monkeypatch.setenv("DOCKER_HOST", "ssh://elsewhere")
    assert "unix:// or tcp://" in str(DockerRuntime().available().error)


class _DaemonOnTcp(BaseHTTPRequestHandler):
    """A fake daemon that answers like a later Docker with NVIDIA's runtime."""

    def do_GET(self) -> None:
        newest = self.path == "/v1.52/info"
        body = {"ServerVersion": "29.1.0", "Runtimes": {"runc": {}, "nvidia": {}}} if newest else {"ApiVersion": "1.52"}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.mark.skipif(shutil.which("nvidia-container-runtime-hook") is not None, reason="this machine can give GPUs")
def test_a_gpu_request_without_nvidia_s_runtime_says_what_to_install(runtime: DockerRuntime):
    container_id = runtime.create(ContainerSpec("tiny", FAKE_VLLM_IMAGE, 8000, ("m",), gpus=("GPU-0",)))
    with pytest.raises(NoGpuRuntime, match="nvidia-container-toolkit"):
        runtime.start(container_id)
    assert runtime.inspect(container_id).state == "created"


def test_missing_and_present_images_are_distinguished(runtime: DockerRuntime):
    assert runtime.image_present(FAKE_VLLM_IMAGE)
    assert not runtime.image_present("vllm/vllm-openai:never")
    with pytest.raises(ImageMissing, match="docker pull vllm/vllm-openai:never"):
        runtime.create(spec(image="vllm/vllm-openai:never"))


def test_an_error_includes_docker_s_message(runtime: DockerRuntime):
    order = ContainerSpec("tiny", FAKE_VLLM_IMAGE, 8000, mounts=(Mount("/nonexistent/folder", "/x"),))
    with pytest.raises(ContainerError, match=r"could not make the container tiny: .*/nonexistent/folder"):
        runtime.create(order)


def test_a_pull_reports_its_progress(docker: DockerEngine, runtime: DockerRuntime):
    """The bytes never decrease; the total is unknown until all sizes are; both end at the size of the layers."""
    seen: list[tuple[int, int | None]] = []
    with image_registry() as registry:
        runtime.pull(registry.image, lambda done, total: seen.append((done, total)), CancelToken())
        assert runtime.image_present(registry.image)
        docker.client.remove_image(registry.image)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0] == (0, None)
    assert seen[-1] == (registry.size, registry.size)


def test_a_pull_ends_at_once_when_it_is_cancelled(runtime: DockerRuntime):
    token = CancelToken()
    with image_registry() as registry:
        registry.flow.clear()
        threading.Thread(target=lambda: (registry.begun.wait(20), token.cancel()), daemon=True).start()
        with pytest.raises(Cancelled):
            runtime.pull(registry.image, lambda *_: None, token)
        assert not runtime.image_present(registry.image)
    wait_until(lambda: not any(t.name.startswith("pull-") for t in threading.enumerate()), "nobody to read on")


def test_a_pull_of_an_image_that_no_registry_has_fails_with_the_reason(runtime: DockerRuntime):
    with image_registry() as registry, pytest.raises(ImageMissing, match="tiny:2 to pull"):
        runtime.pull(registry.image.replace(":1", ":2"), lambda *_: None, CancelToken())
    with pytest.raises(ContainerError, match="network"):
        runtime.pull(f"127.0.0.1:{free_port()}/tiny:1", lambda *_: None, CancelToken())


def test_an_invalid_image_name_is_refused(runtime: DockerRuntime):
    with pytest.raises(ContainerError, match=r"-bad\.example/x can't be pulled"):
        runtime.pull("-bad.example/x", lambda *_: None, CancelToken())


def test_a_pull_fails_when_the_daemon_dies(docker: DockerEngine, runtime: DockerRuntime):
    """A partial image is not taken for a complete one."""
    with image_registry() as registry:
        registry.flow.clear()
        stopper = threading.Thread(target=lambda: (registry.begun.wait(20), docker.kill()), daemon=True)
        stopper.start()
        try:
            with pytest.raises(RuntimeDown, match="went away"):
                runtime.pull(registry.image, lambda *_: None, CancelToken())
        finally:
            stopper.join()
            docker.start()
    assert not runtime.image_present(registry.image)


def test_under_gevent_waiting_for_docker_does_not_block_other_greenlets(docker: DockerEngine):
    """A container's life cycle, closing a stream while it is read, and a hanging daemon don't block the event loop."""
    script = ROOT / "tests" / "engines" / "docker_under_gevent.py"
    done = subprocess.run(
        [sys.executable, str(script), docker.host, FAKE_VLLM_IMAGE, str(docker.pid)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_app_starts_without_importing_docker_s_client(tmp_path: Path):
    """The import takes a tenth of the start-up time, and an app without vLLM models doesn't need it."""
    code = (
        "import sys, app\n"
        "made = app.create_app(state_dir=sys.argv[1], models_dir=sys.argv[1], ollama_base_url=sys.argv[2])\n"
        "made.extensions['switchyard'].close()\n"
        "print('loaded:', *sorted({'docker', 'requests', 'urllib3'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state"), NO_OLLAMA],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "loaded:", done.stdout + done.stderr


def test_the_spec_s_hash_ignores_only_the_name_and_the_labels():
    """Specs that differ only in name or labels have the same hash; any other difference changes it."""
    base = ContainerSpec("a", "image:1", 8000, ("m",), {"K": "v"}, labels={MODEL_LABEL: "m"}, gpus=("GPU-1",))
    same = ContainerSpec("b", "image:1", 8000, ("m",), {"K": "v"}, labels={MODEL_LABEL: "n"}, gpus=("GPU-1",))
    assert base.spec_hash == same.spec_hash
    others = [
        ContainerSpec("a", "image:2", 8000, ("m",), {"K": "v"}, gpus=("GPU-1",)),
        ContainerSpec("a", "image:1", 8001, ("m",), {"K": "v"}, gpus=("GPU-1",)),
        ContainerSpec("a", "image:1", 8000, ("n",), {"K": "v"}, gpus=("GPU-1",)),
        ContainerSpec("a", "image:1", 8000, ("m",), {"K": "w"}, gpus=("GPU-1",)),
        ContainerSpec("a", "image:1", 8000, ("m",), {"K": "v"}, gpus=("GPU-2",)),
        ContainerSpec("a", "image:1", 8000, ("m",), {"K": "v"}, gpus=("GPU-1",), mounts=(Mount("v", "/v"),)),
        ContainerSpec("a", "image:1", 8000, ("m",), {"K": "v"}, gpus=("GPU-1",), host_ipc=True),
    ]
    assert len({base.spec_hash, *(other.spec_hash for other in others)}) == 1 + len(others)


STATUSES = ("Pulling fs layer", "Waiting", "Downloading", "Verifying Checksum", "Download complete", "Pull complete")
LINES = st.builds(
    lambda key, status, current, total: {
        "id": key,
        "status": status,
        "progressDetail": {"current": current, "total": total} if status == "Downloading" else {},
    },
    st.sampled_from("abc"),
    st.sampled_from(STATUSES),
    st.integers(0, 100),
    st.sampled_from([-1, 0, 50, 100]),
)


@settings(deadline=None)
@given(st.lists(LINES, max_size=40))
def test_the_bytes_of_a_pull_never_decrease_or_exceed_the_total(lines: list[dict[str, object]]):
    layers = Layers()
    done = 0
    for line in lines:
        layers.update(line)
        assert layers.done >= done
        done = layers.done
        assert layers.total is None or done <= layers.total


def test_the_fake_vllm_sleeps_with_the_settings_of_the_real_one(runtime: DockerRuntime):
    """As in vLLM since 0.8.5, the sleep endpoints work with the developer mode and `--enable-sleep-mode`."""
    order = spec("tiny", "--enable-sleep-mode", "--served-model-name", "tiny")
    environment = {**order.environment, "VLLM_SERVER_DEV_MODE": "1"}
    container_id = run(runtime, ContainerSpec("tiny", FAKE_VLLM_IMAGE, 8000, order.command, environment))
    wait_until(lambda: answers(runtime, container_id), "the fake to answer")
    origin = f"http://127.0.0.1:{runtime.inspect(container_id).host_port}"
    with requests.Session() as http:
        assert http.post(f"{origin}/sleep?level=1").status_code == 200
        assert http.get(f"{origin}/is_sleeping").json() == {"is_sleeping": True}
        assert http.post(f"{origin}/wake_up").status_code == 200
        question = {"model": "tiny", "messages": [], "stream": True}
        with closing(http.post(f"{origin}/v1/chat/completions", json=question, stream=True)) as answer:
            assert answer.text.endswith("data: [DONE]\n\n")


def test_ports_are_published_on_one_loopback_address_only(runtime: DockerRuntime):
    container_id = run(runtime, spec())
    wait_until(lambda: answers(runtime, container_id), "the fake to answer")
    port = runtime.inspect(container_id).host_port
    assert port is not None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
