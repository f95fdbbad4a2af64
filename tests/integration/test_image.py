"""The app's Docker image, built here and run as in compose.yaml on the tests' own Docker engine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests

from tests.support.app_image import AppImage, Compose, build
from tests.support.console import NO_OLLAMA, ROOT, Console, wait_until
from tests.support.docker import FAKE_VLLM_IMAGE, DockerEngine
from tests.support.hub import TINY_MODEL, fill_cache
from tests.support.stopwatch import Stopwatch

pytestmark = pytest.mark.timeout(600)  # the first test waits for the build

BASE, GPU, SOCKET = (ROOT / name for name in ("compose.yaml", "compose.gpu.yaml", "compose.docker.yaml"))
DEMO_MODELS = {"switchyard-mini", "switchyard-small"}
USER = "10001:10001"
MEGABYTE = 1_000_000


class ContainerConsole(Console):
    """A console in a container, used like any other."""

    def __init__(self, docker: DockerEngine, image: str, folder: Path) -> None:
        super().__init__(folder)
        self._docker = docker
        self._image = image
        self.id = ""

    def start_by_hand(self, *binds: str, user: str | None = None, **environment: str) -> None:
        """Start it as `docker run --network host` does."""
        client = self._docker.client
        host = client.create_host_config(network_mode="host", binds=list(binds))
        self.id = client.create_container(self._image, user=user, environment=environment, host_config=host)["Id"]
        client.start(self.id)

    @property
    def process_tree(self) -> list[psutil.Process]:
        """All processes in the container, the first one first, with this machine's pids."""
        first = psutil.Process(self.inspect()["State"]["Pid"])
        return [first, *first.children(recursive=True)]

    @property
    def worker(self) -> psutil.Process:
        return next(p for p in self.process_tree if _is_gunicorn(p) and _is_gunicorn(p.parent()))

    @property
    def states(self) -> dict[str, str]:
        """Names and states of the processes in the container."""
        found = {}
        for process in self.process_tree:
            with suppress(psutil.NoSuchProcess):
                found[process.name()] = process.status()
        return found

    def inspect(self) -> dict[str, dict[str, object]]:
        return self._docker.client.inspect_container(self.id)

    def output(self) -> str:
        return self._docker.client.logs(self.id).decode(errors="replace") if self.id else ""

    def run(self, *argv: str, **environment: str) -> tuple[int, str]:
        """Run a command in the container; return its exit code and output."""
        made = self._docker.client.exec_create(self.id, list(argv), environment=environment)
        said = self._docker.client.exec_start(made["Id"]).decode(errors="replace")
        return self._docker.client.exec_inspect(made["Id"])["ExitCode"], said

    def await_ready(self) -> None:
        wait_until(self._ready, "the container to answer")

    def end(self, grace: int = 30) -> int:
        """`docker stop`; return the exit code."""
        self._docker.client.stop(self.id, timeout=grace)
        return int(str(self.inspect()["State"]["ExitCode"]))

    def _ready(self) -> bool:
        found = self.inspect()
        assert found["State"]["Running"], self.output()
        assert not found["RestartCount"], self.output()
        try:
            return self.get("/readyz").status_code == 200
        except requests.ConnectionError:
            return False


def _is_gunicorn(process: psutil.Process | None) -> bool:
    return process is not None and any(part.endswith("/gunicorn") for part in process.cmdline())


@pytest.fixture(scope="module")
def image(docker: DockerEngine) -> AppImage:
    return build(docker.client)


@pytest.fixture
def boxed(docker: DockerEngine, image: AppImage, tmp_path: Path) -> Iterator[ContainerConsole]:
    """A console that isn't started yet; its container is removed at the end."""
    console = ContainerConsole(docker, image.name, tmp_path)
    yield console
    console.http.close()
    docker.remove_containers()


@pytest.fixture
def compose(docker: DockerEngine, boxed: ContainerConsole, tmp_path: Path) -> Iterator[Callable[..., Compose]]:
    """Create a project of compose.yaml and further files, with a health check every second to keep tests short."""
    made: list[Compose] = []
    sooner = tmp_path / "sooner.yaml"
    sooner.write_text("services: {switchyard: {healthcheck: {interval: 1s}}}")

    def make(*files: Path, **environment: str) -> Compose:
        settings = {"SWITCHYARD_PORT": str(boxed.port), "OLLAMA_BASE_URL": NO_OLLAMA, **environment}
        made.append(Compose(docker, tmp_path, [BASE, *files, sooner], settings))
        return made[-1]

    yield make
    for project in made:
        project.close()


