"""`/api/beam-search` and the pictures over HTTP, with providers in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from services.providers.ports import JobProviders, ProviderError
from tests.support.console import wait_until
from tests.support.in_process import InProcess, in_process
from tests.support.studio_providers import FakeImages, FakeText, FakeVision, fake_providers, refusing

BODY = {"prompt": "a fox", "beam_width": 2, "iterations": 2, "candidates": 3, "seed": 7}
PATH = "/api/beam-search"


@pytest.fixture
def client(console: InProcess) -> Iterator[FlaskClient]:
    use(console, fake_providers())
    yield console.client
    under_way = console.services.studio.under_way
    if under_way is not None:
        console.services.studio.cancel(under_way.run.id)
    for run in console.client.get(f"{PATH}?limit=100").json["runs"]:
        console.client.delete(f"{PATH}/{run['id']}")


def use(console: InProcess, providers: JobProviders | Callable[[], JobProviders]) -> None:
    """Let the next run use these providers."""
    console.services.studio._providers = providers if callable(providers) else lambda: providers


def finished(client: FlaskClient, body: dict[str, Any] = BODY) -> dict[str, Any]:
    """Make a run; return it when it is over."""
    started = client.post(PATH, json=body)
    assert started.status_code == 202, started.text
    url = started.json["urls"]["self"]
    wait_until(lambda: client.get(url).json["status"] != "running", "the run's end")
    return client.get(url).json


def events(client: FlaskClient, url: str, **headers: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Id, name and data of each event of a whole stream."""
    answer = client.get(url, headers=headers)
    assert answer.mimetype == "text/event-stream"
    found = []
    for block in answer.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if "event" in fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


