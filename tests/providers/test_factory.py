"""Which model serves a provider, as the choice and the state of things are when a job starts."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import pytest

from services.cancellation import CancelToken
from services.config import Settings
from services.engines.openai.account import Account
from services.engines.port import Model
from services.providers.adapters.upstream import Gateway
from services.providers.factory import ProviderFactory
from services.providers.ports import Choice, ProviderError
from tests.fakes.openai_server import KEY
from tests.support.in_process import InProcess

MODELS = (
    Model("coder", "ollama", "coder"),
    Model("arty", "ollama", "arty"),
    Model("tiny", "llamacpp", "tiny", options={"parallel": 2}),
    Model("damaged", "llamacpp", "damaged", fault="Its file is damaged."),
    Model("cloud", "openai", "gpt-5", remote=True),
    Model("flux-schnell", "flux", "flux", kind="image"),
    Model("clip-aesthetic", "vision", "clip", kind="vision"),
)
OPENAI = Choice("openai", "openai", "openai")


@pytest.fixture
def make(gateway: Gateway):
    """Make the providers of a choice, with these models in the catalogue."""

    def make(llm="openai", image="openai", vision="openai", models=MODELS, key=KEY, **settings):
        known = {model.id: model for model in models}
        catalog = SimpleNamespace(models=known, id_of=lambda name: name)
        factory = ProviderFactory(
            Settings(**settings), Account("http://127.0.0.1:9/v1", key), replace(gateway, catalog=catalog)
        )
        return factory.for_job(Choice(llm, image, vision))

    return make


def test_openais_models_are_those_of_the_settings(make):
    made = make(openai_text_model="a", openai_image_model="b", openai_vision_model="c", studio_at_once=3)
    assert [made.names()[capability]["model"] for capability in ("llm", "image", "vision")] == ["a", "b", "c"]
    assert [p.at_once for p in (made.llm, made.image, made.vision)] == [3, 3, 3]


def test_without_a_key_openai_is_not_ready(make):
    with pytest.raises(ProviderError, match="OPENAI_API_KEY"):
        make(key=None).llm.make_ready(CancelToken())


def test_a_provider_has_the_model_of_the_setting_else_the_loaded_else_the_last_used_else_the_first(
    make, console: InProcess
):
    assert make("ollama").llm.model == "arty"
    console.services.board.publish(last_used=MappingProxyType({"coder": 7.0, "arty": 3.0}))
    assert make("ollama").llm.model == "coder"
    console.show("arty", engine="ollama")
    assert make("ollama").llm.model == "arty"
    assert make("ollama", ollama_model="coder").llm.model == "coder"
    assert make("ollama", ollama_model="not-installed").llm.model == "arty"
    console.services.board.publish(last_used=MappingProxyType({}))


def test_local_is_the_active_model_unless_that_is_remote(make, console: InProcess):
    """A remote one costs money, which `local` rules out."""
    console.show("coder", engine="ollama")
    console.show("tiny")
    assert make("local").llm.model == "coder"
    console.services.board.publish(active_model="tiny")
    assert (make("local").llm.model, make("local").llm.name) == ("tiny", "local")
    console.show("cloud", engine="openai")
    console.services.board.publish(active_model="cloud")
    assert make("local").llm.model in ("tiny", "coder")


def test_an_embedded_model_gets_as_many_calls_as_it_answers_at_once(make):
    assert make("llamacpp", studio_at_once=8).llm.at_once == 2
    assert make("ollama", studio_at_once=8).llm.at_once == 8


@pytest.mark.parametrize("provider", ["vllm", "ollama"])
def test_a_provider_without_a_model_says_what_to_do(make, provider):
    with pytest.raises(ProviderError, match=r"has no model to write with\. Download one first\."):
        make(provider, models=MODELS[2:])


def test_the_local_servers_are_used_through_the_gateway_where_they_are_in_the_catalogue(make):
    made = make("openai", "flux", "local")
    assert (made.image.model, made.vision.model) == ("flux-schnell", "clip-aesthetic")
    assert made.names()["image"] == {"provider": "flux", "model": "flux-schnell"}


@pytest.mark.parametrize(
    ("models", "url"), [((), "http://127.0.0.1:9"), (MODELS, "http://192.0.2.1:8001")], ids=["not here", "elsewhere"]
)
def test_a_server_that_is_not_in_the_catalogue_is_used_by_its_url(make, models, url):
    made = make("openai", "flux", models=models, flux_api_url=url)
    assert made.image.model is None


def test_a_local_server_that_can_not_start_says_why(make):
    broken = replace(MODELS[5], fault="Python packages are missing: torch.")
    with pytest.raises(ProviderError, match="packages are missing: torch"):
        make("openai", "flux", models=[broken])