def test_the_image_is_small_and_holds_only_the_app(docker, image):
    """At most 250 MB on top of its base; an unprivileged user; no tests, tools, settings, keys or build arguments."""
    added = (image.size - image.base_size) / MEGABYTE
    print(f"the image adds {added:.0f} MB to its base of {image.base_size / MEGABYTE:.0f} MB")
    assert added < 250
    config = docker.client.inspect_image(image.name)["Config"]
    assert config["User"] == USER
    assert "EXPOSE" not in (ROOT / "Dockerfile").read_text().split()
    assert not config.get("ExposedPorts")
    assert not any(entry.startswith("PIP_") for entry in config["Env"])
    assert image.index not in json.dumps(docker.client.history(image.name))
    made = docker.client.create_container(image.name, ["ls", "-A", "/app"])
    docker.client.start(made["Id"])
    docker.client.wait(made["Id"])
    found = set(docker.client.logs(made["Id"], stderr=False).decode().split())
    docker.remove_containers()
    assert found == {
        *("__pycache__", "blueprints", "image", "models", "server", "services", "static", "templates"),
        *("app.py", "gunicorn.conf.py", "version.py", "wsgi.py", "requirements.txt", "switchyard.toml"),
    }


def test_a_new_container_is_healthy_answers_and_keeps_conversations(compose, boxed):
    """As in compose.yaml: read-only root folder, no capabilities. The next container has the conversation."""
    project = compose()
    begun = time.monotonic()
    boxed.id = project.up()
    boxed.await_ready()
    print(f"answers {time.monotonic() - begun:.1f} s after `docker-compose up`")
    wait_until(lambda: boxed.inspect()["State"]["Health"]["Status"] == "healthy", "the container to be healthy")
    assert "switchyard-mini" in boxed.get("/").text
    assert set(boxed.status()["models"]) == DEMO_MODELS
    boxed.switch("switchyard-mini")
    assert boxed.ask("Hello").json()["choices"][0]["message"]["content"]

    host = boxed.inspect()["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"]) == (True, ["ALL"])
    status = Path(f"/proc/{boxed.worker.pid}/status").read_text()
    assert "Uid:\t10001\t10001" in status
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    assert boxed.run("sh", "-c", "echo x > /app/x")[0] != 0

    boxed.post("/chats", data={"text": "Remember the quokka"})
    boxed.wait_for(lambda s: s["models"]["switchyard-mini"]["status"] == "running", "the answer's model")
    old = boxed.id
    boxed.id = project.up()
    boxed.await_ready()
    assert boxed.id != old
    assert "Remember the quokka" in boxed.get("/").text


def test_docker_stop_ends_every_process_in_an_orderly_way(compose, boxed):
    """Exit code 0, with a model loaded, long before the grace period of 30 seconds ends."""
    boxed.id = compose().up()
    boxed.await_ready()
    boxed.switch("switchyard-mini")
    processes = boxed.process_tree
    assert len(processes) >= 4  # init, gunicorn, its worker, an engine
    begun, watch = time.monotonic(), Stopwatch()
    assert boxed.end() == 0
    print(f"`docker stop` took {time.monotonic() - begun:.1f} s")
    assert watch.waited < 10
    assert not [p for p in processes if p.is_running()]


def test_a_stop_during_the_start_works(boxed):
    """PID 1 forwards SIGTERM before gunicorn has its handlers; otherwise it would be killed after the grace period."""
    boxed.start_by_hand(SWITCHYARD_PORT=str(boxed.port))
    watch = Stopwatch()
    boxed.end(grace=20)
    assert watch.waited < 10


def test_processes_of_a_killed_worker_are_adopted_or_reaped(compose, boxed):
    """The loaded engine is adopted; the standby process and an unknown orphan are reaped."""
    boxed.id = compose().up()
    boxed.await_ready()
    boxed.switch("switchyard-mini")
    worker = boxed.worker
    wait_until(lambda: len(worker.children()) == 2, "the next standby process")
    engines = worker.children()
    assert boxed.run("sh", "-c", "sleep 0.1 &")[0] == 0
    worker.kill()
    wait_until(lambda: not worker.is_running(), "the worker to be gone")
    boxed.await_ready()
    boxed.wait_for(lambda s: s["models"]["switchyard-mini"]["status"] == "running", "the model to be adopted")
    wait_until(lambda: len([p for p in engines if p.is_running()]) == 1, "the standby process to end")
    wait_until(lambda: psutil.STATUS_ZOMBIE not in boxed.states.values(), "zombies to be reaped")
    assert "sleep" not in boxed.states
    assert boxed.ask("Hello", model="switchyard-mini").status_code == 200


