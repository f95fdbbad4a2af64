"""Uses the container runtime as the app does, with gevent's monkey patches; run by test_docker_runtime.

Arguments: Docker's address, the fake's image, the daemon's pid. The exit code is 0 on success.
"""

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from contextlib import closing  # noqa: E402

import gevent  # noqa: E402
from gevent.event import Event  # noqa: E402
from gevent.server import StreamServer  # noqa: E402

from services.cancellation import Cancelled, CancelToken  # noqa: E402
from services.engines.containers.docker_runtime import DockerRuntime  # noqa: E402
from services.engines.containers.port import ContainerSpec, RuntimeHangs, Stream  # noqa: E402
from tests.support.stopwatch import Stopwatch  # noqa: E402

LONGEST_PAUSE = 0.3
"""Seconds that the loop may stand still while there is a core for it."""
TIMEOUT = 60.0
"""Seconds after which what should happen is given up: it only ends a hang."""


def main(host: str, image: str, daemon: int) -> None:
    runtime = DockerRuntime(host, timeout=TIMEOUT)
    container_id = runtime.create(ContainerSpec("gevent", image, 8000, ("m",), {"FAKE_VLLM": '{"load_seconds": 0.2}'}))
    pauses: list[float] = []
    gevent.spawn(watch, pauses)
    output = runtime.attach(container_id)
    ready = Event()
    reader = gevent.spawn(read, output, ready)
    runtime.start(container_id)
    assert ready.wait(TIMEOUT), "nothing came of what the container wrote"
    assert runtime.wait(container_id, 0.1) is None
    output.close()
    reader.get(timeout=TIMEOUT)
    runtime.stop(container_id, 5)
    os.kill(daemon, signal.SIGSTOP)
    try:
        with closing(DockerRuntime(host, timeout=0.5)) as hasty:
            hasty.inspect(container_id)
    except RuntimeHangs:
        pass
    else:
        raise AssertionError("a daemon that hangs answered")
    finally:
        os.kill(daemon, signal.SIGCONT)
    runtime.remove(container_id)
    runtime.close()
    cancel_a_pull()
    assert max(pauses) < LONGEST_PAUSE, f"the loop stood still for {max(pauses):.2f} s"


def cancel_a_pull() -> None:
    """Cancel a pull whose daemon has begun to answer and then stalls: the connection is closed and its reader ends."""
    closed, token = Event(), CancelToken()

    def answer(link: socket.socket, _address: object) -> None:
        if link.recv(10_000).startswith(b"GET /version"):
            body = b'{"ApiVersion": "1.41"}'
            link.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            return
        line = b'{"id": "layer", "status": "Waiting"}\r\n'
        link.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(line), line))
        if link.recv(1) == b"":
            closed.set()

    with closing(StreamServer(("127.0.0.1", 0), answer)) as server:
        server.start()
        runtime = DockerRuntime(f"tcp://127.0.0.1:{server.server_port}", timeout=TIMEOUT)
        try:
            runtime.pull("image", lambda *_: token.cancel(), token)
        except Cancelled:
            assert closed.wait(TIMEOUT), "the connection to Docker is still open"
        else:
            raise AssertionError("a pull that was cancelled went well")
        runtime.close()


def read(output: Stream[bytes], ready: Event) -> None:
    """Read the output until it is closed; set `ready` once the container's log says that it serves."""
    written = b""
    for piece in output:
        written += piece
        if b"startup complete" in written:
            ready.set()


def watch(pauses: list[float]) -> None:
    while True:
        watch = Stopwatch()
        gevent.sleep(0.01)
        pauses.append(watch.waited)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
