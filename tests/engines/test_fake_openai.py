"""The fake of OpenAI's API answers the official client as the real one does, and shows the faults it is told to."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.fakes.openai_server import KEY, TEXT_MODEL, OpenAIServer, png
from tests.support.console import wait_until

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def client(server: OpenAIServer) -> Iterator[openai.OpenAI]:
    server.reset()
    with openai.OpenAI(api_key=KEY, base_url=server.url, max_retries=0) as client:
        yield client


def test_the_official_client_gets_models_chats_pictures_and_embeddings(client: openai.OpenAI):
    """Whole and streamed answers, a judgement of a picture, and a picture itself."""
    assert TEXT_MODEL in [model.id for model in client.models.list()]
    whole = client.chat.completions.create(model=TEXT_MODEL, messages=HELLO)
    stream = client.chat.completions.create(model=TEXT_MODEL, messages=HELLO, stream=True)
    assert whole.choices[0].message.content == "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    shown = {"url": "data:image/png;base64," + base64.b64encode(png(8, 8, "x")).decode()}
    content = [{"type": "text", "text": "Judge it."}, {"type": "image_url", "image_url": shown}]
    asked: Any = [{"role": "user", "content": content}]
    judged = client.chat.completions.create(model=TEXT_MODEL, messages=asked)
    assert "alignment" in str(judged.choices[0].message.content)
    drawn = client.images.generate(model="gpt-image-1", prompt="x", size="1024x1024")
    assert base64.b64decode(str(drawn.data[0].b64_json)) == png(1024, 1024, "x")
    assert len(client.embeddings.create(model="text-embedding-3-small", input=["a", "b"]).data) == 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("unauthorized", openai.AuthenticationError),
        ("rate_limited:7", openai.RateLimitError),
        ("error", openai.InternalServerError),
        ("refused", openai.BadRequestError),
        ("cut", openai.APIConnectionError),
    ],
)
def test_a_fault_occurs_as_often_as_it_is_told_to(
    client: openai.OpenAI, server: OpenAIServer, fault: str, error: type[openai.APIError]
):
    """The official client raises the error that it raises for the real API; the next request succeeds."""
    server.fault(fault, on="/chat/completions", times=1)
    with pytest.raises(error) as caught:
        client.chat.completions.create(model=TEXT_MODEL, messages=HELLO)
    if fault == "rate_limited:7":
        assert isinstance(caught.value, openai.RateLimitError)
        assert caught.value.response.headers["Retry-After"] == "7"
    assert client.chat.completions.create(model=TEXT_MODEL, messages=HELLO).choices
    wait_until(lambda: server.in_flight == 0, "the last request to end")


def test_a_client_that_leaves_is_counted_and_nothing_stays_in_flight(server: OpenAIServer):
    """So that a test can prove that a cancelled request has ended here."""
    server.reset()
    server.fault("stuck")
    with socket.create_connection(server.server_address) as left:
        left.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: server.in_flight == 1, "the request to arrive")
    wait_until(lambda: server.in_flight == 0, "the request to end")
    assert server.disconnects == 1


def test_a_request_without_the_key_gets_openais_words(server: OpenAIServer):
    """They quote a part of the wrong key, which must not be shown to people."""
    server.reset()
    with (
        openai.OpenAI(api_key="sk-another-key-1234", base_url=server.url, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match=r"sk-anoth\*+1234"),
    ):
        client.models.list()
