"""Providers of pictures: OpenAI's API, and the image server through the gateway and by its URL."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from services.cancellation import Cancelled, CancelToken
from services.providers.adapters import upstream
from services.providers.adapters.local import FluxImage, side
from services.providers.adapters.openai import OpenAIImage, size_for
from services.providers.adapters.openai_api import OpenAIApi
from services.providers.adapters.upstream import RemoteServer
from services.providers.ports import ImageProvider, Picture, ProviderError
from tests.fakes.openai_server import IMAGE_MODEL, OpenAIServer, png
from tests.providers.conftest import Scripted, StandInCase
from tests.providers.contract import ProviderCase, ProviderContract
from tests.providers.local_server import LocalServer, local_server
from tests.support.console import wait_until
from tests.support.in_process import InProcess
from tests.support.scripted_engine import Reply, ScriptedEngine, answer

PROMPT = "A quiet harbour"


def ask(provider: ImageProvider, prompt: str = PROMPT, **options: object) -> Callable[[CancelToken], Picture]:
    asked = {"width": 1024, "height": 1024, "seed": 3, **options}
    return lambda token: provider.generate(prompt, token, **asked)


def is_png(picture: object) -> bool:
    return isinstance(picture, Picture) and picture.media_type == "image/png" and picture.data.startswith(b"\x89PNG")


class TestOpenAI(ProviderContract):
    @pytest.fixture
    def case(self, api: OpenAIApi, stand_in_case: StandInCase) -> ProviderCase:
        provider = OpenAIImage(api, IMAGE_MODEL, 4)
        return stand_in_case(provider, ask(provider), is_png)

    def test_the_picture_is_the_one_that_was_sent(self, case: ProviderCase, openai: OpenAIServer):
        """It is asked for in base64, so that nothing has to be fetched from an address that the service names."""
        assert case.ask(CancelToken()) == Picture(png(1024, 1024, PROMPT), "image/png")
        (asked,) = openai.asked("/images/generations")
        assert asked == {"model": IMAGE_MODEL, "prompt": PROMPT, "n": 1, "size": "1024x1024"}

    @pytest.mark.parametrize(
        ("fault", "words"), [("no_image", "no picture"), ("link", "a link"), ("empty", "holds no picture")]
    )
    def test_what_is_no_picture_is_refused(self, case: ProviderCase, openai: OpenAIServer, fault: str, words: str):
        """A link is not followed: it could lead anywhere."""
        openai.fault(fault)
        with pytest.raises(ProviderError, match=words) as caught:
            case.ask(CancelToken())
        assert caught.value.code == "bad_answer"


class TestFluxThroughTheGateway(ProviderContract):
    """The image server as a model of the catalogue; its answers are scripted."""

    @pytest.fixture
    def case(self, script: Callable[..., Scripted]) -> ProviderCase:
        scripted = script("flux-schnell", "flux", png(64, 64, PROMPT), "image/png")
        provider = FluxImage("flux", scripted.upstream, "flux-schnell", 1)
        return scripted.case(provider, ask(provider), is_png)

    def test_it_is_asked_for_what_it_can_draw(self, script: Callable[..., Scripted]):
        """Sides are multiples of 16 from 64 to 2048, seeds have 32 bits."""
        scripted = script("flux-schnell", "flux", png(64, 64, PROMPT), "image/png")
        provider = FluxImage("flux", scripted.upstream, "flux-schnell", 1)
        ask(provider, width=1000, height=3000, seed=2**40 + 5)(CancelToken())
        (body,) = scripted.bodies()
        assert body == {"prompt": PROMPT, "width": 992, "height": 2048, "format": "png", "seed": 5}

    def test_without_memory_it_says_what_was_free_what_it_needs_and_what_to_unload(
        self, console: InProcess, script: Callable[..., Scripted]
    ):
        """As the server reports it, with the other models on its device."""
        figures = {"code": "out_of_memory", "message": "x", "free_bytes": 2 * 10**9, "needed_bytes": 12 * 10**9}
        scripted = script("flux-schnell", "flux", b"")
        scripted.serve(scripted.reply("507 Insufficient Storage", {"error": figures}))
        console.show("large")
        with pytest.raises(ProviderError) as caught:
            ask(FluxImage("flux", scripted.upstream, "flux-schnell", 1))(CancelToken())
        assert caught.value.code == "out_of_memory"
        assert "2.0 GB was free, and it needs 12.0 GB. Unload large to make room." in caught.value.message


@pytest.fixture(scope="module")
def flux() -> Iterator[LocalServer]:
    with local_server("flux_service.py", "slow:30@slowly", "oom@huge", "fail@broken", "no-image@nothing") as server:
        yield server


@pytest.fixture
def painter(flux: LocalServer) -> FluxImage:
    return FluxImage("flux", RemoteServer("Flux", flux.url), None, 1)


class TestFluxByItsUrl:
    """The image server (a fake of it) on another machine, or not in the catalogue."""

    def test_the_same_seed_draws_the_same_picture(self, painter: FluxImage):
        assert painter.make_ready(CancelToken()) == 0
        first, again, other = (ask(painter, seed=seed)(CancelToken()) for seed in (1, 1, 2))
        assert is_png(first)
        assert first == again != other

    @pytest.mark.parametrize(
        ("prompt", "code", "words"),
        [
            ("huge", "out_of_memory", "2.0 GB was free, and it needs 12.0 GB"),
            ("broken", "provider_unavailable", "The fake was told to fail"),
            ("nothing", "bad_answer", "no picture"),
            ("x" * 5000, "provider_refused", "prompt"),
        ],
    )
    def test_its_faults_are_reported(self, painter: FluxImage, prompt: str, code: str, words: str):
        with pytest.raises(ProviderError) as caught:
            ask(painter, prompt)(CancelToken())
        assert caught.value.code == code
        assert words in caught.value.message

    def test_a_cancel_ends_the_generation_there(self, painter: FluxImage, flux: LocalServer):
        """The server notices at its next step that nobody waits."""
        token = CancelToken()

        def cancel() -> None:
            wait_until(lambda: flux.at_work == 1, "the generation to begin")
            token.cancel()

        threading.Thread(target=cancel, daemon=True).start()
        with pytest.raises(Cancelled):
            ask(painter, "slowly")(token)

    def test_a_server_that_dies_breaks_the_answer_off(self):
        with local_server("flux_service.py", "die-generating") as server, pytest.raises(ProviderError) as caught:
            ask(FluxImage("flux", RemoteServer("Flux", server.url), None, 1))(CancelToken())
        assert caught.value.code == "bad_answer"
        assert "broke off" in caught.value.message

    def test_a_server_that_does_not_answer_is_named_with_its_address(self):
        provider = FluxImage("flux", RemoteServer("Flux", "http://127.0.0.1:9"), None, 1)
        for call in (provider.make_ready, ask(provider)):
            with pytest.raises(ProviderError, match=r"Flux does not answer at http://127\.0\.0\.1:9") as caught:
                call(CancelToken())
            assert caught.value.code == "provider_unavailable"

    def test_one_that_is_loading_is_waited_for(self, monkeypatch: pytest.MonkeyPatch):
        """The job waits and asks again; one that hangs ends it."""
        loading = ScriptedEngine(Reply(answer("200 OK", {"status": "loading"})))
        provider = FluxImage("flux", RemoteServer("Flux", loading.origin), None, 1)
        with pytest.raises(ProviderError, match="still loading") as caught:
            provider.make_ready(CancelToken())
        loading.close()
        assert caught.value.retry_after is not None
        monkeypatch.setattr(upstream, "HEALTH_SECONDS", 0.2)
        with local_server("flux_service.py") as server:
            server.process.send_signal(signal.SIGSTOP)
            hanging = FluxImage("flux", RemoteServer("Flux", server.url), None, 1)
            with pytest.raises(ProviderError, match="hangs or is overloaded"):
                hanging.make_ready(CancelToken())


@pytest.mark.parametrize(
    ("model", "width", "height", "size"),
    [
        ("gpt-image-1", 1024, 1024, "1024x1024"),
        ("gpt-image-1-mini", 1920, 1080, "1536x1024"),
        ("dall-e-3", 600, 1000, "1024x1792"),
        ("dall-e-2", 300, 300, "256x256"),
        ("flux", 640, 480, "640x480"),
    ],
)
def test_openais_models_are_asked_for_a_size_that_they_draw(model, width, height, size):
    assert size_for(model, width, height) == size


@pytest.mark.parametrize(("pixels", "drawn"), [(1, 64), (1023, 1024), (1031, 1024), (9999, 2048)])
def test_the_image_server_is_asked_for_a_side_that_it_draws(pixels, drawn):
    assert side(pixels) == drawn
