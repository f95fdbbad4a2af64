"""The providers' page and dialog: what is chosen, what answers, and the forms, with and without htmx."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace

import pytest

from services.engines.supervisor import ServiceError, ServiceStatus
from tests.support.console import free_port
from tests.support.health_servers import json_server

HTMX = {"HX-Request": "true"}
PEOPLE = {"Accept": "text/html"}
OPENAI = {"was_llm": "openai", "was_image": "openai", "was_vision": "openai"}
PAGES = ("/", "/models", "/docs", "/studio", "/preferences")
SAME = {"llm": "openai", "image": "openai", "vision": "openai"}


@pytest.fixture
def make_client(make_app):
    """Make a client; keyword arguments are settings. Nothing listens at the services' addresses unless they say so."""

    def make(**settings):
        nowhere = f"http://127.0.0.1:{free_port()}"
        return make_app(**{"flux_api_url": nowhere, "local_vision_api_url": nowhere, **settings}).test_client()

    return make


def chosen(html):
    """The selected option of each field."""
    return dict(re.findall(r'<select id="providers-(\w+)".*?<option value="(\w+)" selected>', html, re.DOTALL))


@pytest.mark.parametrize("path", [*PAGES, "/no-such-page", "/providers", "/models/plan?target=x"])
def test_every_page_has_the_button(make_client, path):
    """Error and documentation pages too; without script it leads to the page."""
    html = make_client().get(path, headers=PEOPLE).text
    (button,) = re.findall(r'<a id="providers-button"[^>]*>.*?</a>', html, re.DOTALL)
    assert 'href="/providers"' in button
    assert "OpenAI, no key" in button
    assert 'class="badge openai"' in button


def test_a_page_whose_status_fails_has_the_button_too(make_app, monkeypatch):
    app = make_app()

    def fail():
        raise OSError("nobody knows")

    monkeypatch.setattr(app.extensions["switchyard"].status, "current", fail)
    answer = app.test_client().get("/docs", headers=PEOPLE)
    assert answer.status_code == 200
    assert 'id="providers-button"' in answer.text


def test_the_button_turns_orange_with_what_is_local(make_client):
    client = make_client(openai_api_key="sk-test")
    client.post("/api/providers/switch", json={"llm": "llamacpp"})
    html = client.get("/models", headers=PEOPLE).text
    assert 'class="badge local"' in html
    assert "Partly local" in html


@pytest.mark.parametrize(("page", "fragment"), [("/", "/fragments/chat-status"), ("/models", "/fragments/models")])
def test_pages_that_poll_are_told_of_a_switch(make_client, page, fragment):
    """A script's, or another tab's: the button says what is in use."""
    client = make_client()
    html = client.get(page, headers=PEOPLE).text
    marks = dict(re.findall(r'class="shown" id="\w+" name="(\w+)" value="([^"]*)"', html))
    client.post("/api/providers/switch", json={"llm": "llamacpp"})
    assert "Partly local" in client.get(fragment, query_string=marks, headers=HTMX).text


@pytest.mark.parametrize("page", PAGES)
def test_the_dialog_shares_no_id_with_the_page_below_it(make_client, page):
    """The same lists of downloads and models are on the Models page."""
    client = make_client()
    ids = Counter(re.findall(r'\bid="([^"]+)"', client.get(page, headers=PEOPLE).text))
    ids += Counter(re.findall(r'\bid="([^"]+)"', client.get("/fragments/providers", headers=HTMX).text))
    assert [name for name, count in ids.items() if count > 1] == []
    assert ids["providers-since"] == ids["providers-form"] == 1


def test_applying_chooses_what_was_changed(make_client):
    """The others stay, whoever changed them since the form was shown, and are not checked: OpenAI has no key here."""
    client = make_client()
    client.post("/api/providers/switch", json={"llm": "llamacpp"})
    with json_server({"status": "ready"}) as vision:
        client = make_client(local_vision_api_url=vision.url)
        client.post("/api/providers/switch", json={"llm": "llamacpp"})
        answer = client.post("/providers", data={**OPENAI, **SAME, "vision": "local"}, headers=HTMX)
    assert answer.status_code == 200
    assert answer.headers["HX-Trigger"] == "refresh"
    assert "Applied" in answer.text
    assert chosen(answer.text) == {"llm": "llamacpp", "image": "openai", "vision": "local"}
    assert client.get("/api/providers/status").get_json()["current"] == chosen(answer.text)


def test_applying_nothing_says_so(make_client):
    answer = make_client().post("/providers", data={**OPENAI, **SAME}, headers=HTMX)
    assert "Nothing was changed" in answer.text


