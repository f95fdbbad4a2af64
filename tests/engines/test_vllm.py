"""The port's conformance suite on the vllm engine, in real containers of a fake that replays vLLM's logs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from services.cancellation import CancelToken
from services.downloads.huggingface.process import HubProcess
from services.downloads.huggingface.vllm_weights import VllmWeights
from services.engines.containers.docker_runtime import DockerRuntime
from services.engines.containers.port import MANAGED_LABEL
from services.engines.port import Endpoint, EngineError, Evidence, Instance, LoadFailed, Model, NotResponding
from services.engines.vllm.engine import Vllm
from services.engines.vllm.spec import VllmSettings, container_name, required_bytes, share_of, spec_of
from services.memory.ledger import Reading
from tests.engines.conformance import GRACE, LOAD_SECONDS, EngineCase, EngineConformance
from tests.fakes.gpu.pynvml import TOTAL_BYTES, held_on
from tests.support.console import wait_until
from tests.support.docker import FAKE_VLLM_IMAGE, DockerEngine
from tests.support.hub import SHARDED_MODEL, TINY_MODEL, fill_cache
from tests.support.vllm import GPU_NAME, ON_GPU

HOST = Reading("host", "System memory", "host", 16 * 10**9, 12 * 10**9)
GPU = Reading("GPU-1", "Fake GPU", "gpu", TOTAL_BYTES, TOTAL_BYTES)
OWNER = "test"


def model(name: str, **faults: object) -> Model:
    environment = {"FAKE_VLLM": json.dumps({"load_seconds": 0.4, **ON_GPU, **faults})}
    return Model(name, "vllm", f"org/{name}", size_bytes=10_000_000, options={"environment": environment})


def _gpu_bytes(_device: str, pids: Collection[int]) -> int:
    return sum(size for pid, size in held_on(GPU_NAME) if pid in pids)


def _serves(endpoint: Endpoint) -> bool:
    try:
        return requests.get(f"{endpoint.origin}/health", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


@pytest.fixture
def make_engine(docker: DockerEngine, tmp_path: Path) -> Iterator[Callable[..., Vllm]]:
    """Make engines on the real daemon, as restarts of the app would; their models are already in the cache."""
    made: list[Vllm] = []
    for name, files in {"good": SHARDED_MODEL, "other": TINY_MODEL, "damaged": TINY_MODEL}.items():
        fill_cache(tmp_path / "hub", f"org/{name}", files)

    def make(*models: Model, owner: str = OWNER, docker: DockerEngine = docker, on: Reading = HOST) -> Vllm:
        settings = VllmSettings(
            FAKE_VLLM_IMAGE,
            owner,
            tmp_path / "hub",
            tmp_path / "compiled",
            shm_bytes=64_000_000,
            environment={"HF_HUB_OFFLINE": "1"},
        )
        weights = VllmWeights(tmp_path / "hub", HubProcess())
        engine = Vllm(
            lambda: DockerRuntime(docker.host), settings, weights, readings=lambda: [on], gpu_bytes=_gpu_bytes
        )
        for listed in models:
            engine.describe(listed)
        engine.prepare()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
    docker.remove_containers()


class TestVllmOnGpu(EngineConformance):
    """The conformance suite on a GPU, where models can sleep."""

    @pytest.fixture
    def case(self, gpu_docker: DockerEngine, make_engine: Callable[..., Vllm]) -> Iterator[EngineCase]:
        good, other, damaged = model("good"), model("other"), model("damaged", log="corrupt-shard")
        engine = make_engine(good, other, damaged, docker=gpu_docker, on=GPU)

        def end(instance: Instance) -> None:
            gpu_docker.client.kill(_container_of(instance))

        yield EngineCase(engine, good, other, damaged, end=end, serves=_serves)
        gpu_docker.remove_containers()

    def test_a_loaded_model_has_a_sleep_footprint(self, case: EngineCase):
        """The footprint comes from the size of the weights in the log."""
        with case.ready() as (instance, _):
            rest = instance.sleep_footprint()
            assert rest is not None
            assert rest.host_bytes > 0


class TestVllm(EngineConformance):
    """The conformance suite, and tests specific to containers."""

    @pytest.fixture
    def case(self, docker: DockerEngine, make_engine: Callable[..., Vllm]) -> EngineCase:
        good, other, damaged = model("good", hold_mb=30), model("other"), model("damaged", log="corrupt-shard")

        def end(instance: Instance) -> None:
            docker.client.kill(_container_of(instance))

        return EngineCase(make_engine(good, other, damaged), good, other, damaged, end=end, serves=_serves)

    def test_every_stage_is_reported_and_shards_are_counted(self, case: EngineCase):
        """Stages and shards come from the live output, including progress bars; file sizes come from the cache."""
        seen: list[Evidence] = []
        instance = case.launch(model("good", load_seconds=1.5))
        instance.wait_ready(seen.append, LOAD_SECONDS)
        instance.stop(GRACE)
        assert {e.stage for e in seen} >= {"loading_weights", "initializing_gpu", "warming_up"}
        assert "3 of 6 shards, 0.6 of 1.2 MB" in [e.detail for e in seen]

    def test_an_unexpected_exit_with_code_0_is_a_failure(self, case: EngineCase):
        """vLLM can exit with code 0 when its engine dies after it was ready."""
        instance = case.launch(model("good", exit_ready=0.3))
        instance.wait_ready(lambda _: None, LOAD_SECONDS)
        wait_until(lambda: bool(case.exits), "the exit to be reported")
        assert "as if all were well" in case.exits[0].cause
        assert not case.exits[0].released

    def test_the_removal_of_a_container_is_reported(self, case: EngineCase, docker: DockerEngine):
        """Another program removes the running container by force."""
        with case.ready() as (instance, _):
            docker.client.remove_container(_container_of(instance), force=True)
            wait_until(lambda: bool(case.exits), "the exit to be reported")

    def test_an_out_of_memory_error_has_the_figures(self, case: EngineCase):
        """The error is the first cause, not the later `Engine core initialization failed`."""
        instance = case.launch(model("good", out_of_memory=True))
        with pytest.raises(LoadFailed, match="CUDA out of memory") as caught:
            instance.wait_ready(lambda _: None, LOAD_SECONDS)
        instance.stop(GRACE)
        assert "1.2 GB of 25.3 GB was free" in str(caught.value)
        assert "See root cause above" not in str(caught.value)

    def test_a_hanging_load_can_be_stopped(self, case: EngineCase):
        """The load fails at its time limit; stopping it reports no exit."""
        instance = case.launch(model("good", hang_at="loading_weights"))
        with pytest.raises(LoadFailed, match="not ready in time"):
            instance.wait_ready(lambda _: None, 3)
        instance.stop(GRACE)
        assert case.exits == []

    def test_a_container_that_ignores_sigterm_is_killed(self, case: EngineCase):
        """The container is killed after the grace period."""
        instance = case.launch(model("good", ignore_sigterm=True))
        endpoint = instance.wait_ready(lambda _: None, LOAD_SECONDS)
        instance.stop(1)
        assert not case.serves(endpoint)

    def test_a_stopped_container_is_reused_until_its_spec_changes(self, case: EngineCase):
        """The same spec reuses the container; a changed spec replaces it."""
        ids = []
        for wanted in (case.good, case.good, replace(case.good, options={**case.good.options, "context_length": 512})):
            instance = case.launch(wanted)
            instance.wait_ready(lambda _: None, LOAD_SECONDS)
            ids.append(_container_of(instance))
            instance.stop(GRACE)
        assert ids[0] == ids[1] != ids[2]

    def test_a_foreign_container_with_the_same_name_is_left_alone(self, case: EngineCase, docker: DockerEngine):
        """The load fails with a clear error; the foreign container stays running."""
        foreign = docker.run_foreign(container_name("good", OWNER), ["org/x"])
        instance = case.launch()
        with pytest.raises(EngineError, match="did not make"):
            instance.wait_ready(lambda _: None, LOAD_SECONDS)
        instance.stop(GRACE)
        assert docker.client.inspect_container(foreign)["State"]["Running"]

    def test_a_missing_image_is_named_before_the_load(self, case: EngineCase):
        """No registry is reachable: `fetch` fails with the image's name, before other models are unloaded."""
        options = {**case.good.options, "image": "127.0.0.1:9/nowhere/vllm:1"}
        seen: list[Evidence] = []
        with pytest.raises(EngineError) as caught:
            case.engine.fetch(replace(case.good, options=options), seen.append, CancelToken())
        assert "nowhere/vllm" in str(caught.value)
        assert [evidence.stage for evidence in seen] == ["downloading"]

    def test_a_restarted_app_adopts_a_ready_container(self, case: EngineCase, make_engine: Callable[..., Vllm]):
        """The container is found by its label, keeps its endpoint, is measured, and can be stopped."""
        with case.ready() as (_, endpoint):
            later = make_engine(case.good)
            wait_until(lambda: case.good in later.loaded([case.good]), "the container to be found")
            adopted = later.adopt(case.good, case.exits.append)
            assert adopted is not None
            assert adopted.wait_ready(lambda _: None, 0) == endpoint
            wait_until(lambda: adopted.usage() is not None, "its memory to be measured")
            adopted.stop(GRACE)
            assert not case.serves(endpoint)
            assert case.good not in later.loaded([case.good])

    def test_a_restarted_app_removes_half_loaded_containers(
        self, docker: DockerEngine, make_engine: Callable[..., Vllm]
    ):
        """Their logs were not followed, so they can't be adopted; another Switchyard's containers are left alone."""
        settings = VllmSettings(FAKE_VLLM_IMAGE, OWNER, Path("/tmp"), Path("/tmp"), shm_bytes=64_000_000)
        half = spec_of(model("half", hang_at="loading_weights"), settings, device="host", share=None)
        others = spec_of(
            model("theirs", hang_at="loading_weights"), replace(settings, owner="other"), device="host", share=None
        )
        with closing(DockerRuntime(docker.host)) as runtime:
            for spec in (half, others):
                runtime.start(runtime.create(spec))
            make_engine(model("half"))
            wait_until(lambda: runtime.by_name(half.name) is None, "the half loaded one to be removed")
            assert runtime.by_name(others.name) is not None

    def test_a_restarted_app_gives_a_slow_server_time(
        self, case: EngineCase, docker: DockerEngine, make_engine: Callable[..., Vllm]
    ):
        """A server that accepts connections but doesn't answer yet stays listed as loaded, and is adopted later."""
        with case.ready() as (instance, endpoint):
            _signal_all(docker, instance, signal.SIGSTOP)
            later = make_engine(case.good)
            wait_until(lambda: case.good in later.loaded([case.good]), "the silent container to be found")
            with pytest.raises(NotResponding, match="does not answer yet"):
                later.adopt(case.good, case.exits.append)
            _signal_all(docker, instance, signal.SIGCONT)
            adopted = _adopted(later, case.good)
            assert adopted.wait_ready(lambda _: None, 0) == endpoint
            adopted.stop(GRACE)

    def test_a_container_that_stays_silent_is_removed(
        self, case: EngineCase, docker: DockerEngine, make_engine: Callable[..., Vllm], monkeypatch: pytest.MonkeyPatch
    ):
        """After `ADOPT_TIMEOUT` without an answer the container is removed, which frees its memory."""
        monkeypatch.setattr("services.engines.vllm.engine.ADOPT_TIMEOUT", 1.0)
        with case.ready() as (instance, _):
            _signal_all(docker, instance, signal.SIGSTOP)
            later = make_engine(case.good)
            wait_until(lambda: case.good in later.loaded([case.good]), "the silent container to be found")
            wait_until(lambda: bool(case.exits), "the container to be removed")
            wait_until(lambda: case.good not in later.loaded([case.good]), "it not to be named any more")
            assert later.adopt(case.good, case.exits.append) is None

    def test_stopping_the_daemon_ends_its_models(self, case: EngineCase, docker: DockerEngine):
        """A daemon that is shut down stops its containers; when it runs again, a load succeeds."""
        with case.ready(), docker.stopped():
            wait_until(lambda: bool(case.exits), "the exit to be reported")
        with case.ready() as (_, endpoint):
            assert case.serves(endpoint)

    def test_a_stopped_daemon_is_named_in_the_error(self, case: EngineCase, docker: DockerEngine):
        """`fetch` fails before other models are unloaded; if the daemon stops later, `wait_ready` fails."""
        instance = case.launch()
        with docker.stopped():
            with pytest.raises(EngineError, match="Docker"):
                case.engine.fetch(case.good, lambda _: None, CancelToken())
            with pytest.raises(EngineError, match="Docker"):
                instance.wait_ready(lambda _: None, LOAD_SECONDS)


