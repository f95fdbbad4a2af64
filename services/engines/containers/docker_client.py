"""docker-py's client with what it lacks: a limit on every wait, and an end to a stream from another thread.

docker-py asks for pulls without any time limit, and to end its streams it closes a socket that another greenlet may be
reading, which gevent does not allow. Both are put right at one place, `requests.Session.send`, through which all of
docker-py's calls go. Everything else is docker-py's own.
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
"""Docker 20.10's API. Which version the daemon speaks can be asked in any."""
LOOPBACK = "127.0.0.1"
LOG_OPTIONS = {"max-size": "10m", "max-file": "2"}
"""Docker keeps logs without end unless told otherwise."""


class Client(APIClient):  # type: ignore[misc]
    """Each connection, each answer's header and each silence within a body may take `timeout` seconds. Uses no proxy.

    A client that streams an answer is used for nothing else, so that `cancel` knows what to end.
    """

    def __init__(self, host: str, timeout: float, version: str) -> None:
        super().__init__(base_url=host, timeout=timeout, version=version)
        self.trust_env = False
        self._streamed: requests.Response | None = None

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """As requests' own, for every call of docker-py."""
        if options.get("timeout") is None:
            options["timeout"] = self.timeout
        response: requests.Response = super().send(request, **options)
        if options.get("stream"):
            self._streamed = response
        return response

    def cancel(self) -> None:
        """End the answer that is being streamed: whoever reads it finds its end. Safe from any thread."""
        if self._streamed is not None:
            with suppress(OSError, RuntimeError, ValueError):  # the other side was faster, or all of it was read
                self._streamed.raw.shutdown()

    def close(self) -> None:
        """Close every connection; nobody may be reading."""
        if self._streamed is not None:
            self._streamed.close()
        super().close()


def connect(host: str, timeout: float) -> Client:
    """Make a client that speaks the daemon's version of the API.

    docker-py would find the version itself, but before it could be told to use no proxy. Raises ContainerError, and
    what docker-py does.
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


def creation(client: Client, spec: ContainerSpec) -> dict[str, Any]:
    """The arguments of `create_container` for a spec."""
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
