"""A container load that is cancelled at any of its steps leaves neither an open stream nor a running container.

The runtime is a stub that can be interrupted at any step; the tests on a real runtime are in `test_vllm.py`.
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
    """The output of a container: it is empty and ends when closed."""

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
    """One container. `at` is the step before which `meanwhile` is called, or after which, as in `after create`."""

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
    """`stop` comes from another thread at any step: no stream stays open, nothing runs, and no exit is reported."""
    runtime, exits = StubRuntime(at), []
    instance = launch(runtime, exits)
    stopper = threading.Thread(target=instance.stop, args=(1.0,), daemon=True)

    def stop() -> None:
        stopper.start()
        if at != "start":  # stop waits for a start that is in progress
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
    """After an unexpected error, no stream stays open and no container remains."""
    runtime = StubRuntime("settle")

    def fail() -> None:
        raise RuntimeError("nobody foresaw this")

    runtime.meanwhile = fail
    with pytest.raises(RuntimeError):
        launch(runtime, []).wait_ready(lambda _: None, TIMEOUT)
    assert runtime.outputs[0].closed.is_set()
    assert runtime.state is None


def test_an_orphan_is_given_up_when_it_refuses_twice_or_stays_silent():
    """Two refusals in a row or more than a minute of silence end an orphan; alternating refusals and silences don't."""
    left = Orphan()
    assert [left.is_over("absent", 0), left.is_over("absent", 2)] == [False, True]
    left = Orphan()
    assert [left.is_over(seen, at) for at, seen in enumerate(["absent", "silent", "absent", "silent"])] == [False] * 4
    left = Orphan()
    assert [left.is_over("silent", at) for at in (0, 59, 61)] == [False, False, True]