def test_the_container_spec_has_what_docker_and_vllm_need(tmp_path):
    """The name is valid for Docker; a memory share is set on a GPU only; labels and the entry's options are set."""
    settings = VllmSettings("vllm/vllm-openai:latest", "me", tmp_path / "hub", tmp_path / "compiled")
    options = {
        "context_length": 4096,
        "revision": "v2",
        "arguments": ["--enforce-eager"],
        "environment": {"A": "b"},
        "shm_gb": 1,
    }
    wanted = Model("Qwen/Qwen2.5-0.5B-Instruct", "vllm", "Qwen/Qwen2.5-0.5B-Instruct", options=options)
    spec = spec_of(wanted, settings, device="GPU-1", share=0.25)
    assert spec.name.startswith("switchyard-Qwen-Qwen2.5-0.5B-Instruct-")
    assert spec.command[:3] == ("Qwen/Qwen2.5-0.5B-Instruct", "--served-model-name", "Qwen/Qwen2.5-0.5B-Instruct")
    assert ("--gpu-memory-utilization", "0.250") in zip(spec.command, spec.command[1:], strict=False)
    assert spec.command[-6:-2] == ("--revision", "v2", "--max-model-len", "4096")
    assert spec.command[-2:] == ("--enable-sleep-mode", "--enforce-eager")
    assert (spec.gpus, spec.shm_bytes) == (("GPU-1",), 10**9)
    assert spec.environment == {"A": "b", "VLLM_SERVER_DEV_MODE": "1"}
    assert spec.all_labels[MANAGED_LABEL] == "1"
    on_cpu = spec_of(wanted, settings, device="host", share=None)
    assert "--gpu-memory-utilization" not in on_cpu.command
    assert "--enable-sleep-mode" not in on_cpu.command
    assert on_cpu.environment == {"A": "b"}
    assert on_cpu.gpus == ()
    assert on_cpu.spec_hash != spec.spec_hash


