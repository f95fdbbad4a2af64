"""The port's conformance suite on the engines of the local image and vision servers, with fakes of both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import requests

from services.cancellation import Cancelled, CancelToken
from services.engines.port import (
    Endpoint,
    EngineError,
    Evidence,
    Exit,
    Instance,
    LoadFailed,
    Model,
    Need,
    NotResponding,
    Usage,
)
from services.engines.processes import ProcessRegistry
from services.engines.python_server.about import FLUX, VISION, About
from services.engines.python_server.engine import Machine, PythonServerEngine
from services.engines.python_server.packages import Packages
from services.memory.ledger import Reading
from tests.engines.conformance import GRACE, LOAD_SECONDS, EngineCase, PortConformance
from tests.support.console import ROOT, free_port, wait_until

FAKES = ROOT / "tests" / "fakes" / "local_servers"
HOST = Reading("host", "System memory", "host", 64 * 10**9, 40 * 10**9)
GPU = Reading("GPU-1", "Fake GPU", "gpu", 24 * 10**9, 20 * 10**9)

MakeEngine = Callable[..., PythonServerEngine]


def model(about: About, **environment: str) -> Model:
    """The engine's own model, with faults."""
    (name,) = about.names
    return Model(name, about.name, name, options={"environment": environment})


def serves(endpoint: Endpoint) -> bool:
    try:
        return requests.get(f"{endpoint.origin}/health", timeout=5).json()["status"] == "ready"
    except requests.ConnectionError:
        return False


def kill(instance: Instance) -> None:
    assert instance.pid is not None
    os.kill(instance.pid, signal.SIGKILL)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def make_engine(tmp_path: Path, port: int) -> Iterator[MakeEngine]:
    """Make engines on one state folder and one port, each like one run of the app; their server ends with the test."""
    made: list[PythonServerEngine] = []

    def make(about: About = FLUX, *, polled: bool = True, machine: Machine | None = None) -> PythonServerEngine:
        registry = ProcessRegistry(tmp_path / "state")
        registry.end_leftovers()
        (name,) = about.names
        engine = PythonServerEngine(
            about,
            f"http://127.0.0.1:{port}",
            name,
            registry,
            Packages(FAKES, tmp_path / "no-environment"),
            machine=machine or Machine(lambda: [HOST], lambda _device, _pid: None, lambda _device: []),
        )
        engine.discover()
        if polled:
            engine.prepare()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
    for engine in made:
        if engine.supervisor.process is not None:
            engine.supervisor.stop(GRACE)


@pytest.fixture
def flux(make_engine: MakeEngine) -> PythonServerEngine:
    return make_engine()


class Conformance(PortConformance):
    @pytest.fixture(params=[FLUX, VISION], ids=lambda about: about.name)
    def case(self, request: pytest.FixtureRequest, make_engine: MakeEngine) -> EngineCase:
        about: About = request.param
        damaged = model(about, **{f"FAKE_{about.name.upper()}_FAULT": "die-loading"})
        return EngineCase(make_engine(about), model(about), None, damaged, end=kill, serves=serves)


class TestPythonServers(Conformance):
    """The conformance suite on both engines."""


def load(engine: PythonServerEngine, exits: list[Exit] | None = None, **environment: str) -> Instance:
    """Load the engine's model; the test ends the server."""
    instance = engine.launch(engine.describe(model(engine.about, **environment)), (exits or []).append)
    instance.wait_ready(lambda _: None, LOAD_SECONDS)
    return instance


def test_the_download_of_a_first_start_is_reported_in_bytes(flux: PythonServerEngine) -> None:
    """As the stage `downloading`, before the weights are loaded."""
    seen: list[Evidence] = []
    slow = model(FLUX, FAKE_FLUX_FAULT="download:12000000000,slow-load:1")
    instance = flux.launch(flux.describe(slow), lambda _: None)
    endpoint = instance.wait_ready(seen.append, LOAD_SECONDS)
    fetched = [evidence for evidence in seen if evidence.stage == "downloading"]
    assert len(fetched) > 2
    assert all("of 12.0 GB downloaded" in (evidence.detail or "") for evidence in fetched)
    fractions = [evidence.fraction or 0.0 for evidence in fetched]
    assert fractions == sorted(fractions)
    instance.warm_up(LOAD_SECONDS)
    assert serves(endpoint)


