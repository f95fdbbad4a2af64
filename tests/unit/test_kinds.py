"""Models of other kinds than text: shown with their kind, and kept out of everything that is about chatting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.config import ConfigError, load_settings
from tests.support.console import DEMO_MODELS
from tests.support.in_process import InProcess, in_process

PAINTER = "painter"
LISTED = {"id": PAINTER, "engine": "llamacpp", "source": str(DEMO_MODELS / "switchyard-mini.gguf"), "kind": "image"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """An app that lists an image model beside the demo models."""
    with in_process(tmp_path_factory.mktemp("app"), models=(LISTED,)) as console:
        yield console


def test_the_lists_of_models_name_each_kind(console: InProcess) -> None:
    listed = console.client.get("/v1/models").get_json()["data"]
    assert {model["id"]: model["kind"] for model in listed} == {PAINTER: "image", "switchyard-small": "text"}
    assert console.client.get(f"/v1/models/{PAINTER}").get_json()["kind"] == "image"
    assert console.client.get("/v1/models/status").get_json()["models"][PAINTER]["kind"] == "image"


def test_the_models_page_names_the_kind_and_offers_to_load_it(console: InProcess) -> None:
    """It can't be used for chatting, so it is loaded, not used."""
    page = console.client.get("/models").text
    assert "llamacpp · image model" in page
    assert f'aria-label="Load {PAINTER}"' in page
    assert "use-painter" not in page


def test_the_menu_of_the_chat_page_leaves_it_out(console: InProcess) -> None:
    page = console.client.get("/").text
    assert 'value="switchyard-small"' in page
    assert f'value="{PAINTER}"' not in page


def test_a_chat_with_it_is_refused_before_anything_is_unloaded(console: InProcess) -> None:
    answer = console.client.post("/v1/chat/completions", json={"model": PAINTER, "messages": []})
    error = answer.get_json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "wrong_kind", "model")
    assert console.switch_requests == []


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'text', 'image', 'vision' or 'embedding'"):
        load_settings({}, models=({**LISTED, "kind": "sound"},))