@pytest.mark.parametrize(
    ("image", "sleeps"),
    [
        ("vllm/vllm-openai:v0.8.4", False),
        ("vllm/vllm-openai:v0.8.5", True),
        ("vllm/vllm-openai:v0.11.0", True),
        ("vllm/vllm-openai:latest", True),
        ("registry:5000/vllm", True),
    ],
)
def test_sleep_mode_is_enabled_where_the_image_supports_it(tmp_path, image, sleeps):
    """vLLM supports it since 0.8.5; older servers exit at an unknown flag. A settings entry can turn it off."""
    settings = VllmSettings(image, "me", tmp_path / "hub", tmp_path / "compiled")
    spec = spec_of(Model("a", "vllm", "a"), settings, device="GPU-1", share=0.5)
    assert ("--enable-sleep-mode" in spec.command) is sleeps
    awake = Model("a", "vllm", "a", options={"sleep": False})
    assert "--enable-sleep-mode" not in spec_of(awake, settings, device="GPU-1", share=0.5).command


@pytest.mark.parametrize(("need", "total", "share"), [(10, 100, 0.101), (0, 100, 0.02), (200, 100, 0.98), (5, 0, 0.98)])
def test_the_gpu_share_covers_the_need(need, total, share):
    """The share is rounded up and kept within the limits that vLLM accepts."""
    assert share_of(need, total) == pytest.approx(share)


