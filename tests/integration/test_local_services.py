"""Flux and vision as services and as models of one console: start, stop, memory, crash and restart, with the fakes."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from tests.support.console import FAKE_LLAMA_SERVER, ROOT, Console, fake_model, free_port, wait_until

FAKES = ROOT / "tests" / "fakes" / "local_servers"
SERVICES = "/api/providers/services"
FLUX, BROKEN, SLOW, VISION, LLM = "flux-schnell", "flux-broken", "flux-slow", "clip-aesthetic", "llm"
MODELS = """
[[models]]
id = "flux-schnell"
engine = "flux"
source = "flux-schnell"
required_gb = 0.58
[models.options.environment]
FAKE_FLUX_FAULT = "slow:0.3@slowly,oom@huge"

[[models]]
id = "flux-broken"
engine = "flux"
source = "org/broken"
required_gb = 0.58
[models.options.environment]
FAKE_FLUX_FAULT = "load-oom"

[[models]]
id = "flux-slow"
engine = "flux"
source = "org/slow"
required_gb = 0.58
[models.options.environment]
FAKE_FLUX_FAULT = "download:12000000000,slow-load:60"

[[models]]
id = "flux-far"
engine = "flux"
source = "org/far"
required_gb = 0.58
[models.options.environment]
FAKE_FLUX_FAULT = "fetch:12000000000,slow-load:60"

[[models]]
id = "flux-unknown"
engine = "flux"
source = "org/unknown"
required_gb = 0.58
[models.options.environment]
FAKE_FLUX_FAULT = "fetch-fails"

