"""Providers of text: OpenAI's API, and local models through the gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from services.cancellation import CancelToken
from services.providers.adapters.local import LocalText
from services.providers.adapters.openai import OpenAIText
from services.providers.adapters.openai_api import OpenAIApi
from services.providers.adapters.upstream import CatalogModel, Gateway
from services.providers.ports import ProviderError, TextProvider
from tests.engines.test_llamacpp import make_case
from tests.fakes.openai_server import TEXT_MODEL, OpenAIServer
from tests.providers.conftest import Scripted, StandInCase
from tests.providers.contract import ProviderCase, ProviderContract
from tests.support.in_process import InProcess

HELLO = [{"role": "user", "content": "Hello"}]


def ask(provider: TextProvider, **options: object) -> Callable[[CancelToken], str]:
    asked = {"max_tokens": 32, "temperature": 0.0, "seed": 3, **options}
    return lambda token: provider.complete(HELLO, token, **asked)


def is_text(answer: object) -> bool:
    return isinstance(answer, str) and len(answer) > 3


def says(content: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}


class TestOpenAI(ProviderContract):
    @pytest.fixture
    def case(self, api: OpenAIApi, stand_in_case: StandInCase) -> ProviderCase:
        provider = OpenAIText(api, TEXT_MODEL, 4)
        return stand_in_case(provider, ask(provider), is_text)

    def test_a_parameter_that_the_model_refuses_is_left_out_from_then_on(self, api: OpenAIApi, openai: OpenAIServer):
        """Models that think take no temperature, older servers only the older name of the limit."""
        provider = OpenAIText(api, TEXT_MODEL, 4)
        openai.fault("unsupported:temperature")
        openai.fault("unsupported:max_completion_tokens")
        assert is_text(ask(provider)(CancelToken()))
        assert len(openai.calls) == 3
        assert is_text(ask(OpenAIText(api, TEXT_MODEL, 4))(CancelToken()))
        (last,) = openai.asked("/chat/completions")[3:]
        assert {"temperature", "max_completion_tokens"}.isdisjoint(last)
        assert last["max_tokens"] > 32
        assert last["seed"] == 3

    @pytest.mark.parametrize(
        ("fault", "code", "words"),
        [
            ("unauthorized", "provider_unavailable", "OpenAI refuses the key: Incorrect API key provided: …"),
            ("quota", "provider_unavailable", "You exceeded your current quota"),
            ("wrong_type", "bad_answer", "OpenAI"),
            ("empty", "bad_answer", "holds no text"),
            ("redirect", "provider_refused", "302"),
        ],
    )
    def test_other_faults_are_reported(self, case: ProviderCase, openai: OpenAIServer, fault, code, words):
        """In OpenAI's words where it has some, and never with a part of the key; a redirect is not followed."""
        openai.fault(fault)
        with pytest.raises(ProviderError) as caught:
            case.ask(CancelToken())
        assert (caught.value.code, caught.value.retry_after) == (code, None)
        assert words in caught.value.message
        assert "sk-proj" not in caught.value.message
        assert "q8Zq" not in caught.value.message
        assert len(openai.calls) == 1

    def test_a_service_that_is_overloaded_says_when_to_try_again(self, case: ProviderCase, openai: OpenAIServer):
        openai.fault("overloaded:3")
        with pytest.raises(ProviderError) as caught:
            case.ask(CancelToken())
        assert (caught.value.code, caught.value.retry_after) == ("provider_unavailable", 3)

    def test_an_unknown_model_is_named(self, api: OpenAIApi):
        with pytest.raises(ProviderError, match=r"`gpt-none` does not exist"):
            ask(OpenAIText(api, "gpt-none", 4))(CancelToken())


class TestLocal(ProviderContract):
    """Any engine's model; its answers are scripted."""

    @pytest.fixture
    def case(self, script: Callable[..., Scripted]) -> ProviderCase:
        scripted = script("small", "llamacpp", says("A quiet harbour."))
        provider = LocalText("llamacpp", scripted.upstream, "small", 4)
        return scripted.case(provider, ask(provider), is_text)

    def test_thoughts_are_no_part_of_the_answer(self, script: Callable[..., Scripted]):
        scripted = script("thinker", "llamacpp", says("<think>A boat?</think>\n\nA harbour."))
        assert ask(LocalText("local", scripted.upstream, "thinker", 4))(CancelToken()) == "A harbour."

    @pytest.mark.parametrize("content", ["", "<think>What a wish", None])
    def test_an_answer_without_text_is_none(self, script: Callable[..., Scripted], content):
        scripted = script("mute", "llamacpp", says(content))
        with pytest.raises(ProviderError, match="holds no text"):
            ask(LocalText("local", scripted.upstream, "mute", 4))(CancelToken())

    def test_the_engine_gets_the_name_by_which_it_knows_the_model(self, script: Callable[..., Scripted]):
        """With the limits and the seed of the call, in the range that every engine takes."""
        scripted = script("small", "llamacpp", says("Yes."))
        ask(LocalText("local", scripted.upstream, "small", 4), seed=2**40 + 5)(CancelToken())
        (body,) = scripted.bodies()
        assert (body["model"], body["max_tokens"], body["seed"]) == ("small", 32, 5)

    def test_a_request_is_counted_like_a_clients(self, console: InProcess, case: ProviderCase):
        """So that a switch waits for it."""
        traffic = console.services.board.current.instances["small"].traffic
        case.ask(CancelToken())
        assert (traffic.in_flight, traffic.last_used is not None) == (0, True)


class TestEmbeddedModel:
    """The embedded engine with a demo model: a real answer, and a real end of the generation."""

    @pytest.fixture
    def provider(self, console: InProcess, gateway: Gateway, tmp_path: Path) -> Iterator[LocalText]:
        engine = make_case(tmp_path)
        with engine.ready() as (_, endpoint):
            view = console.show("switchyard-mini")
            served = replace(view, endpoint=endpoint)
            console.services.board.publish(instances=MappingProxyType({"switchyard-mini": served}))
            yield LocalText("llamacpp", CatalogModel(gateway, "switchyard-mini"), "switchyard-mini", 4)
        engine.engine.close()

    def test_it_answers_the_same_for_the_same_seed(self, provider: LocalText):
        first, second = (ask(provider, temperature=0.9)(CancelToken()) for _ in range(2))
        assert is_text(first)
        assert first == second