def test_the_estimate_of_an_unknown_size_is_vllm_s_default_share(make_engine):
    """vLLM's default is nearly the whole GPU; on the CPU the estimate is 0."""
    unknown = Model("x", "vllm", "x")
    assert make_engine(on=GPU).estimate(unknown).bytes == round(0.92 * TOTAL_BYTES)
    assert make_engine().estimate(unknown).bytes == 0
    assert make_engine(on=GPU).estimate(model("x")).bytes == required_bytes(model("x")) > 10_000_000


def _adopted(engine: Vllm, wanted: Model) -> Instance:
    """Adopt the model as soon as it answers."""
    taken: list[Instance] = []

    def answers() -> bool:
        with suppress(NotResponding):
            taken.extend(filter(None, [engine.adopt(wanted, lambda _: None)]))
        return bool(taken)

    wait_until(answers, "it to be adopted")
    return taken[0]


def _signal_all(docker: DockerEngine, instance: Instance, number: signal.Signals) -> None:
    """Signal every process in the container: a stopped process still accepts connections, but doesn't answer."""
    for (pid,) in docker.client.top(_container_of(instance), ps_args="-eo pid")["Processes"]:
        os.kill(int(pid), number)


def _container_of(instance: Instance) -> str:
    container_id = instance.container_id  # type: ignore[attr-defined]
    assert container_id is not None
    return str(container_id)
