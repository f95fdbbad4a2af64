"""Whole runs of the Studio on a real console: the demo model, the fake image and vision servers, and OpenAI's fake."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from tests.fakes.openai_server import KEY, OpenAIServer
from tests.support.console import ROOT, Console, events, free_port, wait_until

FAKES = ROOT / "tests" / "fakes" / "local_servers"
PATH = "/api/beam-search"
BODY = {"prompt": "a fox in snow", "beam_width": 1, "iterations": 2, "candidates": 2, "seed": 7}
LOCAL = {"llm": "llamacpp", "image": "flux", "vision": "local"}
REMOTE = dict.fromkeys(LOCAL, "openai")
SERVERS = """
[[models]]
id = "flux-schnell"
engine = "flux"
source = "flux-schnell"
required_gb = {flux_gb}
[models.options.environment]
FAKE_FLUX_FAULT = "{flux_fault}"

[[models]]
id = "clip-aesthetic"
engine = "vision"
source = "clip-aesthetic"
required_gb = 0.02
[models.options.environment]
FAKE_VISION_FAULT = "nan@unjudged"
"""
FAULTS = "slow:1@linger,no-image@broken,oom@huge,die-generating@crash"


@pytest.fixture(scope="module")
def openai() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared(start_shared: Callable[..., Console], openai: OpenAIServer) -> Console:
    """The demo models, both servers, and OpenAI; the local ones are chosen."""
    return started(start_shared, SERVERS.format(flux_gb=0.05, flux_fault=FAULTS), openai=openai)


def started(
    start: Callable[..., Console], toml: str, *, openai: OpenAIServer | None = None, **settings: Any
) -> Console:
    """A console with both servers, started; their providers can be chosen then."""
    remote = {} if openai is None else {"openai_base_url": openai.url, "openai_api_key": KEY}
    return start(
        toml=toml,
        local_servers_dir=FAKES,
        flux_api_url=f"http://127.0.0.1:{free_port()}",
        local_vision_api_url=f"http://127.0.0.1:{free_port()}",
        llm_provider="llamacpp",
        image_provider="flux",
        vision_provider="local",
        **remote,
        **settings,
    )


@pytest.fixture(autouse=True)
def as_it_was(console: Console, openai: OpenAIServer) -> Iterator[None]:
    """The local providers, no fault, and no run under way after a test."""
    yield
    for run in console.get(PATH).json()["runs"]:
        if run["status"] == "running":
            console.delete(run["urls"]["self"])
    openai.reset()
    for service in ("flux", "vision"):
        console.post("/api/providers/services/start", {"service": service})
    choose(console, **LOCAL)


def choose(console: Console, **choice: str) -> None:
    answer = console.post("/api/providers/switch", choice)
    assert answer.status_code == 200, answer.text


def start(console: Console, **change: Any) -> dict[str, Any]:
    answer = console.post(PATH, {**BODY, **change})
    assert answer.status_code == 202, answer.text
    return answer.json()


def read(console: Console, run: dict[str, Any]) -> dict[str, Any]:
    return console.get(run["urls"]["self"]).json()


def ended(console: Console, run: dict[str, Any]) -> dict[str, Any]:
    wait_until(lambda: read(console, run)["status"] not in ("running", "cancelling"), "the run's end")
    return read(console, run)


def as_list(*whats: str) -> Callable[[dict[str, Any]], str]:
    """A reply of OpenAI's chat: a list of candidates, or a score for a picture."""

    def reply(document: dict[str, Any]) -> str:
        if "image_url" in json.dumps(document["messages"]):
            return json.dumps({"alignment": 0.5, "aesthetic": 0.5, "comment": "More snow."})
        return json.dumps([{"what": what, "how": f"in look {number}"} for number, what in enumerate(whats)])

    return reply


