"""A console with vLLM models: switched like any other, in real containers of the fake vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from tests.fakes.hub import COMMIT, FakeHub, Repo
from tests.support.console import Console, wait_until
from tests.support.docker import FAKE_VLLM_IMAGE, DockerEngine
from tests.support.hub import SHARDED_MODEL, TINY_MODEL, fill_cache, hub_environment
from tests.support.stopwatch import Stopwatch

StartConsole = Callable[..., Console]
A, B, BAD = "org/model-a", "org/model-b", "org/bad"


def entry(model: str, *, required_gb: float = 0.1, **faults: object) -> str:
    fake = json.dumps({"load_seconds": 0.6, **faults})
    return (
        f'[[models]]\nid = "{model}"\nengine = "vllm"\nsource = "{model}"\n'
        f"size_gb = 0.05\nrequired_gb = {required_gb}\n"
        f"[models.options]\nshm_gb = 0.064\nenvironment = {{ FAKE_VLLM = {json.dumps(fake)} }}\n"
    )


def big(model: str, **faults: object) -> str:
    """A model that holds what it declares: 300 MB."""
    return entry(model, required_gb=0.3, hold_mb=280, **faults)


SLOW, STUCK, TWIN, LONE = "org/slow", "org/stuck", "twin", "org/lone"
MODELS = (
    entry(A)
    + entry(B)
    + entry(SLOW, load_seconds=2)
    + entry(STUCK, hang_at="loading_weights")
    + entry(A).replace(f'id = "{A}"', f'id = "{TWIN}"')
    + entry(LONE)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache that holds the files of every model."""
    folder = tmp_path_factory.mktemp("vllm")
    for model in (A, B, BAD, STUCK, LONE):
        fill_cache(folder / "hub", model, TINY_MODEL)
    fill_cache(folder / "hub", SLOW, SHARDED_MODEL)
    return folder


@pytest.fixture(scope="module")
def start_with_cache(docker: DockerEngine, start_shared: StartConsole, folder: Path) -> Iterator[StartConsole]:
    """Start consoles with that cache."""

    def start(toml: str, **settings: object) -> Console:
        return start_shared(
            toml=toml,
            environment={"HF_HUB_OFFLINE": "1"},
            vllm_image=FAKE_VLLM_IMAGE,
            docker_host=docker.host,
            hub_cache_dir=folder / "hub",
            vllm_cache_dir=folder / "compiled",
            **settings,
        )

    yield start
    docker.remove_containers()


@pytest.fixture(scope="module")
def shared(start_with_cache: StartConsole) -> Console:
    """A console with the demo models beside those of vLLM."""
    return start_with_cache(MODELS)


@pytest.fixture(scope="module")
def shared_tight(start_with_cache: StartConsole) -> Console:
    return start_with_cache(big(A) + big(B) + big(BAD, out_of_memory=True), memory_budget_gb=0.4, standby="false")


@pytest.fixture
def console(docker: DockerEngine, console: Console) -> Iterator[Console]:
    """The module's console, with all containers removed."""
    docker.remove_containers()
    yield console.reset()
    console.reset()


@pytest.fixture
def tight(docker: DockerEngine, shared_tight: Console) -> Iterator[Console]:
    """A console at rest with memory for one model, with all containers removed."""
    docker.remove_containers()
    yield shared_tight.reset()
    shared_tight.reset()


@pytest.fixture
def start(docker: DockerEngine, start_console: StartConsole, tmp_path: Path) -> Iterator[Callable[..., Console]]:
    def start(toml: str, hub: FakeHub, **settings: object) -> Console:
        """A console for this test only, with the models of a fake hub."""
        return start_console(
            toml=toml,
            environment=hub_environment(hub, tmp_path / "home"),
            vllm_image=FAKE_VLLM_IMAGE,
            docker_host=docker.host,
            hub_cache_dir=tmp_path / "hub",
            vllm_cache_dir=tmp_path / "compiled",
            standby="false",
            **settings,
        )

    docker.remove_containers()
    yield start
    docker.remove_containers()


def running(docker: DockerEngine) -> list[str]:
    """The models whose containers run."""
    return sorted(c["Labels"]["switchyard.model"] for c in docker.client.containers())


def test_a_switch_creates_a_container_that_answers_chats(console, docker):
    """Stages from its log, the first token before `ready`, requests with the name that vLLM knows."""
    events = list(console.switch_stream(SLOW))
    assert events[-1][0] == "complete"
    phases = [data["phase"] for name, data in events if name == "progress" and "phase" in data]
    assert {"loading_weights", "warming_up"} <= set(phases)
    details = [str(data.get("detail")) for _, data in events]
    assert "3 of 6 shards, 0.6 of 1.2 MB" in details
    progress = [data["progress"] for _, data in events if "progress" in data]
    assert progress == sorted(progress)
    assert running(docker) == [SLOW]
    assert console.ask("Hello").json()["choices"][0]["message"]["content"]
    with closing(console.ask("Hello", model="auto", stream=True)) as answer:
        assert answer.text.rstrip().endswith("data: [DONE]")


