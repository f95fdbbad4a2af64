"""Runs of the Studio on a real console: with OpenAI's stand-in, and with local models that take turns in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fakes.openai_server import KEY, Document, OpenAIServer
from tests.support.console import FAKE_LLAMA_SERVER, ROOT, Console, fake_model, free_port, wait_until

FLUX_AND_VISION = """
[[models]]
id = "flux-schnell"
engine = "flux"
source = "flux-schnell"
required_gb = 0.35
[models.options.environment]
FAKE_FLUX_FAULT = "hold:300,oom@huge"

[[models]]
id = "clip-aesthetic"
engine = "vision"
source = "clip-aesthetic"
required_gb = 0.01
"""
OPENAI = {"llm": "openai", "image": "openai", "vision": "openai"}
LOCAL = {"llm": "llamacpp", "image": "flux", "vision": "local"}


@pytest.fixture(scope="module")
def openai() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared(start_shared: Callable[..., Console], openai: OpenAIServer) -> Console:
    """A budget that fits the language model or Flux, not both."""
    return start_shared(
        toml=FLUX_AND_VISION + fake_model("writer", "hold:300", required_gb=0.35),
        llamacpp_server=FAKE_LLAMA_SERVER,
        environment={"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": openai.url},
        memory_budget_gb=0.6,
        local_servers_dir=ROOT / "tests" / "fakes" / "local_servers",
        flux_api_url=f"http://127.0.0.1:{free_port()}",
        local_vision_api_url=f"http://127.0.0.1:{free_port()}",
    )


@pytest.fixture
def studio(console: Console, openai: OpenAIServer) -> Console:
    """A console whose Studio uses OpenAI's stand-in, which writes readable lists."""
    openai.reset()
    openai.reply = _candidates
    assert console.post("/api/providers/switch", OPENAI).status_code == 200
    openai.calls.clear()
    return console


def _candidates(document: Document) -> str | None:
    content = document["messages"][-1]["content"]
    if not isinstance(content, str):
        return None  # a picture to judge
    return json.dumps([{"what": f"A harbour, view {n}", "how": f"Watercolour number {n}"} for n in range(9)])


def begin(console: Console, **options: object) -> str:
    answer = console.post("/api/beam-search", {"prompt": "A harbour", "candidates": 2, "iterations": 1, **options})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def ended(console: Console, run_id: str) -> dict[str, Any]:
    """Wait for the end of a run; return it."""
    found: dict[str, Any] = {}

    def over() -> bool:
        found.update(console.get(f"/api/beam-search/{run_id}").json())
        return found["status"] not in ("running", "cancelling")

    wait_until(over, "the run to end")
    return found


def test_a_run_with_openai_ends_in_a_ranking(studio: Console, openai: OpenAIServer):
    """Every call goes to the settings' address with the settings' key, and nothing is loaded here."""
    run = ended(studio, begin(studio, beam_width=1, iterations=2, seed=7))
    assert run["status"] == "complete", run
    assert {provider["provider"] for provider in run["providers"].values()} == {"openai"}
    assert len(run["ranking"]) == 4
    assert len(openai.asked("/images/generations")) == 4
    assert {call.headers.get("authorization") for call in openai.calls} == {f"Bearer {KEY}"}
    assert set(studio.states().values()) == {"stopped"}


def test_a_cancelled_run_leaves_nothing_running_upstream(studio: Console, openai: OpenAIServer):
    """Both pictures were being drawn, and would have been for ever."""
    openai.fault("stuck", on="/images/generations")
    run_id = begin(studio)
    wait_until(lambda: openai.in_flight == 2, "both pictures to be asked for")
    studio.delete(f"/api/beam-search/{run_id}")
    wait_until(lambda: openai.in_flight == 0, "both requests to end")
    assert openai.disconnects == 2
    assert ended(studio, run_id)["status"] == "cancelled"


def test_a_rate_limit_is_waited_out(studio: Console, openai: OpenAIServer):
    openai.fault("rate_limited:1", on="/images/generations", times=1)
    assert ended(studio, begin(studio))["status"] == "complete"
    assert len(openai.asked("/images/generations")) == 3