@pytest.mark.parametrize("headers", [HTMX, PEOPLE])
def test_a_refused_choice_stays_in_the_form_with_what_to_do(make_client, headers):
    """503 with the message and the button that starts the service, with and without htmx."""
    client = make_client(ollama_binary=sys.executable)
    answer = client.post("/providers", data={**OPENAI, **SAME, "llm": "ollama", "vision": "local"}, headers=headers)
    assert answer.status_code == 503
    assert answer.headers["Switchyard-Error"] == "provider_unavailable"
    assert "Ollama service not available." in answer.text
    assert "Start Ollama service before switching." in answer.text
    assert "Local vision service not available." in answer.text
    assert re.search(r'formaction="/providers/start" name="service" value="ollama"', answer.text)
    assert chosen(answer.text) == {"llm": "ollama", "image": "openai", "vision": "local"}
    assert 'name="was_llm" value="openai"' in answer.text
    assert client.get("/api/providers/status").get_json()["current"] == SAME


def test_without_htmx_a_choice_ends_on_the_page(make_client):
    """So that reloading repeats nothing."""
    client = make_client()
    answer = client.post("/providers", data={**OPENAI, **SAME, "llm": "llamacpp"}, headers=PEOPLE)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/providers?applied=yes")
    page = client.get(answer.headers["Location"], headers=PEOPLE)
    assert "Applied" in page.text
    assert "(default: OpenAI)" in page.text
    assert client.get("/providers/start").headers["Location"] == "/providers"


def test_an_unknown_provider_is_refused(make_client):
    answer = make_client().post("/providers", data={**OPENAI, **SAME, "image": "midjourney"}, headers=HTMX)
    assert answer.status_code == 422
    assert "midjourney" in answer.text


def test_a_start_keeps_the_choice_that_needs_it(make_app, monkeypatch):
    """After it the same click succeeds."""
    app = make_app()
    found = app.extensions["switchyard"]
    service = found.ollama_service
    monkeypatch.setattr(service, "start", lambda: None)
    running = replace(found.local_services.get("ollama"), status=ServiceStatus("running", True, 1))
    monkeypatch.setattr(found.local_services, "get", lambda _name: running)
    sent = {**OPENAI, **SAME, "llm": "ollama", "service": "ollama"}
    answer = app.test_client().post("/providers/start", data=sent, headers=HTMX)
    assert answer.status_code == 200
    assert "Ollama is running. Apply the choice now." in answer.text
    assert chosen(answer.text)["llm"] == "ollama"

    def fail():
        raise ServiceError("ollama_not_found", "Ollama is not installed here.")

    monkeypatch.setattr(service, "start", fail)
    answer = app.test_client().post("/providers/start", data=sent, headers=HTMX)
    assert answer.status_code == 503
    assert "Ollama is not installed here." in answer.text
    assert chosen(answer.text)["llm"] == "ollama"


def test_models_are_managed_in_the_local_environment_only(make_client):
    for environment, managed in (("local", True), ("production", False)):
        html = make_client(environment=environment).get("/providers", headers=PEOPLE).text
        assert ("Recommended" in html) is managed
        assert ('id="providers-installed"' in html) is managed
        assert "What answers" in html


def test_a_poll_is_told_only_what_has_changed(make_client):
    """204 when nothing has: the time alone and the speed of an answer change nothing."""
    client = make_client()
    mark = re.search(r'id="providers-since" name="since" value="([^"]+)"', client.get("/fragments/providers").text)[1]
    assert client.get(f"/fragments/providers-news?since={mark}", headers=HTMX).status_code == 204
    client.post("/api/providers/switch", json={"llm": "llamacpp"})
    news = client.get(f"/fragments/providers-news?since={mark}", headers=HTMX).text
    assert 'id="providers-now" hx-swap-oob="morph"' in news
    assert 'id="top-status"' in news
    assert 'id="providers-since"' in news
    assert 'id="since"' not in news
    assert "providers-service-ollama" not in news


def test_the_key_is_checked_when_somebody_asks(make_client):
    """In the provider's own words, without the key; opening and polling the dialog asks nothing."""
    key = "sk-test-abcdefghijkl"
    with json_server({"error": {"message": f"Incorrect API key provided: {key}."}}, 401) as openai:
        client = make_client(openai_api_key=key, openai_base_url=openai.url)
        assert "Key set" in client.get("/fragments/providers").text
        client.get("/fragments/providers-news")
        assert openai.requests == []
        assert client.post("/providers/check-key", headers=HTMX).status_code == 204
        html = client.get("/fragments/providers").text
    assert "Key refused" in html
    assert "Incorrect API key provided" in html
    assert key not in html
