"""The container runtime of a Docker daemon, through its SDK (Docker 20.10 and later).

Importing docker-py and requests takes a tenth of the app's start, so this module is imported at the first use.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound  # type: ignore[import-untyped]

from services.cancellation import CancelToken
from services.engines.containers.docker_client import Client, connect, creation
from services.engines.containers.docker_errors import (
    FAILURES,
    explain,
    image_missing,
    is_timeout,
    lost,
    name_taken,
    not_ours,
)
from services.engines.containers.docker_pull import Line, Pull
from services.engines.containers.docker_stream import DockerStream
from services.engines.containers.port import (
    MANAGED_LABEL,
    Container,
    ContainerError,
    ContainerGone,
    ContainerSpec,
    PullReport,
    RuntimeDown,
    RuntimeStatus,
    Stream,
)

DEFAULT_HOST = "unix:///var/run/docker.sock"
CALL_SECONDS = 15.0
SLOW_FACTOR = 4.0
"""Starting (many GPUs), stopping and removing (many files) get that many times the limit."""
PULL_SILENCE_SECONDS = 300.0
SHORTEST_WAIT = 0.001
NEVER = "0001-01-01"
"""Docker's timestamp for an event that has not happened."""


class DockerRuntime:
    """The Docker daemon at `host`; default: DOCKER_HOST, else this machine's socket.

    Every call ends within `timeout` seconds, start, stop and remove within four times that, plus the time they are
    asked to wait. Thread-safe. Connects at the first call.
    """

    def __init__(self, host: str | None = None, *, timeout: float = CALL_SECONDS) -> None:
        self.host = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
        self._timeout = timeout
        self._slow_timeout = timeout * SLOW_FACTOR
        self._lock = threading.Lock()
        self._clients: dict[float, Client] = {}
        """Clients by time limit."""

    def available(self) -> RuntimeStatus:
        try:
            with self._call("say how it is") as docker:
                info = docker.info()
                return RuntimeStatus(True, str(info["ServerVersion"]), nvidia="nvidia" in (info.get("Runtimes") or {}))
        except ContainerError as error:
            return RuntimeStatus(running=False, error=str(error), problem=error.problem)

    def create(self, spec: ContainerSpec) -> str:
        with self._call(f"make the container {spec.name}") as docker:
            try:
                return str(docker.create_container(**creation(docker, spec))["Id"])
            except ImageNotFound:
                raise image_missing(spec.image) from None
            except APIError as error:
                if error.status_code == 409:
                    raise name_taken(spec.name, self.by_name(spec.name)) from None
                raise

    def start(self, container_id: str) -> None:
        with self._call(f"start {_short(container_id)}", self._slow_timeout) as docker:
            docker.start(container_id)

    def attach(self, container_id: str) -> Stream[bytes]:
        with self._call(f"show the output of {_short(container_id)}"):
            docker = self._stream_client(self._timeout)
            try:
                return DockerStream(docker, docker.attach(container_id, stream=True))
            except BaseException:
                docker.close()
                raise

    def logs_tail(self, container_id: str, lines: int) -> str:
        with self._call(f"show the log of {_short(container_id)}") as docker:
            written: bytes = docker.logs(container_id, tail=lines)
        return written.decode("utf-8", "replace")

    def wait(self, container_id: str, timeout: float) -> int | None:
        with self._call(f"wait for {_short(container_id)}") as docker:
            try:
                return int(docker.wait(container_id, timeout=max(timeout, SHORTEST_WAIT))["StatusCode"])
            except requests.Timeout:  # no response header: Docker is slow, or hangs
                return self.inspect(container_id).exit_code
            except requests.ConnectionError as error:
                if is_timeout(error):
                    return None  # still running: Docker sends the header at once, the body at the container's end
                raise

    def stop(self, container_id: str, grace: float) -> None:
        seconds = math.ceil(grace)
        try:
            with self._call(f"stop {_short(container_id)}", self._slow_timeout, extra_seconds=seconds) as docker:
                self._check_managed(container_id)
                docker.stop(container_id, timeout=seconds)  # docker-py adds this to the client's limit
        except ContainerGone:
            return

    def remove(self, container_id: str) -> None:
        try:
            with self._call(f"remove {_short(container_id)}", self._slow_timeout) as docker:
                self._check_managed(container_id)
                try:
                    docker.remove_container(container_id, v=True, force=True)
                except APIError as error:
                    if error.status_code != 409:
                        raise
                    docker.wait(container_id, condition="removed")  # it is being removed already
        except ContainerGone:
            return

    def inspect(self, container_id: str) -> Container:
        with self._call(f"look at {_short(container_id)}") as docker:
            return _container(docker.inspect_container(container_id))

    def by_name(self, name: str) -> Container | None:
        try:
            found = self.inspect(name)
        except ContainerGone:
            return None
        return found if found.name == name else None  # Docker also matches prefixes of ids

    def find(self, labels: Mapping[str, str]) -> list[Container]:
        wanted = [f"{key}={value}" for key, value in {**labels, MANAGED_LABEL: "1"}.items()]
        with self._call("list its containers") as docker:
            listed = docker.containers(all=True, filters={"label": wanted})
        found = []
        for entry in listed:
            try:
                found.append(self.inspect(entry["Id"]))
            except ContainerGone:
                continue
        return found

    def pids(self, container_id: str) -> tuple[int, ...]:
        with self._call(f"list the processes of {_short(container_id)}") as docker:
            try:
                listed = docker.top(container_id, ps_args="-eo pid")
            except APIError as error:
                if error.status_code == 409:  # it doesn't run
                    return ()
                raise
        return tuple(int(row[0]) for row in listed["Processes"] or ())

    def image_present(self, image: str) -> bool:
        with self._call(f"look for the image {image}") as docker:
            try:
                docker.inspect_image(image)
            except NotFound:
                return False
        return True

    def pull(self, image: str, report: PullReport, token: CancelToken) -> None:
        Pull(
            image,
            lambda: self._pulling(image),
            lambda error: self._explain(error, f"pull {image}", PULL_SILENCE_SECONDS),
        ).run(report, token)

    def close(self) -> None:
        """Close the connections to the daemon; the next call opens new ones. Streams go on."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for docker in clients.values():
            docker.close()

    @contextmanager
    def _call(self, action: str, timeout: float | None = None, *, extra_seconds: float = 0.0) -> Iterator[Client]:
        """Context manager: provide a client with this time limit, and convert exceptions to the port's errors.

        `action` completes "Docker could not …". `extra_seconds` is what the call may take beyond the limit.
        """
        seconds = timeout or self._timeout
        try:
            yield self._client(seconds)
        except FAILURES as error:
            raise self._explain(error, action, seconds + extra_seconds) from None

    def _explain(self, error: Exception, action: str, seconds: float) -> ContainerError:
        explained = explain(error, action, self.host, seconds)
        if isinstance(explained, RuntimeDown):
            self.close()  # a restarted daemon may have another version
        return explained

    def _client(self, timeout: float) -> Client:
        with self._lock:
            current = self._clients.get(timeout)
        if current is not None:
            return current
        made = connect(self.host, timeout)  # without the lock, so that a hanging daemon delays callers in parallel
        with self._lock:
            current = self._clients.setdefault(timeout, made)
        if current is not made:
            made.close()
        return current

    def _stream_client(self, silence: float) -> Client:
        """Return a client for one streamed response, in which Docker may pause for `silence` seconds."""
        return Client(self.host, silence, self._client(self._timeout).api_version)

    def _pulling(self, image: str) -> DockerStream[Line]:
        docker = self._stream_client(PULL_SILENCE_SECONDS)
        try:
            lines = docker.pull(image, stream=True, decode=True)
        except BaseException as error:
            docker.close()
            if isinstance(error, DockerException) and not isinstance(error, APIError):
                words = f"The image {image} can't be pulled: {error}. Check its name and docker login."
                raise ContainerError(words) from None
            raise
        return DockerStream(docker, lines, lost=lambda: lost(self.host))

    def _check_managed(self, container_id: str) -> None:
        container = self.inspect(container_id)
        if not container.managed:
            raise not_ours(container)


def _container(document: Mapping[str, Any]) -> Container:
    """Parse `GET /containers/{id}/json` (API 1.41)."""
    state, config = document["State"], document["Config"]
    running = state["Status"] in ("running", "paused")
    started = str(state.get("StartedAt") or NEVER)
    has_run = not started.startswith(NEVER)
    return Container(
        id=document["Id"],
        name=str(document["Name"]).removeprefix("/"),
        state=state["Status"],
        image=config["Image"],
        labels=dict(config.get("Labels") or {}),
        host_port=_host_port(document) if running else None,
        exit_code=int(state["ExitCode"]) if has_run and not running else None,
        oom_killed=bool(state.get("OOMKilled")),
        started_at=datetime.fromisoformat(started).timestamp() if has_run else None,
        pid=int(state["Pid"]) or None,
    )


def _host_port(document: Mapping[str, Any]) -> int | None:
    published = (document.get("NetworkSettings") or {}).get("Ports") or {}
    ports = [int(binding["HostPort"]) for bindings in published.values() for binding in bindings or ()]
    return ports[0] if ports else None


def _short(container_id: str) -> str:
    return f"the container {container_id[:12]}"
