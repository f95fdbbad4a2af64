"""The Studio's pages without a browser: the form, refusals that keep what was typed, a run, the list, two runs."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from services.providers.ports import JobProviders, ProviderError
from tests.support.console import wait_until
from tests.support.in_process import InProcess
from tests.support.studio_providers import FakeImages, FakeText, FakeVision, fake_providers, refusing
from tests.unit.test_studio_api import Held, use

PEOPLE = {"Accept": "text/html"}
TYPED = {"prompt": "a <fox>\nin snow", "beam_width": "1", "iterations": "1", "candidates": "2", "seed": "7"}


@pytest.fixture
def client(console: InProcess) -> Iterator[FlaskClient]:
    use(console, fake_providers())
    yield console.client
    studio = console.services.studio
    for each in studio.listed(100):
        studio.cancel(each.run.id)
        studio.delete(each.run.id)


def text(client: FlaskClient, path: str) -> str:
    """The words of a page's main part."""
    answer = client.get(path, headers=PEOPLE)
    assert answer.status_code == 200, answer.text
    return words(answer.text)


def words(page: str) -> str:
    main = page[page.index("<main") :] if "<main" in page else page
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", main).split()))


def start(client: FlaskClient, **typed: str) -> str:
    """Submit the form; return the address of the run's page."""
    begun = client.post("/studio/runs", data={**TYPED, **typed}, headers=PEOPLE)
    assert begun.status_code == 303, words(begun.text)
    return begun.location


def finish(client: FlaskClient, **typed: str) -> str:
    path = start(client, **typed)
    wait_until(lambda: client.get(path.replace("/studio/runs", "/api/beam-search")).json["status"] != "running", "end")
    return path


def test_the_form_says_how_many_calls_a_run_makes_before_it_starts(client):
    assert "at most 30 calls: 6 for text, 8 for pictures, 16 for scores. 19 if" in text(client, "/studio")
    path = "/studio?prompt=kept&beam_width=1&iterations=3&candidates=2"
    page = client.get(path).text
    assert "at most 24 calls" in page
    assert "kept</textarea>" in page
    shape = "beam_width=2&iterations=1&candidates=4&seed="
    assert client.get(f"/fragments/studio-calls?{shape}").text == (
        "This run makes at most 14 calls: 2 for text, 4 for pictures, 8 for scores. "
        "9 if every list and score can be read at once."
    )
    assert "whole number" in client.get("/fragments/studio-calls?candidates=x").text
    assert "can be 1 to 16" in client.get("/fragments/studio-calls?candidates=99").text


def test_a_run_is_followed_on_its_page_and_ends_with_the_ranking(client):
    page = text(client, finish(client))
    assert "Complete" in page
    assert "a <fox> in snow" in page
    for shown in ("Rank 1", "Rank 2", "brush-model", "Seed 7", "5 of at most 8", "thing", "look 0"):
        assert shown in page, shown


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"prompt": " "}, 422, "Write what the pictures are to show."),
        ({"prompt": "fox " * 600}, 422, "2,000 is the limit"),
        ({"candidates": "17"}, 422, "Candidates can be 1 to 16; this is 17."),
        ({"beam_width": "3"}, 422, "Keep at most as many pictures"),
        ({"iterations": "two"}, 422, "Iterations has to be a whole number."),
        ({"seed": "-1"}, 422, "The seed has to be a whole number."),
        ({"origin": f"{'0' * 32}-1"}, 404, "This run does not exist"),
    ],
)
def test_a_refusal_says_why_and_keeps_everything_that_was_typed(client, change, status, said):
    answer = client.post("/studio/runs", data={**TYPED, **change}, headers=PEOPLE)
    assert answer.status_code == status
    assert said in words(answer.text)
    typed = {**TYPED, **change}
    assert html.escape(typed["prompt"]).replace("&#x27;", "'") in answer.text
    for name in ("beam_width", "iterations", "candidates", "seed"):
        assert re.search(rf'name="{name}"[^>]* value="{re.escape(typed[name])}"', answer.text), name


def test_an_unavailable_provider_and_a_run_under_way_keep_the_prompt_too(console, client):
    def unavailable():
        raise ProviderError("provider_unavailable", "Flux service not available. Start it first.")

    use(console, unavailable)
    refused = client.post("/studio/runs", data=TYPED, headers=PEOPLE)
    assert refused.status_code == 503
    assert "Flux service not available. Start it first." in refused.text
    held = Held()
    use(console, fake_providers(trouble=held))
    path = start(client)
    refused = client.post("/studio/runs", data={**TYPED, "prompt": "the next one"}, headers=PEOPLE)
    assert refused.status_code == 409
    assert "the next one</textarea>" in refused.text
    assert f'href="{path}"' in refused.text
    held.release.set()