def test_if_only_one_fits_the_old_container_is_stopped_first(tight, docker):
    """With a memory budget for one."""
    tight.switch(A)
    tight.switch(B)
    assert running(docker) == [B]
    tight.switch(A)
    assert running(docker) == [A]
    assert len(docker.client.containers(all=True)) == 2  # the stopped one is kept for its next load


def test_a_failed_load_reports_the_cause_and_restores_the_old_model(tight, docker):
    """Out of memory, with the figures from the log and what to change."""
    tight.switch(A)
    answer = tight.post("/v1/models/switch", {"target_model": BAD, "wait": True})
    assert answer.status_code == 502
    assert "CUDA out of memory" in answer.json()["message"]
    assert f"{A} is running again" in answer.json()["message"]
    assert running(docker) == [A]
    assert tight.status()["active_model"] == A


def test_containers_and_embedded_models_share_one_list_and_one_ledger(console):
    """One of each is loaded, and the ledger counts both."""
    console.switch(A)
    console.switch("switchyard-mini")
    found = console.wait_for(lambda s: (s["models"][A]["gpu_memory_used_gb"] or 0) > 0, "the container's memory")
    assert {m for m, v in found["models"].items() if v["status"] == "running"} == {A, "switchyard-mini"}


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_of_the_app_adopts_its_containers(console, docker, end):
    """Two containers, found by label; neither is loaded again."""
    console.switch(A)
    console.switch(B)
    before = {c["Id"] for c in docker.client.containers()}
    console.stop() if end == "stop" else console.kill()
    console.start()
    console.wait_for(lambda s: {s["models"][m]["status"] for m in (A, B)} == {"running"}, "both to be adopted")
    assert {c["Id"] for c in docker.client.containers()} == before
    assert console.ask("Hello", model=A).status_code == 200


def test_two_entries_of_one_model_are_both_adopted(console, docker):
    """The same weights under two ids are two containers; after a restart the ledger counts both."""
    console.switch(A)
    console.switch(TWIN)
    console.kill()
    console.start()
    console.wait_for(lambda s: {s["models"][m]["status"] for m in (A, TWIN)} == {"running"}, "both to be adopted")
    console.post(f"/v1/models/{TWIN}/stop")
    assert running(docker) == [A]


def test_a_kill_during_a_load_leaves_nothing(console, docker):
    """The next start removes the half-loaded container, and the status is correct."""
    console.post("/v1/models/switch", {"target_model": STUCK})
    wait_until(lambda: running(docker) == [STUCK], "the container to start")
    console.kill()
    console.start()
    wait_until(lambda: running(docker) == [], "the half-loaded container to be removed")
    assert console.states()[STUCK] == "stopped"
    console.switch(B)


def test_status_answers_while_docker_hangs(console, docker):
    """A hanging daemon blocks no page: under 100 ms each, by the best of a few."""
    console.switch(A)
    with docker.hanging():
        took = []
        for _ in range(5):
            watch = Stopwatch()
            assert console.get("/v1/models/status").status_code == 200
            took.append(watch.waited)
        assert min(took) < 0.1
        assert console.get("/models").status_code == 200


def test_a_restart_of_docker_during_a_load_fails_it_and_the_next_load_works(console, docker):
    """All its containers end with it: the load fails with a clear error, and the other model isn't shown as running."""
    console.switch(A)
    console.post("/v1/models/switch", {"target_model": STUCK})
    wait_until(lambda: running(docker) == [A, STUCK], "the container to start")
    with docker.stopped():
        found = console.wait_for(lambda s: s["switch"] is None, "the switch to end")
        assert found["models"][STUCK]["status"] == "failed"
        found = console.wait_for(lambda s: s["models"][A]["status"] != "running", "the other's end to be noticed")
        assert found["active_model"] is None
    console.switch(A)
    assert console.ask("Hello", model=A).status_code == 200


def test_a_container_removed_from_outside_is_a_failure_and_is_created_again(console, docker):
    """The model is shown as failed with the reason; the next switch creates another container."""
    console.switch(LONE)
    (container,) = docker.client.containers()
    docker.client.remove_container(container["Id"], force=True)
    found = console.wait_for(lambda s: s["models"][LONE]["status"] == "failed", "the removal to be noticed")
    assert "removed" in found["models"][LONE]["error"]
    console.switch(LONE)
    assert running(docker) == [LONE]


def test_without_docker_the_switch_says_what_to_do(start_console):
    """The error says what to do; other engines' models are not affected."""
    console = start_console(toml=entry(A), docker_host="unix:///nowhere/docker.sock")
    answer = console.post("/v1/models/switch", {"target_model": A, "wait": True})
    assert answer.status_code == 502
    assert "Docker" in answer.json()["message"]
    console.switch("switchyard-mini")