def test_what_is_missing_is_downloaded_before_the_server_is_started(flux: PythonServerEngine) -> None:
    """So that the switch has freed no memory yet. It is asked for once in a run of the app."""
    seen: list[Evidence] = []
    entry = flux.describe(model(FLUX, FAKE_FLUX_FAULT="fetch:12000000000,slow-load:1"))
    flux.fetch(entry, seen.append, CancelToken())
    assert {evidence.stage for evidence in seen} == {"downloading"}
    assert seen[-1].fraction == 0.95
    assert seen[-1].detail == "11.4 of 12.0 GB downloaded"
    assert flux.supervisor.process is None
    again: list[Evidence] = []
    flux.fetch(entry, again.append, CancelToken())
    assert again == []


def test_a_download_that_fails_has_its_cause(flux: PythonServerEngine) -> None:
    entry = flux.describe(model(FLUX, FAKE_FLUX_FAULT="fetch-fails"))
    with pytest.raises(EngineError, match="What Flux loads could not be downloaded: The Hugging Face hub can't be"):
        flux.fetch(entry, lambda _: None, CancelToken())


def test_a_download_can_be_cancelled(flux: PythonServerEngine, tmp_path: Path) -> None:
    """Within a second; its process is gone."""
    entry = flux.describe(model(FLUX, FAKE_FLUX_FAULT="fetch:12000000000,slow-load:600"))
    token = CancelToken()
    with pytest.raises(Cancelled):
        flux.fetch(entry, lambda _: token.cancel(), token)
    assert list((tmp_path / "state" / "processes").iterdir()) == []


def test_a_start_that_makes_progress_is_not_given_up(flux: PythonServerEngine) -> None:
    """Of a download that takes longer than the limit, only the time without progress counts."""
    slow = model(FLUX, FAKE_FLUX_FAULT="download:1000,slow-load:2")
    instance = flux.launch(flux.describe(slow), lambda _: None)
    assert serves(instance.wait_ready(lambda _: None, 1.0))


def test_a_start_without_progress_is_given_up(flux: PythonServerEngine) -> None:
    instance = flux.launch(flux.describe(model(FLUX, FAKE_FLUX_FAULT="hang-health")), lambda _: None)
    with pytest.raises(LoadFailed, match="did not answer"):
        instance.wait_ready(lambda _: None, 0.1)
    assert flux.supervisor.process is None


def test_a_load_that_runs_out_of_memory_says_what_was_free_and_what_to_unload(make_engine: MakeEngine) -> None:
    machine = Machine(lambda: [HOST], lambda _device, _pid: None, lambda _: ["large", "flux-schnell"])
    with pytest.raises(LoadFailed) as caught:
        load(make_engine(machine=machine), FAKE_FLUX_FAULT="load-oom")
    assert "2.0 GB were free" in caught.value.cause
    assert "12.0 GB are needed" in caught.value.cause
    assert "Unload large to make room" in caught.value.cause


def test_a_first_request_that_runs_out_of_memory_fails_the_load(flux: PythonServerEngine) -> None:
    instance = load(flux, FAKE_FLUX_FAULT="oom")
    with pytest.raises(LoadFailed, match=r"2\.0 GB were free"):
        instance.warm_up(LOAD_SECONDS)


def test_a_load_that_fails_has_the_servers_own_words(flux: PythonServerEngine) -> None:
    """Not only that its process ended."""
    with pytest.raises(LoadFailed, match=r"transformer/model\.safetensors is damaged") as caught:
        load(flux, FAKE_FLUX_FAULT="die-loading")
    assert "Traceback" in caught.value.log_tail


def test_a_server_that_dies_in_the_middle_of_its_work_is_reported(flux: PythonServerEngine) -> None:
    exits: list[Exit] = []
    instance = flux.launch(flux.describe(model(FLUX, FAKE_FLUX_FAULT="die-generating")), exits.append)
    instance.wait_ready(lambda _: None, LOAD_SECONDS)
    with pytest.raises(LoadFailed, match="exit code 3"):
        instance.warm_up(LOAD_SECONDS)


def test_the_next_run_adopts_the_server_and_can_stop_it(make_engine: MakeEngine) -> None:
    """Closing the app leaves the server with its model; the next run finds both."""
    first = make_engine()
    before = load(first).pid
    first.close()

    second = make_engine()
    entry = second.describe(model(FLUX))
    assert list(second.loaded([entry])) == [entry]
    adopted = second.adopt(entry, lambda _: None)
    assert adopted is not None
    assert (adopted.pid, adopted.model.started_elsewhere, adopted.warning()) == (before, False, None)
    assert serves(adopted.wait_ready(lambda _: None, 0))
    adopted.stop(GRACE)
    assert second.loaded([entry]) == ()
    wait_until(lambda: not psutil.pid_exists(before or 0), "the server to be reaped by its parent, this process")