def test_a_run_over_the_demo_model_and_the_local_servers_ends_with_a_ranking(console: Console) -> None:
    """No model is loaded before: the run loads what it needs. The demo model gives no list, which is said."""
    run = start(console)
    with console.get(run["urls"]["events"], stream=True) as answer:
        told = list(events(answer))
    assert told[0][0] == "providers"
    assert {c: p["provider"] for c, p in told[0][1]["providers"].items()} == LOCAL
    assert told[-1][0] == "result"
    result = told[-1][1]
    assert result["status"] == "complete", result["message"]
    assert [c["rank"] for c in result["ranking"]] == [1, 2, 3, 4]
    assert all(c["written_by"] == "rules" for c in result["ranking"])
    assert "gave no list" in result["notes"][0]
    picture = console.get(result["ranking"][0]["image"])
    assert picture.headers["Content-Type"] == "image/png"
    assert struct.unpack(">II", picture.content[16:24]) == (1024, 1024)


def test_the_same_seed_gives_the_same_ranking(console: Console) -> None:
    first, second = (ended(console, start(console)) for _ in range(2))
    other = ended(console, start(console, seed=8))
    shown = [[(c["number"], c["image"], c["score"]) for c in run["ranking"]] for run in (first, second, other)]
    assert shown[0] == shown[1] != shown[2]


def test_a_cancel_in_the_middle_leaves_no_request_running_upstream(console: Console) -> None:
    """Neither in the image server nor at the gateway; what was written is kept."""
    flux = console.environment["SWITCHYARD_FLUX_API_URL"]

    def queue() -> dict[str, int]:
        return requests.get(f"{flux}/health", timeout=10).json()["queue"]

    run = start(console, prompt="linger")
    wait_until(lambda: console.model("flux-schnell")["status"] == "running" and queue()["running"], "a picture begun")
    cancelled = console.delete(run["urls"]["self"]).json()
    assert cancelled["status"] == "cancelled"
    wait_until(lambda: console.model("flux-schnell")["in_flight"] == 0, "the gateway to notice")
    wait_until(lambda: not queue()["running"] and not queue()["waiting"], "the image server to be idle")
    assert [c["status"] for c in read(console, run)["others"]] == ["written", "written"]


def test_two_runs_around_a_switch_of_providers_report_different_ones(console: Console, openai: OpenAIServer) -> None:
    """The choice changes while the first runs: it goes on with its own."""
    openai.reply = as_list("one", "two")
    first = start(console, prompt="linger")
    choose(console, **REMOTE)
    assert read(console, first)["providers"]["image"]["provider"] == "flux"
    console.delete(first["urls"]["self"])
    second = ended(console, start(console))
    assert second["status"] == "complete", second["message"]
    assert {c: p["provider"] for c, p in second["providers"].items()} == REMOTE
    assert {c: p["provider"] for c, p in read(console, first)["providers"].items()} == LOCAL
    assert all(c["written_by"] == "model" and c["score"]["comment"] == "More snow." for c in second["ranking"])
    assert second["switching_seconds"]["total"] == 0


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("huge", "needs"), ("unjudged", "score"), ("crash", "connection"), ("broken", "picture")],
)
def test_a_provider_that_fails_ends_the_run_in_its_own_words(console: Console, prompt: str, said: str) -> None:
    """Out of memory, scores that are NaN, an image server that dies at work, pictures that are none."""
    run = ended(console, start(console, prompt=prompt, iterations=1))
    assert run["status"] == "failed"
    assert said in run["message"], run["message"]
    assert run["notes"][-1].startswith("Iteration 1: ")
    assert len(run["others"]) == 2


def test_a_restart_marks_the_run_under_way_and_keeps_it(start_console) -> None:
    """Killed in the middle; the pictures of earlier runs are still served."""
    console = started(start_console, SERVERS.format(flux_gb=0.05, flux_fault=FAULTS))
    done = ended(console, start(console, iterations=1))
    cut = start(console, prompt="linger")
    wait_until(lambda: (read(console, cut)["activity"] or {}).get("phase") == "images", "the pictures to be begun")
    wait_until(lambda: len(read(console, cut)["others"]) == 2, "the candidates")
    console.stop()
    console.start()
    assert read(console, cut)["status"] == "interrupted"
    assert [c["what"] for c in read(console, cut)["others"]] == ["linger", "linger"]
    assert read(console, done) == done
    assert console.get(done["ranking"][0]["image"]).status_code == 200
    again = ended(console, start(console, iterations=1))
    assert again["status"] == "complete", again["message"]
