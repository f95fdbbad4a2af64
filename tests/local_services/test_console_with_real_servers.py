"""A console that starts the real servers, with tiny models: as models in memory, and as the Studio's providers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.local_services.cases import size_of
from tests.local_services.test_real_servers import CONSTANT_SCORE, ENVIRONMENT, HEAD, MODELS
from tests.support.console import Console, free_port, wait_until
from tests.support.local_servers import REAL

FLUX, VISION = "flux", "clip-aesthetic"
LLM = "switchyard-mini"
ENTRIES = f"""
[[models]]
id = "{FLUX}"
engine = "flux"
source = {json.dumps(str(MODELS / "flux"))}
[models.options.environment]
OMP_NUM_THREADS = "1"

[[models]]
id = "{VISION}"
engine = "vision"
source = {json.dumps(str(MODELS / "clip"))}
[models.options]
arguments = ["--aesthetic-head", {json.dumps(str(HEAD))}]
[models.options.environment]
OMP_NUM_THREADS = "1"
"""


@pytest.fixture(scope="module")
def shared(start_shared: Callable[..., Console]) -> Console:
    return start_shared(
        toml=ENTRIES,
        environment={"HF_HUB_OFFLINE": "1"},
        local_servers_dir=REAL,
        local_servers_env=ENVIRONMENT,
        flux_api_url=f"http://127.0.0.1:{free_port()}",
        local_vision_api_url=f"http://127.0.0.1:{free_port()}",
        flux_model=MODELS / "flux",
    )


def test_the_image_server_is_a_model_that_draws_through_the_gateway(console: Console):
    """Its memory is measured, its log is on the page, and a stop ends it."""
    console.switch(FLUX)
    model = console.model(FLUX)
    assert (model["status"], model["kind"]) == ("running", "image")
    assert model["gpu_memory_used_gb"] > 0
    asked = {"model": FLUX, "prompt": "a red fox", "size": "64x64", "seed": 1}
    made = console.post("/v1/images/generations", asked)
    assert made.status_code == 200, made.text
    assert size_of(base64.b64decode(made.json()["data"][0]["b64_json"])) == (64, 64)
    stopped = console.post("/api/providers/services/stop", {"service": "flux"})
    assert stopped.json()["state"] == "stopped"


def search(console: Console) -> dict[str, Any]:
    """Make a run of two candidates with a fixed seed; return it when it has ended."""
    begun = console.post("/api/beam-search", {"prompt": "a red fox", "candidates": 2, "iterations": 1, "seed": 1})
    assert begun.status_code == 202, begun.text
    run: dict[str, Any] = {}

    def ended() -> bool:
        run.update(console.get(f"/api/beam-search/{begun.json()['id']}").json())
        return run["status"] not in ("running", "cancelling")

    wait_until(ended, "the run to end", timeout=180)
    assert run["status"] == "complete", run
    return run


def test_a_beam_search_over_the_real_servers_ends_in_a_ranking_and_repeats(console: Console):
    """The embedded language model writes, FLUX draws, CLIP and its head judge; the same seed gives the same again."""
    for service in ("flux", "vision"):
        started = console.post("/api/providers/services/start", {"service": service})
        assert started.status_code == 200, started.text
    chosen = console.post("/api/providers/switch", {"llm": "llamacpp", "image": "flux", "vision": "local"})
    assert chosen.status_code == 200, chosen.text
    first, second = search(console), search(console)
    assert [first["providers"][name]["model"] for name in ("llm", "image", "vision")] == [LLM, FLUX, VISION]
    shown = [(candidate["image"], candidate["score"]) for candidate in first["ranking"]]
    assert len(shown) == 2
    assert {score["aesthetic"] for _, score in shown} == {CONSTANT_SCORE / 10}
    assert size_of(console.get(shown[0][0]).content) == (1024, 1024)
    assert [(candidate["image"], candidate["score"]) for candidate in second["ranking"]] == shown