def test_a_server_that_still_loads_is_adopted_once_it_is_ready(make_engine: MakeEngine) -> None:
    """The app was killed while it loaded: a download of many gigabytes is not thrown away."""
    first = make_engine()
    first.launch(first.describe(model(FLUX, FAKE_FLUX_FAULT="slow-load:1.5")), lambda _: None)
    wait_until(lambda: first.supervisor.status().preparation is not None, "the load")
    first.close()

    second = make_engine()
    entry = second.describe(model(FLUX))
    with pytest.raises(NotResponding):
        second.adopt(entry, lambda _: None)
    wait_until(lambda: second.supervisor.status().state == "running", "the server to be ready")
    adopted = second.adopt(entry, lambda _: None)
    assert adopted is not None


def test_a_load_under_way_since_an_earlier_run_can_be_joined(make_engine: MakeEngine) -> None:
    first = make_engine()
    first.launch(first.describe(model(FLUX, FAKE_FLUX_FAULT="slow-load:1.5")), lambda _: None)
    wait_until(lambda: first.supervisor.status().preparation is not None, "the load")
    pid = first.supervisor.status().pid
    first.close()
    assert load(make_engine()).pid == pid


def test_a_server_of_an_earlier_run_that_never_answers_is_stopped_with_its_load(make_engine: MakeEngine) -> None:
    """Its memory was still taken after the load had failed, and nothing would have freed it."""
    first = make_engine(polled=False)
    first.launch(first.describe(model(FLUX, FAKE_FLUX_FAULT="hang-health")), lambda _: None)
    wait_until(lambda: first.supervisor.process is not None, "the server")
    first.close()
    second = make_engine(polled=False)
    instance = second.launch(second.describe(model(FLUX)), lambda _: None)
    with pytest.raises(LoadFailed, match="did not answer"):
        instance.wait_ready(lambda _: None, 0.1)
    instance.stop(GRACE)
    assert second.supervisor.process is None


