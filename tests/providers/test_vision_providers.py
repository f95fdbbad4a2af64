"""Providers of judgements: OpenAI's API, and the vision server through the gateway and by its URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cancellation import CancelToken
from services.providers.adapters.local import LocalVision
from services.providers.adapters.openai import OpenAIVision
from services.providers.adapters.openai_api import OpenAIApi
from services.providers.adapters.scores import UnreadableScore, parse_score
from services.providers.adapters.upstream import RemoteServer
from services.providers.ports import Picture, ProviderError, Score, VisionProvider
from tests.fakes.openai_server import TEXT_MODEL, OpenAIServer, png
from tests.providers.conftest import Scripted, StandInCase
from tests.providers.contract import ProviderCase, ProviderContract
from tests.providers.local_server import LocalServer, local_server

PICTURE = Picture(png(64, 64, "x"), "image/png")
GOOD = '{"alignment": 0.5, "aesthetic": 1, "comment": " More light. "}'


def ask(provider: VisionProvider, prompt: str = "A harbour") -> Callable[[CancelToken], Score]:
    return lambda token: provider.score(PICTURE, prompt, token)


def is_score(score: object) -> bool:
    return isinstance(score, Score) and all(0 <= x <= 1 for x in (score.alignment, score.aesthetic, score.total))


class TestOpenAI(ProviderContract):
    @pytest.fixture
    def case(self, api: OpenAIApi, stand_in_case: StandInCase) -> ProviderCase:
        provider = OpenAIVision(api, TEXT_MODEL, 4)
        return stand_in_case(provider, ask(provider), is_score)

    def test_the_model_sees_the_picture_and_the_wish(self, case: ProviderCase, openai: OpenAIServer):
        score = case.ask(CancelToken())
        assert isinstance(score, Score)
        assert score.comment == "The light is right, the boats are missing."
        (asked,) = openai.asked("/chat/completions")
        text, shown = asked["messages"][1]["content"]
        assert "A harbour" in text["text"]
        assert shown["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
        assert asked["response_format"] == {"type": "json_object"}

    @pytest.mark.parametrize(
        ("fault", "words"), [("nan", "NaN is no number"), ("prose", "no JSON object"), ("far_off", "alignment is no")]
    )
    def test_a_garbled_score_is_asked_for_again_and_then_refused(
        self, case: ProviderCase, openai: OpenAIServer, fault: str, words: str
    ):
        """Once; a NaN never becomes a score."""
        openai.fault(fault, times=1)
        assert is_score(case.ask(CancelToken()))
        assert len(openai.calls) == 2
        openai.fault(fault)
        with pytest.raises(ProviderError, match=words) as caught:
            case.ask(CancelToken())
        assert caught.value.code == "bad_answer"
        assert len(openai.calls) == 4


class TestVisionThroughTheGateway(ProviderContract):
    """The vision server as a model of the catalogue; its answers are scripted."""

    @pytest.fixture
    def case(self, script: Callable[..., Scripted]) -> ProviderCase:
        scripted = script("clip-aesthetic", "vision", {"alignment": 0.3, "aesthetic": 5.0, "total": 0.36})
        provider = LocalVision("local", scripted.upstream, "clip-aesthetic", 1)
        return scripted.case(provider, ask(provider), is_score)

    def test_its_figures_are_brought_to_one_scale(self, case: ProviderCase):
        """The server's aesthetic goes to ten."""
        assert case.ask(CancelToken()) == Score(0.3, 0.5, 0.36)

    @pytest.mark.parametrize(
        "said", ['{"alignment": NaN, "aesthetic": 1}', '{"alignment": 2, "aesthetic": 1}', '{"aesthetic": 1}', "[]"]
    )
    def test_a_score_that_is_none_is_refused(self, script: Callable[..., Scripted], said: str):
        scripted = script("clip-aesthetic", "vision", said.encode())
        with pytest.raises(ProviderError) as caught:
            ask(LocalVision("local", scripted.upstream, "clip-aesthetic", 1))(CancelToken())
        assert caught.value.code == "bad_answer"

    def test_without_weights_for_beauty_the_alignment_counts_and_the_comment_says_so(
        self, script: Callable[..., Scripted]
    ):
        scripted = script("clip-aesthetic", "vision", {"alignment": 0.3, "aesthetic": None, "total": 0.3})
        score = ask(LocalVision("local", scripted.upstream, "clip-aesthetic", 1))(CancelToken())
        assert (score.alignment, score.total) == (0.3, 0.3)
        assert "not judged" in score.comment


@pytest.fixture(scope="module")
def vision() -> Iterator[LocalServer]:
    with local_server("vision_service.py", "nan@odd", "oom@huge", "fail@broken") as server:
        yield server


class TestVisionByItsUrl:
    """The vision server (a fake of it) on another machine, or not in the catalogue."""

    @pytest.fixture
    def judge(self, vision: LocalServer) -> LocalVision:
        return LocalVision("local", RemoteServer("The vision server", vision.url), None, 1)

    def test_the_same_picture_and_wish_get_the_same_score(self, judge: LocalVision):
        assert judge.make_ready(CancelToken()) == 0
        first, again, other = (ask(judge, wish)(CancelToken()) for wish in ("a", "a", "b"))
        assert is_score(first)
        assert first == again != other

    @pytest.mark.parametrize(
        ("prompt", "code"), [("odd", "bad_answer"), ("huge", "out_of_memory"), ("broken", "provider_unavailable")]
    )
    def test_its_faults_are_reported(self, judge: LocalVision, prompt: str, code: str):
        with pytest.raises(ProviderError) as caught:
            ask(judge, prompt)(CancelToken())
        assert caught.value.code == code


@given(st.floats(0, 1), st.floats(0, 1), st.text(max_size=600), st.booleans())
def test_every_score_is_read_as_it_was_written(alignment, aesthetic, comment, fenced):
    """Alone or in a code block; the total lies between both figures."""
    text = json.dumps({"alignment": alignment, "aesthetic": aesthetic, "comment": comment})
    score = parse_score(f"```json\n{text}\n```" if fenced else text)
    assert (score.alignment, score.aesthetic) == (alignment, aesthetic)
    assert min(alignment, aesthetic) - 1e-9 <= score.total <= max(alignment, aesthetic) + 1e-9
    assert len(score.comment) <= 500


@given(st.text() | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_whatever_an_answer_holds_is_a_score_or_unreadable(answer):
    """Never another error, and never a figure outside of 0 to 1."""
    try:
        score = parse_score(answer)
    except UnreadableScore:
        return
    assert is_score(score)


@pytest.mark.parametrize(
    "answer",
    [
        '{"alignment": NaN, "aesthetic": 1}',
        '{"alignment": 1e999, "aesthetic": 1}',
        '{"alignment": -0.1, "aesthetic": 1}',
        '{"alignment": "0.5", "aesthetic": 1}',
        '{"alignment": true, "aesthetic": 1}',
        '{"alignment": 0.5}',
        f"Here it is: {GOOD}",
        "[" * 100_000,
    ],
)
def test_an_odd_score_is_unreadable(answer):
    with pytest.raises(UnreadableScore):
        parse_score(answer)


def test_a_comment_is_kept_without_white_space_around_it():
    assert parse_score(GOOD) == Score(0.5, 1.0, pytest.approx(0.65), "More light.")
