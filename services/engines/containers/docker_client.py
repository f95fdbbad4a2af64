"""docker-py's client with time limits on every wait, and streams that another thread can end.

docker-py pulls without a time limit, and ends a stream by closing a socket that another greenlet may be reading, which
gevent does not allow. Both are fixed in `requests.Session.send`, through which all of docker-py's calls go.
"""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from typing import Any

import requests
from docker.api.client import APIClient  # type: ignore[import-untyped]
from docker.errors import InvalidVersion  # type: ignore[import-untyped]
from docker.transport.unixconn import UnixHTTPConnection  # type: ignore[import-untyped]
from docker.types import DeviceRequest, LogConfig, Mount  # type: ignore[import-untyped]

from services.engines.containers.port import ContainerError, ContainerSpec
from services.engines.out_of_memory import engine_score

SCHEMES = ("unix://", "tcp://")
FIRST_VERSION = "1.41"
"""API version of Docker 20.10; the daemon's own version can be requested in any version."""
LOOPBACK = "127.0.0.1"
LOG_OPTIONS = {"max-size": "10m", "max-file": "2"}
"""Docker's logs grow without limit by default."""


class Client(APIClient):  # type: ignore[misc]
    """Each connect, each response header and each gap within a body may take `timeout` seconds. Uses no proxy.

    A client that streams a response is used for nothing else, so that `cancel` ends the right one.
    """

    def __init__(self, host: str, timeout: float, version: str) -> None:
        super().__init__(base_url=host, timeout=timeout, version=version)
        self.trust_env = False
        self._streamed: requests.Response | None = None

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request; every call of docker-py goes through here."""
        if options.get("timeout") is None:
            options["timeout"] = self.timeout
        response: requests.Response = super().send(request, **options)
        if options.get("stream"):
            self._streamed = response
        return response

    def cancel(self) -> None:
        """End the streamed response; its reader then finds the end. Thread-safe."""
        if self._streamed is not None:
            with suppress(OSError, RuntimeError, ValueError):  # the connection was closed already
                self._streamed.raw.shutdown()

    def close(self) -> None:
        """Close every connection. No thread may be reading."""
        if self._streamed is not None:
            self._streamed.close()
        super().close()


def connect(host: str, timeout: float) -> Client:
    """Return a client for the daemon's API version. Raises ContainerError, and docker-py's errors.

    docker-py would detect the version itself, but before it can be told to use no proxy.
    """
    if not host.startswith(SCHEMES):
        raise ContainerError(
            f"DOCKER_HOST is {host}, which Switchyard can't use. Set it to an address that begins with "
            f"{' or '.join(SCHEMES)}."
        )
    try:
        with closing(Client(host, timeout, FIRST_VERSION)) as first:
            version = str(first.version(api_version=False)["ApiVersion"])
        return Client(host, timeout, version)
    except InvalidVersion as error:
        raise ContainerError(f"Docker at {host} is too old for Switchyard: {error} Update Docker Engine.") from None
    except (KeyError, TypeError):
        raise ContainerError(f"What answers at {host} is not Docker. Set DOCKER_HOST to where it is.") from None


def _connect_or_close(connection: Any) -> None:
    """Connect to the daemon's socket. docker-py 7.2 leaks the socket if nothing listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(connection.timeout)
        sock.connect(connection.unix_socket)
    except BaseException:
        sock.close()
        raise
    connection.sock = sock


UnixHTTPConnection.connect = _connect_or_close


def creation(client: Client, spec: ContainerSpec) -> dict[str, Any]:
    """Return the arguments of `create_container` for a spec."""
    options: dict[str, Any] = {
        "init": True,
        "restart_policy": {"Name": "no"},  # a policy would silently repeat a failing load
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
        "use_config_proxy": False,  # the environment is the spec's only
    }
