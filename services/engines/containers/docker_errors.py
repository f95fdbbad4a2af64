"""Translates errors of Docker to messages that say what to do."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Iterator

import requests
import urllib3
from docker.errors import APIError, DockerException  # type: ignore[import-untyped]

from services.engines.containers.port import (
    Container,
    ContainerError,
    ContainerGone,
    ImageMissing,
    NameTaken,
    NoGpuRuntime,
    NotOurs,
    RuntimeDown,
    RuntimeForbidden,
    RuntimeHangs,
    RuntimeMissing,
)

FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, DockerException, KeyError, TypeError)
"""What the SDK and its libraries raise when a call fails; the last two for a response that is not Docker's."""


def explain(error: Exception, action: str, host: str, seconds: float) -> ContainerError:
    """Convert the exception of a call to one of the port's errors.

    `action` is what Docker was to do ("start the container x"), `seconds` its time limit.
    """
    if isinstance(error, APIError):
        return _explain_refusal(error, action)
    if isinstance(error, DockerException):
        return ContainerError(f"Docker could not {action}: {error}.")
    if isinstance(error, (KeyError, TypeError)):
        return ContainerError(f"Docker could not {action}: what answers at {host} can't be understood. Is it Docker?")
    causes = list(_causes(error))
    if is_timeout(error):
        return RuntimeHangs(
            f"Docker did not {action} within {seconds:.0f} s: its daemon may be stuck. See whether `docker info` "
            "answers; restart it if it doesn't (sudo systemctl restart docker)."
        )
    if any(isinstance(cause, PermissionError) for cause in causes):
        return RuntimeForbidden(
            f"The user {_user()} may not use Docker at {host}. Add it to the group docker (sudo usermod -aG docker "
            f"{_user()}), log in again, and restart Switchyard."
        )
    if any(isinstance(cause, FileNotFoundError) for cause in causes) and not _installed():
        return RuntimeMissing(
            f"Docker is not installed: there is no {host} and no docker program. Install Docker Engine "
            "(https://docs.docker.com/engine/install/), or set DOCKER_HOST to where one answers."
        )
    return RuntimeDown(
        f"Docker does not answer at {host}: its daemon is not running. Start it (sudo systemctl start docker), "
        "or set DOCKER_HOST to where one answers."
    )


def is_timeout(error: Exception) -> bool:
    causes = list(_causes(error))
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return False  # urllib3's error for a refused connection derives from its timeout error
    late = (TimeoutError, BlockingIOError, requests.Timeout, urllib3.exceptions.TimeoutError)
    return any(isinstance(cause, late) for cause in causes)


def words_of(error: APIError) -> str:
    """Return Docker's message in an error response: `{"message": …}` (API 1.41)."""
    return str(error.explanation or "").strip() or f"HTTP status {error.status_code}"


def image_missing(image: str) -> ImageMissing:
    return ImageMissing(f"The image {image} is not on Docker's machine. Pull it: docker pull {image}")


def name_taken(name: str, holder: Container | None) -> NameTaken:
    if holder is None or holder.managed:
        return NameTaken(f"Switchyard has a container named {name} already. Try again.", holder)
    return NameTaken(
        f"The name {name} is taken by a container that Switchyard did not make (image {holder.image}), and so leaves "
        f"alone. Rename or remove it: docker rename {name} {name}-old",
        holder,
    )


def not_ours(container: Container) -> NotOurs:
    return NotOurs(
        f"Switchyard did not make the container {container.name} (image {container.image}), and so leaves it alone. "
        f"If it is in the way, stop it yourself: docker stop {container.name}"
    )


def lost(host: str) -> RuntimeDown:
    return RuntimeDown(
        f"Docker at {host} went away: its daemon stopped or restarts. Start it again (sudo systemctl start docker)."
    )


def _explain_refusal(error: APIError, action: str) -> ContainerError:
    words = words_of(error)
    if error.status_code == 404 and "no such container" in words.lower():
        return ContainerGone(f"Docker could not {action}: something else removed it. Load the model again.")
    if "could not select device driver" in words:
        return NoGpuRuntime(
            "Docker can't give GPUs to containers: NVIDIA's container runtime is missing. Install the package "
            "nvidia-container-toolkit, run sudo nvidia-ctk runtime configure --runtime=docker, and restart Docker."
        )
    return ContainerError(f"Docker could not {action}: {words.rstrip('.')}. Docker's own log may say more.")


def _causes(error: object) -> Iterator[BaseException]:
    """Yield an exception and all exceptions it wraps; libraries keep the first cause in `args` or as context."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop()
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [*cause.args, cause.__cause__, cause.__context__]


def _installed() -> bool:
    return any(shutil.which(program) for program in ("dockerd", "docker"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "that Switchyard runs as"