@pytest.fixture(params=[FLUX], ids=lambda about: about.name)
def by_hand(request: pytest.FixtureRequest, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server as somebody starts it in a terminal, ready."""
    script = FAKES / request.param.script
    server = subprocess.Popen([sys.executable, str(script), "--port", str(port)], stderr=subprocess.DEVNULL)
    endpoint = Endpoint(f"http://127.0.0.1:{port}")
    wait_until(lambda: serves(endpoint), "the server", LOAD_SECONDS)
    yield server
    server.kill()
    server.wait()


def test_a_server_started_by_hand_is_used_and_never_stopped(
    by_hand: subprocess.Popen[bytes], make_engine: MakeEngine
) -> None:
    engine = make_engine()
    entry = engine.describe(model(FLUX))
    exits: list[Exit] = []
    wait_until(lambda: bool(engine.loaded([entry])), "the first poll of the server")
    adopted = engine.adopt(entry, exits.append)
    assert adopted is not None
    assert adopted.pid == by_hand.pid
    assert adopted.model.started_elsewhere
    with pytest.raises(EngineError, match="Another program started"):
        adopted.stop(GRACE)
    assert by_hand.poll() is None
    assert "not stopped from here" in (adopted.warning() or "")
    usage = adopted.usage()
    assert usage is not None
    assert usage.bytes > 1_000_000
    by_hand.terminate()
    wait_until(lambda: bool(exits), "its end to be noticed")
    assert exits[0].released


@pytest.mark.parametrize("by_hand", [VISION], ids=["vision"], indirect=True)
@pytest.mark.usefixtures("by_hand")
def test_the_vision_server_at_its_address_is_not_taken_for_flux(make_engine: MakeEngine) -> None:
    """Both tell their health in the same form; where two settings are mixed up, no pictures come from it."""
    engine = make_engine()
    status = engine.supervisor.refresh()
    assert status.state == "unreachable"
    assert "is not Flux: it says that it is vision" in (status.error or "")
    assert "flux_api_url" in (status.error or "")
    assert not engine.loaded([engine.describe(model(FLUX))])


def test_a_port_that_another_program_uses_is_explained(flux: PythonServerEngine, port: int) -> None:
    """With the program's name; the server could not listen."""
    taken = closing(socket.create_server(("127.0.0.1", port)))
    with taken, pytest.raises(LoadFailed, match=f"process {os.getpid()}") as caught:
        load(flux)
    assert f"port {port}" in caught.value.cause
    assert "flux_api_url" in caught.value.cause


def test_a_load_of_another_model_under_way_is_not_taken_for_the_own(make_engine: MakeEngine) -> None:
    """It was begun by an earlier run of the app."""
    first = make_engine()
    slow = Model("slow", "flux", "org/slow", options={"environment": {"FAKE_FLUX_FAULT": "slow-load:60"}})
    first.launch(first.describe(slow), lambda _: None)
    wait_until(lambda: first.supervisor.status().preparation is not None, "the load")
    first.close()
    second = make_engine()
    wait_until(lambda: second.supervisor.status().preparation is not None, "the load")
    with pytest.raises(EngineError, match="still loading org/slow"):
        load(second)


def test_one_server_holds_one_model(flux: PythonServerEngine) -> None:
    load(flux)
    other = flux.describe(Model("other", "flux", "org/other"))
    with pytest.raises(EngineError, match="one model at a time, and holds flux-schnell"):
        flux.launch(other, lambda _: None)


def test_a_server_that_hangs_is_noticed(flux: PythonServerEngine) -> None:
    """Its process is stopped in the way of a machine that swaps: it accepts connections and answers nothing."""
    instance = load(flux)
    assert instance.pid is not None
    os.kill(instance.pid, signal.SIGSTOP)
    try:
        assert instance.responds(0.2) is False
        wait_until(lambda: "hangs" in (instance.warning() or ""), "the warning")
    finally:
        os.kill(instance.pid, signal.SIGCONT)


@pytest.mark.parametrize(("by_driver", "on_gpu"), [(7_000_000_000, 7_000_000_000), (None, 6_000_000_000)])
def test_memory_on_a_gpu_is_the_drivers_figure_or_else_the_servers(
    make_engine: MakeEngine, by_driver: int | None, on_gpu: int
) -> None:
    """The server may use that GPU only."""
    engine = make_engine(polled=False, machine=Machine(lambda: [HOST, GPU], lambda *_: by_driver, lambda _: []))
    instance = load(engine)
    engine.program.report = replace(engine.program.report, device="cuda:0", memory_bytes=6_000_000_000)
    assert instance.usage() == Usage("GPU-1", on_gpu)
    assert instance.warning() is None
    assert psutil.Process(instance.pid).environ()["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def test_a_server_that_does_not_use_the_gpu_holds_ram(make_engine: MakeEngine) -> None:
    """Packages for the processor alone: nothing is on the GPU that the plan had in mind, and the page says so."""
    engine = make_engine(machine=Machine(lambda: [HOST, GPU], lambda *_: 7_000_000_000, lambda _: []))
    usage = load(engine).usage()
    assert usage is not None
    assert (usage.device, usage.bytes) == ("GPU-1", 0)
    assert usage.spilled_bytes > 1_000_000
    assert engine._current is not None
    assert "processor" in (engine._current.warning() or "")


@pytest.mark.parametrize(
    ("total", "needed"), [(80 * 10**9, 37 * 10**9), (32 * 10**9, 27 * 10**9), (24 * 10**9, 4 * 10**9)]
)
def test_what_flux_needs_follows_the_size_of_the_gpu(make_engine: MakeEngine, total: int, needed: int) -> None:
    """What its server leaves there when it keeps the rest in RAM; a listed entry's own figure replaces that."""
    gpu = replace(GPU, total_bytes=total)
    engine = make_engine(polled=False, machine=Machine(lambda: [HOST, gpu], lambda *_: None, lambda _: []))
    entry = engine.describe(model(FLUX))
    assert engine.estimate(entry) == Need("GPU-1", needed, "estimated")
    assert engine.estimate(replace(entry, required_bytes=1)).bytes == 0


def test_without_its_packages_it_is_not_offered_and_they_are_named(tmp_path: Path, port: int) -> None:
    (tmp_path / "flux_service.py").touch()
    (tmp_path / "requirements.txt").write_text("no-such-package==1.0\npytest>1  # is here\n")
    engine = PythonServerEngine(
        FLUX,
        f"http://127.0.0.1:{port}",
        "flux-schnell",
        ProcessRegistry(tmp_path / "state"),
        Packages(tmp_path, tmp_path / "env"),
    )
    assert engine.discover() == ()
    assert engine.program.packages.missing() == ("no-such-package==1.0",)
    listed = engine.describe(model(FLUX))
    assert "no-such-package==1.0" in (listed.fault or "")
    with pytest.raises(EngineError, match="no-such-package"):
        engine.launch(listed, lambda _: None)
    before = time.monotonic()
    (tmp_path / "requirements.txt").write_text("")
    os.utime(tmp_path / "requirements.txt", (before, before + 5))
    assert engine.describe(model(FLUX)).fault is None


def test_an_entry_that_lists_the_default_model_under_another_id_is_the_one_to_start(flux: PythonServerEngine) -> None:
    """The catalogue has that entry alone: the start by the services' API named one that it had dropped."""
    assert flux.model_id == "flux-schnell"
    flux.discover()
    flux.describe(Model(id="painter", engine="flux", source="flux-schnell"))
    flux.discover()
    assert flux.model_id == "painter"