def test_a_run_under_way_says_what_it_does_and_can_be_cancelled(console, client):
    held = Held()
    use(console, JobProviders(FakeText(), FakeImages(trouble=held), FakeVision()))
    path = start(client)
    assert held.entered.wait(30)
    page = client.get(path, headers=PEOPLE).text
    assert "Iteration 1 of 1: drawing pictures with brush (brush-model)" in words(page)
    assert "0 of 2 pictures" in words(page)
    assert '<meta http-equiv="refresh"' in page
    assert client.post(f"{path}/cancel").status_code == 303
    page = client.get(path, headers=PEOPLE).text
    assert "Cancelled" in words(page)
    assert '<meta http-equiv="refresh"' not in page


def test_a_poll_gets_what_changed_and_204_when_nothing_did(console, client):
    held = Held()
    use(console, JobProviders(FakeText(), FakeImages(trouble=held), FakeVision()))
    path = start(client)
    assert held.entered.wait(30)
    page = client.get(path).text
    mark = re.search(r'name="since" value="([^"]+)"', page)[1]
    fragment = path.replace("/studio/runs", "/fragments/studio")

    def unchanged() -> bool:
        nonlocal mark
        answer = client.get(f"{fragment}?since={mark}")
        mark = mark if answer.status_code == 204 else re.search(r'name="since" value="([^"]+)"', answer.text)[1]
        return answer.status_code == 204

    wait_until(unchanged, "a poll that finds nothing new: only the memory in use may change meanwhile")
    held.release.set()
    wait_until(lambda: "Complete" in words(client.get(fragment).text), "the end")
    news = client.get(f"{fragment}?since={mark}").text
    assert 'id="studio-now" hx-swap-oob="morph"' in news
    assert news.count("<template><li") == 2
    assert "2 pictures are ranked" in re.search(r'data-announce="([^"]*)"', news)[1]
    gone = client.get("/fragments/studio/nobody")
    assert gone.status_code == 286, "htmx stops polling"
    assert "was deleted" in gone.text


def test_a_failed_run_shows_the_providers_words_and_a_rate_limit_how_long_it_takes(console, client):
    use(console, JobProviders(FakeText(), FakeImages(trouble=refusing("out_of_memory", "Needs 12 GB.")), FakeVision()))
    assert "Needs 12 GB." in text(client, finish(client))
    slow = refusing("rate_limited", "Too many images.", calls=range(1), retry_after=300)
    use(console, JobProviders(FakeText(), FakeImages(trouble=slow), FakeVision()))
    path = start(client)
    wait_until(lambda: "brush asked to wait" in text(client, path), "the wait to be shown")
    assert re.search(r"brush asked to wait (5 min|4 min \d+ s): Too many images\.", text(client, path))
    client.post(f"{path}/cancel")


def test_wording_by_rules_is_said(console, client):
    use(console, JobProviders(FakeText(answer=lambda _n, _s: "once"), FakeImages(), FakeVision()))
    page = text(client, finish(client))
    assert "asked twice and gave no list that can be read for 2 of 2 candidates" in page
    assert page.count("written by rules") == 2 + 1


def test_a_run_is_listed_opened_again_repeated_continued_compared_and_deleted(client):
    first, second = finish(client), finish(client, prompt="a hare", seed="8")
    listed = client.get("/studio").text
    assert listed.index("a hare") < listed.index("a &lt;fox&gt;")
    ids = [path.rsplit("/", 1)[1] for path in (first, second)]
    again = client.get(f"/studio?again={ids[0]}").text
    assert 'value="7"' in again
    assert "a &lt;fox&gt;\nin snow</textarea>" in again
    onward = re.search(r'href="(/studio\?continue=[^"]+)"', client.get(first).text)[1]
    page = client.get(onward).text
    assert "Goes on from" in page
    origin = re.search(r'name="origin" value="([^"]+)"', page)[1]
    assert "Goes on from number" in text(client, finish(client, origin=origin))
    both = text(client, f"/studio/compare?run={ids[0]}&run={ids[1]}")
    assert "a <fox> in snow" in both
    assert "a hare" in both
    assert "Choose two runs" in text(client, f"/studio/compare?run={ids[0]}&run={ids[0]}")
    assert client.post(f"{first}/delete").status_code == 303
    assert client.get(first, headers=PEOPLE).status_code == 404
    assert client.get("/studio").text.count('class="studio-row"') == 2


@pytest.mark.parametrize("path", ["/", "/models", "/studio", "/docs", "/no-such-page"])
def test_every_page_links_to_the_studio(client, path):
    page = client.get(path, headers=PEOPLE).text
    assert re.search(r'<a href="/studio"[^>]*>Studio</a>', page)


def test_forms_of_other_sites_are_refused(client):
    for path in ("/studio/runs", "/studio/runs/x/cancel", "/studio/runs/x/delete"):
        assert client.post(path, data=TYPED, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_the_list_has_pages(client, monkeypatch):
    monkeypatch.setattr("blueprints.studio.LISTED", 2)
    paths = [finish(client, seed=str(number)) for number in range(5)]
    page = client.get("/studio").text
    for _ in range(2):
        onward = re.search(r'href="(/studio/runs\?before=[^"]+)"', page)[1]
        page = client.get(onward).text
    assert paths[0] in page
    assert page.count('class="studio-row"') == 1
    assert "Earlier runs</a>" not in page
    assert client.get("/studio/runs").status_code == 303