class Held:
    """Trouble that holds every call until it is released or cancelled."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self, _number, token) -> None:
        self.entered.set()
        while not self.release.wait(0.01):
            token.check()


def test_a_start_answers_at_once_with_addresses_and_the_number_of_calls(client):
    started = client.post(PATH, json=BODY)
    assert started.status_code == 202
    assert started.json["status"] == "running"
    assert started.json["calls"]["most"] == {"texts": 6, "images": 6, "scores": 12, "total": 24}
    assert set(started.json["urls"]) == {"self", "events", "page"}
    assert {c: p["provider"] for c, p in started.json["providers"].items()} == {
        "llm": "words", "image": "brush", "vision": "eye",
    }  # fmt: skip


def test_the_events_name_the_providers_first_then_each_candidate_last_the_ranking(client):
    run = finished(client)
    told = events(client, run["urls"]["events"])
    assert told[0][1] == "providers"
    assert told[0][2]["providers"]["image"] == {"provider": "brush", "model": "brush-model"}
    drawn = [data for _, name, data in told if name == "candidate" and data["status"] == "scored"]
    assert len(drawn) == 6
    assert all(c["image"].startswith("/studio/pictures/") and c["score"]["total"] is not None for c in drawn)
    assert told[-1][1] == "result"
    assert told[-1][2]["status"] == "complete"
    assert [c["rank"] for c in told[-1][2]["ranking"]] == [1, 2, 3, 4, 5, 6]


def test_a_late_follower_gets_everything_and_last_event_id_resumes(client):
    url = finished(client)["urls"]["events"]
    told = events(client, url)
    assert events(client, url, **{"Last-Event-ID": told[4][0]}) == told[5:]
    for odd in ("", "x", "live-", "live-99999999999999999999", "kept-3"):
        assert events(client, url, **{"Last-Event-ID": odd}) == told


def test_the_same_job_with_the_same_seed_has_the_same_ranking(client):
    first, second = finished(client), finished(client)
    assert first["id"] != second["id"]
    shown = [[(c["number"], c["image"], c["score"]) for c in run["ranking"]] for run in (first, second)]
    assert shown[0] == shown[1]


def test_a_picture_is_served_with_its_type_and_may_be_kept_for_ever(client):
    best = finished(client)["ranking"][0]
    answer = client.get(best["image"])
    assert answer.status_code == 200
    assert answer.mimetype == "image/png"
    assert answer.data.startswith(b"\x89PNG")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "immutable" in answer.headers["Cache-Control"]
    for odd in ("0" * 64, "..%2f..%2fswitchyard.db", "x"):
        assert client.get(f"/studio/pictures/{odd}").status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"prompt": "x" * 2001},
        {"prompt": 7},
        {"beam_width": 0},
        {"beam_width": 4},
        {"iterations": 9},
        {"candidates": 17},
        {"candidates": "many"},
        {"seed": -1},
        {"seed": 2**31},
        {"extra": 1},
        {"continue_from": {"run": "x"}},
    ],
)
def test_bad_values_are_422_in_the_contracts_shape_and_nothing_is_spent(console, client, change):
    use(console, lambda: pytest.fail("providers were asked for"))
    refused = client.post(PATH, json={**BODY, **change})
    assert refused.status_code == 422
    assert refused.json["status"] == "error"
    assert refused.json["error"] == "invalid_value"
    assert client.get(PATH).json["runs"] == []


def test_a_huge_body_and_no_json_are_refused(client):
    assert client.post(PATH, data=b"x" * 9_000_000, content_type="application/json").status_code == 413
    assert client.post(PATH, data="nonsense", content_type="application/json").status_code == 400


def test_an_unavailable_provider_is_503_with_its_guidance(console, client):
    def unavailable():
        raise ProviderError("provider_unavailable", "Ollama service not available. Start it first.")

    use(console, unavailable)
    refused = client.post(PATH, json=BODY)
    assert (refused.status_code, refused.json["error"]) == (503, "provider_unavailable")
    assert refused.json["message"] == "Ollama service not available. Start it first."


def test_a_second_run_is_409_while_one_is_under_way(console, client):
    held = Held()
    use(console, fake_providers(trouble=held))
    first = client.post(PATH, json=BODY).json
    refused = client.post(PATH, json=BODY)
    assert (refused.status_code, refused.json["error"]) == (409, "run_in_progress")
    held.release.set()
    wait_until(lambda: client.get(first["urls"]["self"]).json["status"] == "complete", "the first run's end")


@pytest.mark.parametrize("where", ["llm", "image", "vision"])
def test_a_cancel_in_the_middle_leaves_no_call_running(console, client, where):
    held = Held()
    kinds = {"llm": FakeText, "image": FakeImages, "vision": FakeVision}
    providers = JobProviders(*(kind(**({"trouble": held} if name == where else {})) for name, kind in kinds.items()))
    use(console, providers)
    run = client.post(PATH, json=BODY).json
    assert held.entered.wait(30)
    cancelled = client.delete(run["urls"]["self"])
    assert cancelled.json["status"] == "cancelled"
    assert [p.running for p in (providers.llm, providers.image, providers.vision)] == [0, 0, 0]
    assert events(client, run["urls"]["events"])[-1][2]["status"] == "cancelled"


def test_a_failure_is_told_in_the_providers_words_and_what_was_made_is_kept(console, client):
    trouble = refusing("out_of_memory", "3 GB are free, it needs 12 GB.", calls=range(4, 99))
    use(console, JobProviders(FakeText(), FakeImages(trouble=trouble), FakeVision()))
    run = finished(client)
    assert (run["status"], run["error"], run["message"]) == (
        "failed",
        "out_of_memory",
        "3 GB are free, it needs 12 GB.",
    )
    assert len(run["ranking"]) == 3
    assert len(run["others"]) == 3


def test_two_runs_around_a_switch_of_providers_report_different_ones(console, client):
    first = finished(client)
    use(console, JobProviders(FakeText("ollama"), FakeImages("flux"), FakeVision("local")))
    second = finished(client)
    assert [run["providers"]["image"]["provider"] for run in (first, second)] == ["brush", "flux"]
    assert client.get(first["urls"]["self"]).json["providers"] == first["providers"]


def test_what_switching_models_took_is_told(console, client):
    use(console, JobProviders(FakeText(ready_seconds=0.05), FakeImages(ready_seconds=0.1), FakeVision()))
    run = finished(client)
    assert run["switching_seconds"] == {"llm": 0.1, "image": 0.2, "vision": 0.0, "total": 0.3}


def test_runs_are_listed_latest_first_read_and_deleted(client):
    first, second = finished(client), finished(client, {**BODY, "seed": 8})
    listed = client.get(PATH).json["runs"]
    assert [run["id"] for run in listed] == [second["id"], first["id"]]
    assert listed[0]["best"] == second["ranking"][0]
    page = client.get(f"{PATH}?limit=1&before={second['id']}").json["runs"]
    assert [run["id"] for run in page] == [first["id"]]
    assert client.delete(first["urls"]["self"]).json == {"status": "deleted", "id": first["id"]}
    for call in (client.get, client.delete):
        assert call(first["urls"]["self"]).status_code == 404
    assert client.get(first["urls"]["events"]).status_code == 404
    assert client.get(first["ranking"][0]["image"]).status_code == 404
    assert client.get(f"{PATH}?limit=0").status_code == 422
    assert client.get(f"{PATH}?before=nobody").status_code == 404


def test_a_run_goes_on_from_a_kept_candidate(client):
    first = finished(client)
    best = first["ranking"][0]["number"]
    more = finished(client, {**BODY, "continue_from": {"run": first["id"], "candidate": best}})
    assert more["continued_from"] == {"run": first["id"], "candidate": best}
    gone = client.post(PATH, json={**BODY, "continue_from": {"run": "nobody", "candidate": 1}})
    assert gone.status_code == 404


def test_a_start_from_another_site_is_refused(client):
    assert client.post(PATH, json=BODY, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.delete(f"{PATH}/x", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_starts_are_limited_in_rate(tmp_path):
    """A run may switch models several times."""
    with in_process(tmp_path, switch_rate_limit="1/minute") as console:
        use(console, fake_providers())
        codes = [console.client.post(PATH, json={"prompt": ""}).status_code for _ in range(2)]
        assert codes == [422, 429]
        assert console.client.post("/studio/runs", data={"prompt": "kept"}).status_code == 429


def test_a_picture_that_went_is_said(tmp_path):
    """The cap holds two small pictures; the run ends with what it has, and says which are gone."""
    with in_process(tmp_path, studio_pictures_gb=160e-9) as console:
        use(console, JobProviders(FakeText(), FakeImages(), FakeVision()))
        run = finished(console.client, {**BODY, "iterations": 1, "beam_width": 1})
        shown = [*run["ranking"], *run["others"]]
        assert {c["image_removed"] for c in shown} == {True, False}
        assert all(c["image"] is None for c in shown if c["image_removed"])