def test_a_refused_key_ends_the_run_in_openais_words_without_the_key(studio: Console, openai: OpenAIServer):
    openai.fault("unauthorized", on="/chat/completions")
    run = ended(studio, begin(studio))
    assert run["status"] == "failed"
    assert "OpenAI refuses the key: Incorrect API key provided: …" in json.dumps(run, ensure_ascii=False)
    assert KEY[:8] not in json.dumps(run) + studio.output()
    assert len(openai.asked("/chat/completions")) == 1


def test_a_key_that_is_refused_when_a_run_starts_is_503_before_anything_is_spent(studio: Console, openai: OpenAIServer):
    openai.fault("unauthorized")
    refused = studio.post("/api/beam-search", {"prompt": "A harbour"})
    assert (refused.status_code, refused.json()["error"]) == (503, "provider_unavailable")
    assert "openai_api_key" in refused.json()["guidance"]
    assert KEY[:8] not in refused.text
    assert openai.asked("/chat/completions") == []


def test_one_picture_and_one_score_that_are_none_are_left_out(studio: Console, openai: OpenAIServer):
    """The run goes on with the rest; the score is asked for a second time first."""
    openai.fault("no_image", on="/images/generations", times=1)
    run = ended(studio, begin(studio, candidates=3))
    assert (run["status"], len(run["ranking"])) == ("complete", 2)


def test_local_providers_take_turns_in_memory_and_the_cost_is_measured(console: Console, openai: OpenAIServer):
    """The language model or Flux: each is switched to for its phase, and the run says what that cost."""
    openai.reset()
    console.ask("Hello", model="writer")
    for service in ("vision", "flux"):
        started = console.post("/api/providers/services/start", {"service": service})
        assert started.status_code == 200, started.text
        wait_until(lambda service=service: _answers(console, service), f"{service} to answer")
    assert console.states()["writer"] == "stopped"
    switched = console.post("/api/providers/switch", LOCAL)
    assert switched.status_code == 200, switched.text
    run = ended(console, begin(console, beam_width=1, iterations=2, seed=7))
    assert run["status"] == "complete", run
    assert [run["providers"][c]["model"] for c in ("llm", "image", "vision")] == [
        "writer",
        "flux-schnell",
        "clip-aesthetic",
    ]
    assert len(run["ranking"]) == 4
    cost = run["switching_seconds"]
    assert cost["llm"] > 0
    assert cost["image"] > 0
    assert (console.states()["writer"], console.states()["flux-schnell"]) == ("stopped", "running")
    assert openai.calls == []
    again = ended(console, begin(console, beam_width=1, iterations=2, seed=7))
    assert _ranking(again) == _ranking(run)


def test_flux_without_memory_says_so_with_figures_and_what_ran_before_is_back(console: Console, openai: OpenAIServer):
    """It loads, and finds too little memory when it draws: the run ends, and the language model is loaded again."""
    openai.reset()
    choice = {"llm": "openai", "image": "flux", "vision": "openai"}
    assert console.post("/api/providers/services/start", {"service": "flux"}).status_code == 200
    wait_until(lambda: _answers(console, "flux"), "flux to answer")
    assert console.post("/api/providers/switch", choice).status_code == 200
    console.switch("writer")
    assert console.states()["flux-schnell"] == "stopped"
    run = ended(console, begin(console, prompt="A huge harbour"))
    assert (run["status"], run["error"]) == ("failed", "out_of_memory")
    assert "2.0 GB was free, and it needs 12.0 GB" in run["message"]
    assert run["message"].endswith("writer is running again.")
    assert (console.states()["writer"], console.status()["active_model"]) == ("running", "writer")


def _answers(console: Console, service: str) -> bool:
    health: dict[str, Any] = console.get("/api/providers/health").json()["health"][service]
    return bool(health["models"])  # it answers before its model is loaded


def _ranking(run: dict[str, Any]) -> list[float]:
    return [place["score"]["total"] for place in run["ranking"]]
