"""A real Docker engine for tests: a daemon of their own with its data in a temporary folder, ended with them.

It leaves the machine's own Docker alone: another socket, other folders, another bridge, other containerd
namespaces, and no firewall rules (published ports work through Docker's userland proxy). It needs root.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from docker import APIClient
from docker.errors import APIError

from tests.support.console import ROOT, wait_until

FAKE_VLLM_IMAGE = "switchyard-test/vllm:0.32.0"
FAKE_VLLM_SERVER = ROOT / "tests" / "fakes" / "vllm_server.py"
TRANSCRIPTS = ROOT / "tests" / "transcripts" / "vllm"
API_VERSION = "1.41"
UNNEEDED = re.compile(
    r"tests?|unittest|(site|dist)-packages|config-.*|idlelib|tkinter|ensurepip|lib2to3|distutils|.*\.opt-[12]\.pyc"
)
"""Parts of Python's library that the fake doesn't need."""
ADD_BRIDGE, REMOVE_BRIDGE, SET_FLAGS = 0x89A0, 0x89A1, 0x8914
"""SIOCBRADDBR, SIOCBRDELBR and SIOCSIFFLAGS of linux/sockios.h."""


class DockerEngine:
    """A Docker daemon used only by the tests, with the faults that they need. `host` is a value for DOCKER_HOST.

    With `gpus` it accepts requests for GPUs. NVIDIA's hook, which would make them appear in the container, is one that
    does nothing.
    """

    def __init__(self, *, gpus: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="swd-", dir="/tmp"))  # paths of sockets must be short
        self._bridge = f"swd{os.getpid()}{'g' if gpus else ''}"
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = self._folder / "s"
        self.host = f"unix://{self.socket}"
        self.client = APIClient(base_url=self.host, version=API_VERSION, timeout=60)
        (self._folder / "daemon.json").write_text("{}")
        self._gpus = gpus
        if gpus:
            hook = self._folder / "bin" / "nvidia-container-runtime-hook"
            hook.parent.mkdir()
            hook.write_text("#!/bin/sh\n")
            hook.chmod(0o755)
        _bridge(ADD_BRIDGE, self._bridge)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def start(self) -> DockerEngine:
        """Start the daemon and wait until it answers; also after `stop` and `kill`, with the same data."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "TERM"),  # it must not outlive a test run that is killed
                    *(program("dockerd"), "--config-file", str(self._folder / "daemon.json")),
                    *("--data-root", str(self._folder / "data"), "--exec-root", str(self._folder / "exec")),
                    *("--pidfile", str(self._folder / "pid"), "--host", self.host, "--log-level", "warn"),
                    *("--containerd-namespace", self._bridge, "--containerd-plugins-namespace", f"{self._bridge}p"),
                    *("--bridge", self._bridge, "--iptables=false", "--ip-masq=false", "--ip-forward=false"),
                    *("--shutdown-timeout", "1"),
                ],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, "Docker's daemon to answer")
        return self

    def stop(self) -> None:
        """End it in an orderly way, as `systemctl stop docker` does: its containers end as well."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the daemon, which ends its containerd too; the containers keep running."""
        self._end(signal.SIGKILL)
        # If the dead containerd is not reaped, the next daemon would take it for a running one.
        (self._folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Make it accept connections and never answer."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop it for the duration of the context."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def remove_containers(self) -> None:
        """Remove all containers, including those that a daemon that hung is only now creating or removing."""
        wait_until(self._emptied, "Docker to have no container")

    def run_foreign(self, name: str, command: list[str], **host_options: Any) -> str:
        """Start a container that Switchyard did not create; return its id. `host_options` as for `docker run`."""
        labels = host_options.pop("labels", {})
        environment = host_options.pop("environment", {})
        made = self.client.create_container(
            FAKE_VLLM_IMAGE,
            command,
            name=name,
            labels=labels,
            environment=environment,
            host_config=self.client.create_host_config(**host_options),
        )
        self.client.start(made["Id"])
        return str(made["Id"])

    def close(self) -> None:
        """End everything that it started and remove its traces."""
        assert self._process is not None
        if self._process.poll() is None:
            self.remove_containers()
            self.stop()
        self.client.close()
        _unmount_below(self._folder)
        _bridge(REMOVE_BRIDGE, self._bridge)
        shutil.rmtree(self._folder)

    def _environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        # Docker starts itself and its runtime anew for every step: without garbage collection, half the processor time.
        environment |= {"GOGC": "off", "GOMEMLIMIT": "512MiB"}
        if self._gpus:
            environment["PATH"] = f"{self._folder / 'bin'}:{environment['PATH']}"
        return environment

    def _emptied(self) -> bool:
        entries = self.client.containers(all=True)
        for entry in entries:
            with suppress(APIError):
                self.client.remove_container(entry["Id"], v=True, force=True)
        return not entries

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(30)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"Docker's daemon ended:\n{self.log}"
        try:
            return _listens(self.socket) and bool(self.client.ping())
        except OSError:
            return False


@contextmanager
def docker_engine(*, gpus: bool = False) -> Iterator[DockerEngine]:
    """A running engine that has the fake vLLM's image."""
    engine = DockerEngine(gpus=gpus)
    try:
        engine.start()
        import_fake_vllm(engine.client)
        yield engine
    finally:
        engine.close()


def import_fake_vllm(client: APIClient, name: str = FAKE_VLLM_IMAGE) -> None:
    """Make the image of the fake vLLM: this machine's Python with its libraries, and the recorded logs."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        libraries = _pack_python(file)
        file.flush()
        folders = ":".join(sorted({str(path.parent) for path in libraries}))
        changes = ['ENTRYPOINT ["vllm", "serve"]', f"ENV LD_LIBRARY_PATH={folders}", "EXPOSE 8000"]
        repository, tag = name.split(":")
        client.import_image_from_file(file.name, repository=repository, tag=tag, changes=changes)


def _pack_python(file: IO[bytes]) -> list[Path]:
    """Write the fake's root folder as a tar; return the shared libraries in it."""
    python, library = Path(sys.executable).resolve(), Path(os.__file__).parent
    extensions = [path for path in library.glob("lib-dynload/*.so") if "tkinter" not in path.name]
    libraries = libraries_of(python, *extensions)
    with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
        for folder in ("tmp", "root", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(entry)
        tar.add(library, filter=lambda entry: None if UNNEEDED.fullmatch(Path(entry.name).name) else entry)
        for path in (python, *libraries):
            tar.add(path)
        link = tarfile.TarInfo("usr/bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, str(python)
        tar.addfile(link)
        tar.add(FAKE_VLLM_SERVER, "usr/local/bin/vllm")
        tar.add(TRANSCRIPTS, "transcripts")
    return libraries


def libraries_of(*programs: Path) -> list[Path]:
    """The shared libraries that programs need, as the loader finds them on this machine."""
    found = subprocess.run(["ldd", *programs], capture_output=True, text=True, timeout=60, check=True)
    return sorted({Path(path) for path in re.findall(r"(/\S+) \(0x", found.stdout)})


def _listens(path: Path) -> bool:
    """Whether anything listens there. docker-py leaves a socket open when nothing does, so it isn't used for this."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def program(name: str) -> str:
    """The path of a program; system programs need not be on PATH."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert found is not None, f"{name} is missing: run tools/ensure_docker.sh"
    return found


def _bridge(request: int, name: str) -> None:
    """Add or remove a network bridge; one can be removed once it is down."""
    with socket.socket() as any_socket:
        if request == REMOVE_BRIDGE:
            fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sH22x", name.encode(), 0))
        fcntl.ioctl(any_socket, request, name.encode() + b"\0")


def _unmount_below(folder: Path) -> None:
    """Unmount what a killed daemon has left mounted, innermost first."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in reversed([path for path in mounted if path.startswith(f"{folder}/")]):
        subprocess.run(["umount", "--lazy", path], timeout=30, check=True)
