"""Uses the container runtime as the app does, with everything patched; run by test_docker_runtime.

Arguments: where Docker answers, the fake's image, the daemon's pid. Ends with 0 when all went well.
"""

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from contextlib import closing  # noqa: E402

import gevent  # noqa: E402
from gevent.event import Event  # noqa: E402

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
    events = runtime.events({})
    listener = gevent.spawn(next, events)
    runtime.stop(container_id, 5)
    assert listener.get(timeout=TIMEOUT).kind == "die"
    listener = gevent.spawn(list, events)
    gevent.sleep(0)  # it reads
    events.close()
    assert listener.get(timeout=TIMEOUT) == []
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
    assert max(pauses) < LONGEST_PAUSE, f"the loop stood still for {max(pauses):.2f} s"


def read(output: Stream[bytes], ready: Event) -> None:
    """Until the output is closed; `ready` is set once the container has said that it serves."""
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
