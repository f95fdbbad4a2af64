"""Build the app's Docker image from a base that needs no internet, and run it through `compose.yaml`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from docker import APIClient

from tests.support.base_image import import_base
from tests.support.console import ROOT
from tests.support.docker import DockerEngine, program

IMAGE = "switchyard:latest"
"""The image's name in compose.yaml."""
BASE_REPOSITORY, BASE_TAG = "switchyard-test/base", "1"
BUILD_SECONDS = 300
COMPOSE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class AppImage:
    """Result of a build. Sizes in bytes; `index` is the URL that packages were installed from."""

    name: str
    size: int
    base_size: int
    index: str


def build(client: APIClient) -> AppImage:
    """Build the repository's Dockerfile with packages that this machine's pip downloads and serves to the build."""
    import_base(client, BASE_REPOSITORY, BASE_TAG)
    with tempfile.TemporaryDirectory() as folder:
        _download(Path(folder))
        with _served(Path(folder)) as index:
            return _build(client, index)


def _download(folder: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:"),
            *("--requirement", str(ROOT / "requirements.txt"), "--dest", str(folder)),
        ],
        capture_output=True,
        timeout=BUILD_SECONDS,
        check=True,
    )


def _build(client: APIClient, index: str) -> AppImage:
    base = f"{BASE_REPOSITORY}:{BASE_TAG}"
    arguments = {"BASE": base, "PIP_FIND_LINKS": index, "PIP_NO_INDEX": "1"}
    printed = list(
        client.build(
            path=str(ROOT), tag=IMAGE, buildargs=arguments, network_mode="host", decode=True, timeout=BUILD_SECONDS
        )
    )
    output = "".join(line.get("stream", "") + line.get("error", "") for line in printed)
    assert not any("error" in line for line in printed), output
    return AppImage(IMAGE, client.inspect_image(IMAGE)["Size"], client.inspect_image(base)["Size"], index)


class Compose:
    """`docker-compose` with the repository's files, and further ones, on the tests' own Docker engine.

    `environment` holds what a person would have set in the shell; `folder` is where an empty `.env` is created.
    """

    def __init__(self, docker: DockerEngine, folder: Path, files: list[Path], environment: dict[str, str]) -> None:
        self._no_settings = folder / ".env"
        self._no_settings.touch()
        self._docker = docker
        self._files = files
        self._environment = environment

    def run(self, *arguments: str) -> str:
        """Run one command and return its stdout. Fails the test with its stderr."""
        foreign = ("DOCKER_", "COMPOSE_", "SWITCHYARD_", "HF_", "OLLAMA_")
        done = subprocess.run(
            [
                *(program("docker-compose"), "--project-directory", str(ROOT), "--env-file", str(self._no_settings)),
                *("--project-name", "switchyard-test"),
                *(part for file in self._files for part in ("--file", str(file))),
                *arguments,
            ],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
                "DOCKER_HOST": self._docker.host,
                **self._environment,
            },
            capture_output=True,
            text=True,
            timeout=COMPOSE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def up(self) -> str:
        """Start the app in a new container; return the container's id."""
        self.run("up", "--detach", "--no-build", "--force-recreate", "switchyard")
        return self.run("ps", "--quiet", "switchyard").strip()

    def close(self) -> None:
        """Remove the containers and volumes."""
        self.run("down", "--volumes")


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Serve the folder over HTTP and yield its URL; pip reads the directory listing."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing: the build's own output says what it downloaded."""
