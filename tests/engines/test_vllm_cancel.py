"""A load in a container that is cancelled at each of its steps: nothing of it stays, neither a stream nor a container.

The runtime is a stub that stops wherever a test wants it to; the promises about a real one are in `test_vllm.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping

import pytest

from services.engines.containers.port import Container, ContainerSpec
from services.engines.port import Exit, LoadFailed, Model
from services.engines.vllm.engine import Orphan
from services.engines.vllm.instance import InstanceContext, VllmInstance

TIMEOUT = 10.0


class Output:
    """What a container says: nothing, until it is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        assert self.closed.wait(TIMEOUT), "the stream was never closed"
        raise StopIteration

    def close(self) -> None:
        self.closed.set()


class StubRuntime:
    """One container. `at` is the step at which `meanwhile` is called, before or after (`after create`) it is done."""

    def __init__(self, at: str) -> None:
        self._at = at
        self.meanwhile: Callable[[], object] = lambda: None
        self.state: str | None = None
        self.outputs: list[Output] = []
        self.starts = 0

    def _step(self, name: str) -> None:
        if name == self._at:
            self._at = ""
            self.meanwhile()

    def by_name(self, _name: str) -> Container | None:
        return None

    def create(self, _spec: ContainerSpec) -> str:
        self._step("create")
        self.state = "created"
        self._step("after create")
        return "c1"

    def inspect(self, _container_id: str) -> Container:
        self._step("inspect")
        return Container("c1", "name", self.state or "dead", "image", {})  # type: ignore[arg-type]

    def attach(self, _container_id: str) -> Output:
        self._step("attach")
        self.outputs.append(Output())
        self._step("after attach")
        return self.outputs[-1]

    def start(self, _container_id: str) -> None:
        self.state = "running"
        self.starts += 1
        self._step("start")

    def stop(self, _container_id: str, _grace: float) -> None:
        if self.state == "running":
            self.state = "exited"

    def remove(self, _container_id: str) -> None:
        self.state = None

    def wait(self, _container_id: str, _timeout: float) -> int | None:
        return None if self.state == "running" else 0

    def logs_tail(self, _container_id: str, _lines: int) -> str:
        return ""

    def pids(self, _container_id: str) -> Collection[int]:
        return ()


def launch(runtime: StubRuntime, exits: list[Exit]) -> VllmInstance:
    spec = ContainerSpec("name", "image", 8000)
    nothing: Mapping[str, object] = {}
    host = InstanceContext(
        runtime,  # type: ignore[arg-type]
        gpu_bytes=lambda _device, _pids: 0,
        settle=lambda _device: runtime._step("settle"),
        on_end=lambda _container: None,
        kept_asleep={},
        shard_bytes=lambda _model: (),
    )
    return VllmInstance(host, Model("m", "vllm", "m", options=nothing), spec, "GPU-1", exits.append)


@pytest.mark.parametrize(
    "at", ["create", "after create", "inspect", "attach", "after attach", "settle", "start", "nothing"]
)
def test_a_load_that_is_cancelled_leaves_nothing(at: str):
    """Whichever step it is at when `stop` comes from another thread: no stream open, nothing running, no exit told."""
    runtime, exits = StubRuntime(at), []
    instance = launch(runtime, exits)
    stopper = threading.Thread(target=instance.stop, args=(1.0,), daemon=True)

    def stop() -> None:
        stopper.start()
        if at != "start":  # a stop waits for the start that is under way
            stopper.join(TIMEOUT)
            assert not stopper.is_alive()

    runtime.meanwhile = stop
    if at == "nothing":
        stop()
    with pytest.raises(LoadFailed, match="stopped"):
        instance.wait_ready(lambda _: None, TIMEOUT)
    stopper.join(TIMEOUT)
    assert not stopper.is_alive()
    assert all(output.closed.wait(TIMEOUT) for output in runtime.outputs)
    assert runtime.state == ("exited" if at == "start" else None)
    assert runtime.starts == (1 if at == "start" else 0)
    assert exits == []


def test_a_load_whose_start_fails_leaves_nothing():
    """The same for any other error."""
    runtime = StubRuntime("settle")

    def fail() -> None:
        raise RuntimeError("nobody foresaw this")

    runtime.meanwhile = fail
    with pytest.raises(RuntimeError):
        launch(runtime, []).wait_ready(lambda _: None, TIMEOUT)
    assert runtime.outputs[0].closed.is_set()
    assert runtime.state is None


def test_what_was_left_behind_is_ended_when_it_can_not_be_adopted():
    """Refusing twice in a row, or silent for more than a minute; a busy one that answers now and then is left alone."""
    left = Orphan()
    assert [left.is_over("absent", 0), left.is_over("absent", 2)] == [False, True]
    left = Orphan()
    assert [left.is_over(seen, at) for at, seen in enumerate(["absent", "silent", "absent", "silent"])] == [False] * 4
    left = Orphan()
    assert [left.is_over("silent", at) for at in (0, 59, 61)] == [False, False, True]
