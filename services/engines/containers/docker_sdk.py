"""All that needs docker-py itself. Imported at the first call to Docker: it takes 2 MB that few need."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import Any

from docker import auth  # type: ignore[import-untyped]
from docker.api.client import APIClient  # type: ignore[import-untyped]
from docker.errors import DockerException, InvalidVersion  # type: ignore[import-untyped]
from docker.transport.unixconn import UnixHTTPConnection  # type: ignore[import-untyped]
from docker.types import DeviceRequest, LogConfig, Mount  # type: ignore[import-untyped]
from docker.utils import parse_repository_tag  # type: ignore[import-untyped]

from services.engines.containers.port import ContainerError, ContainerSpec
from services.engines.out_of_memory import engine_score

SCHEMES = ("unix://", "tcp://")
FIRST_VERSION = "1.41"
"""Docker 20.10's API. Which version the daemon speaks can be asked in any."""
LOOPBACK = "127.0.0.1"
LOG_OPTIONS = {"max-size": "10m", "max-file": "2"}
"""Docker keeps logs without end unless told otherwise."""


def connect(host: str, timeout: float) -> Any:
    """A client that speaks the daemon's version and goes through no proxy; each question may take `timeout` seconds.

    The client would find the version itself, but before it could be told to leave proxies alone. Raises ContainerError,
    and what requests does.
    """
    if not host.startswith(SCHEMES):
        raise ContainerError(
            f"DOCKER_HOST is {host}, which Switchyard can't use. Set it to an address that begins with "
            f"{' or '.join(SCHEMES)}."
        )
    try:
        with closing(_client(host, timeout, FIRST_VERSION)) as first:
            version = str(first.version(api_version=False)["ApiVersion"])
        return _client(host, timeout, version)
    except InvalidVersion as error:
        raise ContainerError(f"Docker at {host} is too old for Switchyard: {error} Update Docker Engine.") from None
    except (KeyError, TypeError):
        raise ContainerError(f"What answers at {host} is not Docker. Set DOCKER_HOST to where it is.") from None


def _connect_or_close(connection: Any) -> None:
    """Connect to the daemon's socket. docker-py 7.2 leaves its own end open when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(connection.timeout)
        sock.connect(connection.unix_socket)
    except BaseException:
        sock.close()
        raise
    connection.sock = sock


UnixHTTPConnection.connect = _connect_or_close


def creation(client: Any, spec: ContainerSpec) -> dict[str, Any]:
    """A spec as the client's `create_container` takes it."""
    options: dict[str, Any] = {
        "init": True,
        "restart_policy": {"Name": "no"},  # a policy would repeat a failing load without a word
        "port_bindings": {f"{spec.port}/tcp": (LOOPBACK, None)},
        "mounts": [
            Mount(m.target, m.source, type="bind" if m.source.startswith("/") else "volume", read_only=m.read_only)
            for m in spec.mounts
        ],
        "oom_score_adj": engine_score(),
        "log_config": LogConfig(type=LogConfig.types.JSON, config=LOG_OPTIONS),
    }
    if spec.gpus:
        options["device_requests"] = [DeviceRequest(device_ids=list(spec.gpus), capabilities=[["gpu"]])]
    if spec.host_ipc:
        options["ipc_mode"] = "host"
    elif spec.shm_bytes is not None:
        options["shm_size"] = spec.shm_bytes
    return {
        "image": spec.image,
        "name": spec.name,
        "command": list(spec.command),
        "environment": dict(spec.environment),
        "labels": spec.all_labels,
        "ports": [(spec.port, "tcp")],
        "host_config": client.create_host_config(**options),
        "use_config_proxy": False,  # its environment is the spec's, whoever runs Switchyard
    }


def pull_request(client: Any, image: str) -> dict[str, dict[str, str]]:
    """What `POST /images/create` takes to pull an image: its name, and the login that `docker login` has kept.

    Raises ContainerError for a name that can't be one, and when the login can't be read.
    """
    try:
        repository, tag = parse_repository_tag(image)
        registry, _ = auth.resolve_repository_name(repository)
        login = auth.get_config_header(client, registry)
    except DockerException as error:
        raise ContainerError(f"The image {image} can't be pulled: {error}. Check its name and docker login.") from None
    return {
        "params": {"fromImage": repository, "tag": tag or "latest"},
        "headers": {"X-Registry-Auth": login.decode()} if login else {},
    }


def _client(host: str, timeout: float, version: str) -> Any:
    client = APIClient(base_url=host, timeout=timeout, version=version)
    client.trust_env = False
    return client