def fetching(console: Console) -> list[int]:
    """The pids of running programs that download from the hub."""
    found = []
    for child in console.children():
        with suppress(psutil.Error):  # a process that has just ended has no command line
            if "services.downloads.huggingface.child" in child.cmdline():
                found.append(child.pid)
    return found


WEIGHTS = {**TINY_MODEL, "model.safetensors": bytes(range(256)) * 12_000}


def test_missing_weights_are_downloaded_first_with_progress_by_bytes(start, tmp_path):
    """The stage is `downloading`, from 0 to 20 %; then it loads. The next load downloads nothing."""
    with FakeHub({A: Repo(WEIGHTS)}) as hub:
        hub.faults.bytes_per_second = 2_000_000
        console = start(entry(A, load_seconds=1), hub)
        events = list(console.switch_stream(A))
        assert events[-1][0] == "complete"
        seen = [data for name, data in events if name == "progress" and data.get("phase") == "downloading"]
        told = [data["progress"] for data in seen]
        assert told[0] < 5 <= 10 < told[-1] <= 20
        assert told == sorted(told)
        assert any("of 3.1 MB of the weights" in str(data.get("detail")) for data in seen)
        assert (tmp_path / f"hub/hub/models--org--model-a/snapshots/{COMMIT}/config.json").is_file()

        console.post(f"/v1/models/{A}/stop")
        hub.requests.clear()
        events = list(console.switch_stream(A))
        assert events[-1][0] == "complete"
        assert "downloading" not in [data.get("phase") for _, data in events]
        assert [request.path for request in hub.requests] == [f"/api/models/{A}"]


def test_during_a_download_the_model_in_use_keeps_answering(start, docker):
    """Nothing is unloaded for a model whose files are missing; its row shows the download."""
    with FakeHub({A: Repo(TINY_MODEL), B: Repo(WEIGHTS)}) as hub:
        hub.faults.bytes_per_second = 1_000_000
        console = start(big(A) + big(B), hub, memory_budget_gb=0.4)
        console.switch(A)
        console.post("/v1/models/switch", {"target_model": B})
        found = console.wait_for(lambda s: (s["models"][B]["load_progress"] or 0) >= 5, "some download progress")
        assert (found["models"][B]["status"], found["models"][B]["stage"]) == ("loading", "downloading")
        assert (found["models"][A]["status"], found["active_model"]) == ("running", A)
        assert console.ask("Hello", model=A).status_code == 200
        console.wait_for(lambda s: s["active_model"] == B, "the switch to end")
        assert running(docker) == [B]


def test_during_a_download_another_model_can_be_unloaded(start, docker):
    """At once, not after the download."""
    with FakeHub({A: Repo(TINY_MODEL), B: Repo(WEIGHTS)}) as hub:
        console = start(entry(A) + entry(B), hub)
        console.switch(A)
        hub.faults.bytes_per_second = 300_000
        console.post("/v1/models/switch", {"target_model": B})
        assert console.post(f"/v1/models/{A}/stop").status_code == 200
        assert running(docker) == []
        found = console.status()
        assert found["models"][B]["stage"] == "downloading"
        hub.faults.bytes_per_second = None
        console.wait_for(lambda s: s["active_model"] == B, "the switch to end")


def test_a_failed_download_unloads_nothing(start, docker):
    """The model in use is not unloaded; the message quotes the hub's error."""
    with FakeHub({A: Repo(TINY_MODEL), B: Repo(TINY_MODEL, gated="hf_secret")}) as hub:
        console = start(big(A) + big(B), hub, memory_budget_gb=0.4)
        console.switch(A)
        (before,) = docker.client.containers()
        answer = console.post("/v1/models/switch", {"target_model": B, "wait": True})
        assert answer.status_code == 502
        assert "HF_TOKEN" in answer.json()["message"]
        assert console.model(B)["status"] == "failed"
        assert [c["Id"] for c in docker.client.containers()] == [before["Id"]]
        assert console.status()["active_model"] == A


def test_a_download_under_way_is_cancelled_with_its_load(start, docker):
    """Within a second no more bytes arrive, and no container is created."""
    with FakeHub({A: Repo(WEIGHTS)}) as hub:
        hub.faults.bytes_per_second = 400_000
        console = start(entry(A), hub)
        console.post("/v1/models/switch", {"target_model": A})
        wait_until(lambda: hub.sent > 100_000, "some bytes")
        assert len(fetching(console)) == 1
        watch = Stopwatch()
        console.post(f"/v1/models/{A}/stop")
        console.wait_for(lambda s: s["models"][A]["status"] == "stopped", "the load to be cancelled")
        assert watch.waited < 1.5
        wait_until(lambda: fetching(console) == [], "the downloading process to end")
        assert watch.waited < 2.5
        assert docker.client.containers(all=True) == []
