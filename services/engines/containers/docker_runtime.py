"""The container runtime on this machine's own Docker daemon, through its SDK (Docker 20.10 and later)."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Any

import requests

from services.abort import Abort
from services.engines.containers.docker_errors import (
    FAILURES,
    explain,
    image_missing,
    is_timeout,
    lost,
    name_taken,
    not_ours,
    status_of,
    words_of,
)
from services.engines.containers.docker_pull import Line, Pull
from services.engines.containers.docker_streams import LiveStream, attached_output, json_lines, raw_socket
from services.engines.containers.port import (
    MANAGED_LABEL,
    Container,
    ContainerError,
    ContainerEvent,
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
"""Starting (many GPUs), stopping and removing (many files) may take that many times longer than a question."""
PULL_SILENCE_SECONDS = 300.0
NEVER = "0001-01-01"
"""How Docker writes that something has not happened yet."""


class DockerRuntime:
    """The Docker daemon at `host`, by default the one that DOCKER_HOST names, else this machine's.

    Every call ends within `timeout` seconds, those that start, stop or remove within four times that, on top of what
    they are asked to wait. Safe to use from several threads. Nothing is asked until the first call.
    """

    def __init__(self, host: str | None = None, *, timeout: float = CALL_SECONDS) -> None:
        self.host = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
        self._timeout = timeout
        self._lock = threading.Lock()
        self._connected: Any = None

    def available(self) -> RuntimeStatus:
        try:
            with self._asked_to("say how it is") as docker:
                info = docker.info()
        except ContainerError as error:
            return RuntimeStatus(running=False, error=str(error), problem=error.problem)
        return RuntimeStatus(True, str(info["ServerVersion"]), nvidia="nvidia" in (info.get("Runtimes") or {}))

    def create(self, spec: ContainerSpec) -> str:
        with self._asked_to(f"make the container {spec.name}") as docker:
            try:
                made = docker.create_container(**_sdk().creation(docker, spec))
            except requests.HTTPError as error:
                if status_of(error) == 404 and "no such image" in words_of(error).lower():
                    raise image_missing(spec.image) from None
                if status_of(error) == 409:
                    raise name_taken(spec.name, self.by_name(spec.name)) from None
                raise
        return str(made["Id"])

    def start(self, container_id: str) -> None:
        with self._asked_to(f"start {_short(container_id)}", self._slow) as docker:
            self._post(docker, f"containers/{container_id}/start", timeout=self._slow).close()

    def attach(self, container_id: str) -> Stream[bytes]:
        with self._asked_to(f"show the output of {_short(container_id)}") as docker:
            response = self._post(
                docker,
                f"containers/{container_id}/attach",
                params={"stream": 1, "stdout": 1, "stderr": 1},
                headers={"Connection": "Upgrade", "Upgrade": "tcp"},
                stream=True,
            )
            return LiveStream(response, attached_output)

    def logs_tail(self, container_id: str, lines: int) -> str:
        with self._asked_to(f"show the log of {_short(container_id)}") as docker:
            written: bytes = docker.logs(container_id, tail=lines)
        return written.decode("utf-8", "replace")

    def wait(self, container_id: str, timeout: float) -> int | None:
        with self._asked_to(f"wait for {_short(container_id)}") as docker:
            response = self._post(docker, f"containers/{container_id}/wait", stream=True)
            with closing(response):
                # Docker sends the header at once and the body at the container's end.
                raw_socket(response).settimeout(max(timeout, 0.001))
                try:
                    return int(response.json()["StatusCode"])
                except FAILURES as error:
                    if is_timeout(error):
                        return None
                    raise

    def stop(self, container_id: str, grace: float) -> None:
        seconds = math.ceil(grace)
        try:
            with self._asked_to(f"stop {_short(container_id)}", seconds + self._slow) as docker:
                self._insist_it_is_ours(container_id)
                path = f"containers/{container_id}/stop"
                self._post(docker, path, params={"t": seconds}, timeout=seconds + self._slow).close()
        except ContainerGone:
            return

    def remove(self, container_id: str) -> None:
        try:
            with self._asked_to(f"remove {_short(container_id)}", self._slow) as docker:
                self._insist_it_is_ours(container_id)
                path = f"containers/{container_id}"
                try:
                    _checked(docker.delete(_url(docker, path), params={"force": 1, "v": 1}, timeout=self._slow))
                except requests.HTTPError as error:
                    if status_of(error) != 409:
                        raise
                    self._post(docker, f"{path}/wait", params={"condition": "removed"}, timeout=self._slow).close()
        except ContainerGone:
            return

    def inspect(self, container_id: str) -> Container:
        with self._asked_to(f"look at {_short(container_id)}") as docker:
            return _container(docker.inspect_container(container_id))

    def by_name(self, name: str) -> Container | None:
        try:
            found = self.inspect(name)
        except ContainerGone:
            return None
        return found if found.name == name else None  # Docker takes the beginning of an id for a name

    def find(self, labels: Mapping[str, str]) -> list[Container]:
        with self._asked_to("list its containers") as docker:
            listed = docker.containers(all=True, filters={"label": _label_filter(labels)})
        found = []
        for entry in listed:
            try:
                found.append(self.inspect(entry["Id"]))
            except ContainerGone:
                continue
        return found

    def pids(self, container_id: str) -> tuple[int, ...]:
        with self._asked_to(f"list the processes of {_short(container_id)}") as docker:
            try:
                listed = docker.top(container_id, ps_args="-eo pid")
            except requests.HTTPError as error:
                if status_of(error) == 409:  # it doesn't run
                    return ()
                raise
        return tuple(int(row[0]) for row in listed["Processes"] or ())

    def events(self, labels: Mapping[str, str]) -> Stream[ContainerEvent]:
        filters = {"type": ["container"], "event": ["start", "die", "oom", "destroy"], "label": _label_filter(labels)}
        with self._asked_to("tell what happens") as docker:
            # Docker answers before it listens: what happens in between comes by `since`.
            params = {"filters": json.dumps(filters), "since": f"{time.time():.9f}"}
            response = self._get(docker, "events", params=params, stream=True)
            return LiveStream(response, _events, lost=lambda: lost(self.host), endless=True)

    def image_present(self, image: str) -> bool:
        with self._asked_to(f"look for the image {image}") as docker:
            try:
                docker.inspect_image(image)
            except requests.HTTPError as error:
                if status_of(error) == 404:
                    return False
                raise
        return True

    def pull(self, image: str, report: PullReport, abort: Abort) -> None:
        deed = f"pull {image}"
        Pull(image, lambda: self._pulling(image), lambda error: self._trouble(error, deed, PULL_SILENCE_SECONDS)).run(
            report, abort
        )

    def close(self) -> None:
        """Let go of the connections to the daemon; the next call makes new ones. Streams go on."""
        with self._lock:
            docker, self._connected = self._connected, None
        if docker is not None:
            docker.close()

    @property
    def _slow(self) -> float:
        return self._timeout * SLOW_FACTOR

    @contextmanager
    def _asked_to(self, deed: str, seconds: float | None = None) -> Iterator[Any]:
        """Gives the SDK's client, and puts what goes wrong into the port's errors."""
        try:
            yield self._client()
        except FAILURES as error:
            raise self._trouble(error, deed, seconds or self._timeout) from None

    def _trouble(self, error: Exception, deed: str, seconds: float) -> ContainerError:
        trouble = explain(error, deed, self.host, seconds)
        if isinstance(trouble, RuntimeDown):
            self.close()  # a daemon that comes back may be of another version
        return trouble

    def _client(self) -> Any:
        with self._lock:
            current = self._connected
        if current is not None:
            return current
        made = _sdk().connect(self.host, self._timeout)  # without the lock: a hanging daemon would hold all up in turn
        with self._lock:
            current = self._connected = self._connected or made
        if current is not made:
            made.close()
        return current

    def _get(self, docker: Any, path: str, **options: Any) -> requests.Response:
        return _checked(docker.get(_url(docker, path), **{"timeout": self._timeout, **options}))

    def _post(self, docker: Any, path: str, **options: Any) -> requests.Response:
        """For what the SDK offers without a limit of time, or without its stream."""
        return _checked(docker.post(_url(docker, path), **{"timeout": self._timeout, **options}))

    def _pulling(self, image: str) -> LiveStream[Line]:
        docker = self._client()
        request = _sdk().pull_request(docker, image)
        response = self._post(docker, "images/create", stream=True, timeout=PULL_SILENCE_SECONDS, **request)
        return LiveStream(response, json_lines, silence=PULL_SILENCE_SECONDS, lost=lambda: lost(self.host))

    def _insist_it_is_ours(self, container_id: str) -> None:
        container = self.inspect(container_id)
        if not container.managed:
            raise not_ours(container)


def _sdk() -> Any:
    from services.engines.containers import docker_sdk

    return docker_sdk


def _url(docker: Any, path: str) -> str:
    return f"{docker.base_url}/v{docker.api_version}/{path}"


def _checked(response: requests.Response) -> requests.Response:
    """Raises requests.HTTPError for an answer that is an error, with what it says."""
    if response.status_code >= 400:
        with closing(response):
            response.content  # noqa: B018  it is read for whoever explains the error
            response.raise_for_status()
    return response


def _container(document: Mapping[str, Any]) -> Container:
    """From `GET /containers/{id}/json` (API 1.41)."""
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


def _events(response: requests.Response) -> Iterator[ContainerEvent]:
    """From `GET /events` (API 1.41); labels come among the other attributes."""
    for line in json_lines(response):
        attributes = line["Actor"]["Attributes"]
        code = attributes.get("exitCode")
        yield ContainerEvent(
            kind=line["Action"],
            id=line["Actor"]["ID"],
            name=attributes["name"],
            labels={key: value for key, value in attributes.items() if key not in ("name", "image", "exitCode")},
            at=line["timeNano"] / 1e9,
            exit_code=None if code is None else int(code),
        )


def _label_filter(labels: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in {**labels, MANAGED_LABEL: "1"}.items()]


def _short(container_id: str) -> str:
    return f"the container {container_id[:12]}"