def test_mounted_folders_get_the_demo_models_and_their_settings_are_read(boxed, tmp_path):
    """A plain `docker run` as the folders' owner. The health check uses the settings' address."""
    data = tmp_path / "data"
    (data / "models").mkdir(parents=True)
    (data / "switchyard.toml").write_text(f'port = {boxed.port}\nollama_base_url = "{NO_OLLAMA}"\n')
    for path in (data, data / "models"):
        os.chown(path, 12345, 12345)
    boxed.start_by_hand(f"{data}:/data", user="12345:12345")
    boxed.await_ready()
    assert set(boxed.status()["models"]) == DEMO_MODELS
    assert boxed.run("python", "image/healthcheck.py") == (0, "")
    code, said = boxed.run("python", "image/healthcheck.py", SWITCHYARD_PORT="9")
    assert (code, "127.0.0.1:9 does not answer" in said) == (1, True)


def test_an_unwritable_folder_is_named_with_the_remedy(docker, boxed, tmp_path):
    """Docker creates missing folders as root, so this is a common first error."""
    boxed.start_by_hand(f"{tmp_path / 'missing'}:/data")
    assert docker.client.wait(boxed.id)["StatusCode"] == 1
    assert "User 10001 can't write to /data/state" in boxed.output()
    assert "chown 10001:10001" in boxed.output()


def test_with_the_docker_socket_vllm_models_run_and_are_measured(docker, compose, boxed, tmp_path):
    """compose.docker.yaml: the group may use the socket, folders have the same paths, pids are the host's."""
    hub, compiled = tmp_path / "hub", tmp_path / "compiled"
    fill_cache(hub, "org/model", TINY_MODEL)
    (tmp_path / "models.toml").write_text(
        '[[models]]\nid = "org/model"\nengine = "vllm"\nsource = "org/model"\nsize_gb = 0.05\nrequired_gb = 0.1\n'
        '[models.options]\nshm_gb = 0.064\ndevice = "host"\n'
        '[models.options.environment]\nHF_HUB_OFFLINE = "1"\nFAKE_VLLM = "{\\"load_seconds\\": 0.3}"\n'
    )
    listed = tmp_path / "listed.yaml"
    listed.write_text(f"services: {{switchyard: {{volumes: ['{tmp_path}/models.toml:/data/switchyard.toml:ro']}}}}")
    project = compose(
        SOCKET,
        listed,
        DOCKER_GID=str(docker.socket.stat().st_gid),
        DOCKER_SOCKET=str(docker.socket),
        SWITCHYARD_HUB_CACHE_DIR=str(hub),
        SWITCHYARD_VLLM_CACHE_DIR=str(compiled),
        SWITCHYARD_VLLM_IMAGE=FAKE_VLLM_IMAGE,
    )
    boxed.id = project.up()
    boxed.await_ready()
    boxed.switch("org/model")
    assert boxed.ask("Hello", model="org/model").status_code == 200
    vllm = next(c for c in docker.client.containers() if "switchyard.model" in c["Labels"])
    assert {mount["Source"] for mount in vllm["Mounts"]} >= {str(hub), str(compiled)}
    boxed.wait_for(lambda s: (s["models"]["org/model"]["gpu_memory_used_gb"] or 0) > 0, "its memory to be measured")
    processes = boxed.process_tree
    assert boxed.end() == 0
    assert not [p for p in processes if p.is_running()]


@pytest.mark.parametrize("files", [(), (GPU,), (SOCKET,), (GPU, SOCKET)], ids=["alone", "gpu", "docker", "both"])
def test_compose_accepts_every_combination_of_the_files(docker, tmp_path, files):
    """Together with the optional Ollama."""
    project = Compose(docker, tmp_path, [BASE, *files], {"DOCKER_GID": "999"})
    assert "ollama" in project.run("--profile", "ollama", "config")