[[models]]
id = "clip-aesthetic"
engine = "vision"
source = "clip-aesthetic"
required_gb = 0.05
"""


@pytest.fixture(scope="module")
def shared(start_shared: Callable[..., Console]) -> Console:
    """A budget that fits the language model or Flux, and a setting that has every unload confirmed."""
    return start_shared(
        toml=MODELS + fake_model(LLM, required_gb=0.2),
        llamacpp_server=FAKE_LLAMA_SERVER,
        memory_budget_gb=0.6,
        confirm_before_unload="true",
        local_servers_dir=FAKES,
        flux_api_url=f"http://127.0.0.1:{free_port()}",
        local_vision_api_url=f"http://127.0.0.1:{free_port()}",
    )


def service(console: Console, name: str) -> dict[str, object]:
    document: dict[str, object] = console.get(f"{SERVICES}/status").json()["services"][name]
    return document


def start(console: Console, name: str, **options: object) -> requests.Response:
    return console.post(f"{SERVICES}/start", {"service": name, **options})


def test_all_services_are_listed_in_one_form(console: Console) -> None:
    listed = console.get(f"{SERVICES}/status").json()["services"]
    assert list(listed) == ["ollama", "flux", "vision"]
    assert len({frozenset(document) for document in listed.values()}) == 1
    for name, model in (("flux", FLUX), ("vision", VISION)):
        document = listed[name]
        assert (document["state"], document["can_start"], document["can_stop"]) == ("stopped", True, False)
        assert (document["model"], document["missing"], document["error"]) == (model, [], None)


def test_flux_starts_serves_pictures_and_stops(console: Console) -> None:
    """It becomes a model in memory, and not the active one; other programs can ask it through the gateway."""
    answer = start(console, "flux")
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["status"], said["service"], said["state"], said["ours"]) == ("started", "flux", "running", True)
    assert said["message"] == "flux service started successfully"
    assert psutil.Process(said["pid"]).is_running()
    assert start(console, "flux").json()["pid"] == said["pid"]
    status = console.status()
    model = status["models"][FLUX]
    assert (model["status"], model["kind"], status["active_model"]) == ("running", "image", None)
    assert model["gpu_memory_used_gb"] > 0

    made = console.post("/v1/images/generations", {"model": FLUX, "prompt": "a fox", "size": "64x64"})
    assert made.status_code == 200, made.text
    assert base64.b64decode(made.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")

    stopped = console.post(f"{SERVICES}/stop", {"service": "flux"}).json()
    assert (stopped["status"], stopped["state"], stopped["pid"]) == ("stopped", "stopped", None)
    assert console.model(FLUX)["status"] == "stopped"


def test_vision_is_started_beside_the_language_model(console: Console) -> None:
    """It is small; the active model stays."""
    console.switch(LLM)
    assert start(console, "vision").status_code == 200
    status = console.status()
    running = {model for model, document in status["models"].items() if document["status"] == "running"}
    assert (running, status["active_model"]) == ({LLM, VISION}, LLM)


def test_flux_evicts_the_language_model_by_plan_and_says_so(console: Console) -> None:
    """Only after a confirmation, where the settings ask for one: the refusal has the plan."""
    console.switch(LLM)
    refused = start(console, "flux")
    assert (refused.status_code, refused.json()["error"]) == (409, "confirmation_required")
    assert [unload["model"] for unload in refused.json()["plan"]["unload"]] == [LLM]
    assert console.model(LLM)["status"] == "running"

    said = start(console, "flux", confirm=True).json()
    assert (said["state"], said["unloaded_models"]) == ("running", [LLM])
    assert said["message"] == f"flux service started successfully; unloaded to make room: {LLM}"
    states = console.states()
    assert (states[LLM], states[FLUX]) == ("stopped", "running")


def test_the_form_that_starts_flux_asks_with_the_plan(console: Console) -> None:
    """As the form of any other switch; the answer starts it."""
    console.switch(LLM)
    asked = console.post("/services/flux/start", data={"back": "/models"})
    assert asked.status_code == 200
    assert LLM in asked.text
    assert 'name="confirm"' in asked.text
    assert console.model(LLM)["status"] == "running"
    answered = console.post("/services/flux/start", data={"confirm": "yes"}, allow_redirects=False)
    assert answered.status_code == 303
    console.wait_for(lambda s: s["models"][FLUX]["status"] == "running", "Flux")
    assert console.post("/services/flux/stop", allow_redirects=False).status_code == 303
    console.wait_for(lambda s: s["models"][FLUX]["status"] == "stopped", "the stop of Flux")


def test_flux_out_of_memory_restores_what_was_loaded(console: Console) -> None:
    """The error says what was free and what is needed."""
    console.switch(LLM)
    failed = console.post("/v1/models/switch", {"target_model": BROKEN, "confirm": True, "wait": True})
    assert (failed.status_code, failed.json()["error"]) == (502, "load_failed")
    assert "2.0 GB were free" in failed.json()["message"]
    assert "12.0 GB are needed" in failed.json()["message"]
    status = console.status()
    assert (status["models"][LLM]["status"], status["active_model"]) == ("running", LLM)
    assert service(console, "flux")["state"] == "failed"
    assert console.post("/services/flux/dismiss").status_code == 200
    assert service(console, "flux")["state"] == "stopped"


def test_a_stop_waits_for_the_picture_under_way(console: Console) -> None:
    """Requests through the gateway are counted, so they are finished first."""
    start(console, "flux")
    body = {"model": FLUX, "prompt": "slowly", "size": "64x64"}
    with ThreadPoolExecutor(1) as pool:
        picture = pool.submit(requests.post, f"{console.url}/v1/images/generations", json=body, timeout=60)
        console.wait_for(lambda s: s["models"][FLUX]["in_flight"] == 1, "the request to be counted")
        assert console.post(f"{SERVICES}/stop", {"service": "flux"}).json()["state"] == "stopped"
        assert picture.result().status_code == 200


def test_services_outlive_a_crash_of_the_app_and_are_found_again(console: Console) -> None:
    """With their models, processes and the active model; they can be stopped from the next run."""
    console.switch(LLM)
    start(console, "vision")
    before = service(console, "vision")["pid"]
    console.kill()
    console.start()
    found = service(console, "vision")
    assert (found["state"], found["ours"], found["pid"], found["loaded"]) == ("running", True, before, VISION)
    console.wait_for(lambda s: s["models"][VISION]["status"] == "running", "the model to be adopted")
    assert console.post(f"{SERVICES}/stop", {"service": "vision"}).json()["state"] == "stopped"
    assert isinstance(before, int)
    wait_until(lambda: not psutil.pid_exists(before) or psutil.Process(before).status() == "zombie", "its end")


def test_a_crash_of_a_service_is_reported_with_its_cause(console: Console) -> None:
    start(console, "flux")
    pid = service(console, "flux")["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    status = console.wait_for(lambda s: s["models"][FLUX]["status"] == "failed", "its end to be noticed")
    assert "SIGKILL" in status["models"][FLUX]["error"]
    document = service(console, "flux")
    assert (document["state"], document["can_start"]) == ("failed", True)
    assert start(console, "flux").json()["state"] == "running"


def test_a_start_shows_its_download_and_can_be_cancelled(console: Console) -> None:
    """In bytes; what it unloaded is back afterwards."""
    console.switch(LLM)
    begun = console.post("/v1/models/switch", {"target_model": SLOW, "confirm": True})
    assert begun.status_code == 200, begun.text
    wait_until(lambda: service(console, "flux")["progress"] is not None, "the download")
    document = service(console, "flux")
    assert (document["state"], document["can_stop"], document["loaded"]) == ("starting", True, SLOW)
    progress = document["progress"]
    assert isinstance(progress, dict)
    assert (progress["stage"], progress["total_bytes"]) == ("downloading", 12_000_000_000)
    assert progress["message"].startswith("Downloading ")
    status = console.wait_for(lambda s: s["models"][SLOW]["stage"] == "downloading", "the stage of the switch")
    assert "of 12.0 GB downloaded" in status["models"][SLOW]["detail"]
    assert console.post(f"{SERVICES}/stop", {"service": "flux"}).json()["state"] == "stopped"
    console.wait_for(lambda s: s["switch"] is None and s["active_model"] == LLM, "the language model to be restored")


def test_nothing_is_unloaded_while_the_weights_are_downloaded(console: Console) -> None:
    """The first start of Flux downloads tens of GB; the language model answers meanwhile."""
    console.switch(LLM)
    console.post("/v1/models/switch", {"target_model": "flux-far", "confirm": True, "wait": False})
    seen = console.wait_for(lambda s: (s["switch"] or {}).get("stage") == "downloading", "the download")
    assert "of 12.0 GB downloaded" in seen["switch"]["detail"]
    assert (seen["models"][LLM]["status"], seen["active_model"]) == ("running", LLM)
    assert console.ask("Hello").status_code == 200
    assert service(console, "flux")["state"] == "starting"
    console.post(f"{SERVICES}/stop", {"service": "flux"})
    console.wait_for(lambda s: s["switch"] is None, "the end of the switch")
    assert service(console, "flux")["state"] == "stopped"


def test_a_download_that_fails_costs_nothing(console: Console) -> None:
    console.switch(LLM)
    failed = console.post("/v1/models/switch", {"target_model": "flux-unknown", "confirm": True, "wait": True})
    assert (failed.status_code, failed.json()["error"]) == (502, "engine_error")
    assert "The Hugging Face hub can't be reached" in failed.json()["message"]
    assert console.status()["active_model"] == LLM


def test_an_unknown_service_is_refused_with_those_there_are(console: Console) -> None:
    answer = start(console, "dalle")
    assert answer.status_code == 422
    assert "'ollama', 'flux' or 'vision'" in answer.json()["message"]
    assert "There are: ollama, flux, vision" in console.post("/services/dalle/start").text
