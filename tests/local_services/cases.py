"""What the image and the vision server have to do over HTTP, the real ones and the fakes.

Tests of a server subclass these and define the fixtures: `server`, which is ready and shared (`until_sigterm`), and
`start`, which starts one of the same kind for a test that ends it.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, ClassVar

import openai
import pytest
import requests

from tests.support.console import wait_until
from tests.support.local_servers import LocalServer
from tests.support.stopwatch import Stopwatch

EVENTS = {"Accept": "text/event-stream"}
PNG = b"\x89PNG\r\n\x1a\n"
Start = Callable[[], LocalServer]


def until_sigterm(server: LocalServer) -> Iterator[LocalServer]:
    """Yield the server when it is ready; afterwards SIGTERM must end it, idle, with code 0."""
    with server:
        yield server.wait_ready()
        assert server.terminate() == 0


def size_of(png: bytes) -> tuple[int, ...]:
    """Return a PNG's width and height, from its header."""
    assert png.startswith(PNG)
    return struct.unpack(">II", png[16:24])


def error_of(response: requests.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error["code"]
    assert error["message"]
    return error


def _short(value: object) -> str:
    return str(value)[:40]


class ServerCases:
    """What both servers do. `POST` is a path that takes work, `WORK` a request for it that succeeds."""

    POST: ClassVar[str]
    WORK: ClassVar[dict[str, Any]]

    def test_health_tells_the_model_its_device_memory_and_queue(self, server: LocalServer):
        """All keys are there when the model is ready; nothing is wrong, and nothing is under way."""
        health = server.health()
        assert health["service"] == {"/generate": "flux", "/score": "vision"}[self.POST]
        assert health["status"] == "ready"
        assert health["device"] == "cpu"
        assert health["memory_bytes"] > 1_000_000
        assert health["needed_bytes"] > 0
        assert health["queue"] == {"running": 0, "waiting": 0, "limit": 8}
        assert health["progress"] is None
        assert health["error"] is None

    def test_the_model_is_listed_as_openai_lists_models(self, server: LocalServer):
        listed = requests.get(f"{server.url}/v1/models", timeout=30).json()
        assert [model["id"] for model in listed["data"]] == [server.health()["model"]]

    @pytest.mark.parametrize(
        "headers",
        [{"Origin": "http://127.0.0.1"}, {"Host": "attacker.example"}, {"Host": "attacker.example:8001"}, {"Host": ""}],
    )
    def test_requests_that_a_web_page_may_have_caused_are_refused(self, server: LocalServer, headers: dict[str, str]):
        """Another site's page, or one whose name was made to mean loopback, gets nothing done and learns nothing."""
        response = server.post(self.POST, self.WORK, headers)
        assert response.status_code == 403
        assert error_of(response)["code"] == "forbidden"
        assert requests.get(f"{server.url}/health", headers=headers, timeout=30).status_code == 403

    @pytest.mark.parametrize("host", ["localhost", "localhost:8001", "127.0.0.1", "[::1]:8001", "127.8.9.1:1"])
    def test_names_of_loopback_are_accepted(self, server: LocalServer, host: str):
        assert requests.get(f"{server.url}/health", headers={"Host": host}, timeout=30).status_code == 200

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b'"text"',
            b'{"prompt": NaN}',
            b"\xff\xfe",
            b"[" * 30_000,
            b'{"prompt": ' + b"9" * 5_000 + b"}",
        ],
        ids=["empty", "cut", "list", "text", "NaN", "no UTF-8", "nested", "digits"],
    )
    def test_a_body_that_is_no_json_object_is_refused(self, server: LocalServer, body: bytes):
        response = requests.post(server.url + self.POST, data=body, timeout=30)
        assert response.status_code in (400, 422)
        assert error_of(response)["code"] == "invalid_request"

    def test_a_body_without_a_length_is_refused(self, server: LocalServer):
        response = requests.post(server.url + self.POST, data=iter([b"{}"]), timeout=30)  # sent in chunks
        assert response.status_code == 400

    def test_a_body_that_is_too_large_is_refused_and_the_client_gets_the_answer(self, server: LocalServer):
        """It is not read into memory, and the refusal isn't lost to a connection reset."""
        response = requests.post(server.url + self.POST, data=b"x" * 30_000_000, timeout=30)
        assert response.status_code == 413
        assert error_of(response)["code"] == "too_large"

    def test_unknown_paths_and_methods_are_refused(self, server: LocalServer):
        assert requests.get(f"{server.url}/nothing", timeout=30).status_code == 404
        assert server.post("/nothing", {}).status_code == 404
        assert requests.get(server.url + self.POST, timeout=30).status_code == 405
        deleted = requests.delete(f"{server.url}/health", timeout=30)
        assert deleted.status_code == 405
        assert error_of(deleted)["code"] == "method_not_allowed"

    def test_a_second_server_on_the_port_says_that_it_is_taken(self, server: LocalServer, start: Callable[..., Any]):
        """It ends with code 1 and one sentence; the first goes on."""
        with start("--port", str(server.port)) as second:
            assert second.process.wait(timeout=60) == 1
            assert f"Can't listen on 127.0.0.1 port {server.port}" in second.log
        assert server.health()["status"] == "ready"

    def test_sigterm_during_the_load_ends_it_with_code_0(self, start: Start):
        with start() as server:
            server.wait_listening()
            assert server.terminate() == 0


class ImageServerCases(ServerCases):
    """The image server. `SLOW` is a request that takes ten seconds and more, in steps of under a second."""

    POST = "/generate"
    WORK: ClassVar[dict[str, Any]] = {"prompt": "a red fox", "width": 64, "height": 96, "steps": 2, "seed": 7}
    SLOW: ClassVar[dict[str, Any]]

    def test_a_picture_is_a_png_of_the_size_that_was_asked_for(self, server: LocalServer):
        response = server.post("/generate", self.WORK)
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "image/png"
        assert response.headers["X-Seed"] == "7"
        assert float(response.headers["X-Seconds"]) >= 0
        assert size_of(response.content) == (64, 96)

    def test_the_same_seed_gives_the_same_picture_and_another_seed_another(self, server: LocalServer):
        pictures = [server.post("/generate", {**self.WORK, "seed": seed}).content for seed in (7, 7, 8)]
        assert pictures[0] == pictures[1]
        assert pictures[0] != pictures[2]

    def test_another_prompt_gives_another_picture(self, server: LocalServer):
        other = server.post("/generate", {**self.WORK, "prompt": "a blue whale"})
        assert other.content != server.post("/generate", self.WORK).content

    def test_without_a_seed_one_is_drawn_and_told(self, server: LocalServer):
        """The seed in the answer makes the picture again."""
        unseeded = {name: value for name, value in self.WORK.items() if name != "seed"}
        first = server.post("/generate", {**unseeded, "seed": None})
        again = server.post("/generate", {**unseeded, "seed": int(first.headers["X-Seed"])})
        assert again.content == first.content

    def test_base64_comes_with_the_seed_and_the_seconds(self, server: LocalServer):
        answer = server.post("/generate", {**self.WORK, "format": "base64"}).json()
        assert set(answer) == {"image", "seed", "seconds"}
        assert answer["seed"] == 7
        assert base64.b64decode(answer["image"]) == server.post("/generate", self.WORK).content

    def test_events_tell_each_step_and_then_the_picture(self, server: LocalServer):
        """The last event has the same picture that a plain request gets."""
        response = server.post("/generate", {**self.WORK, "steps": 3}, EVENTS)
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = _events(response)
        assert events[:-1] == [{"step": step, "steps": 3} for step in (1, 2, 3)]
        assert set(events[-1]) == {"image", "seed", "seconds"}
        plain = server.post("/generate", {**self.WORK, "steps": 3}).content
        assert base64.b64decode(events[-1]["image"]) == plain

    def test_openai_images_are_answered_in_openai_s_form(self, server: LocalServer):
        """`n` pictures that differ; what only other models know is ignored."""
        body = {"model": "gpt-image-1", "prompt": "a red fox", "n": 2, "size": "64x80", "quality": "high", "seed": 1}
        response = server.post("/v1/images/generations", body)
        assert response.status_code == 200
        pictures = [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]
        assert [size_of(picture) for picture in pictures] == [(64, 80)] * 2
        assert pictures[0] != pictures[1]
        assert isinstance(response.json()["created"], int)

    def test_openai_s_official_client_gets_pictures(self, server: LocalServer):
        """Other programs can use the server as they use OpenAI."""
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as client:
            made = client.images.generate(model="gpt-image-1", prompt="a red fox", n=1, size="64x64")
            assert size_of(base64.b64decode(made.data[0].b64_json)) == (64, 64)
            with pytest.raises(openai.UnprocessableEntityError, match="n must be"):
                client.images.generate(model="gpt-image-1", prompt="a red fox", n=9)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"prompt": None}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": "  \n"}, "prompt"),
            ({"prompt": 7}, "prompt"),
            ({"prompt": "x" * 4_001}, "4000"),
            ({"prompt": "\ud800"}, "prompt"),
            ({"width": 48}, "width"),
            ({"width": 2_064}, "width"),
            ({"width": 100}, "width"),
            ({"height": "64"}, "height"),
            ({"height": 64.0}, "height"),
            ({"height": True}, "height"),
            ({"steps": 0}, "steps"),
            ({"steps": 51}, "steps"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**32}, "seed"),
            ({"format": "jpeg"}, "format"),
            ({"sharpness": 9}, "sharpness"),
        ],
        ids=_short,
    )
    def test_a_value_out_of_bounds_is_refused_and_named(self, server: LocalServer, change: dict[str, Any], named: str):
        response = server.post("/generate", {**self.WORK, **change})
        assert response.status_code == 422
        error = error_of(response)
        assert error["code"] == "invalid_request"
        assert named in error["message"]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"n": 5}, "n must"),
            ({"n": 0}, "n must"),
            ({"size": "big"}, "size"),
            ({"size": "100x100"}, "width"),
            ({"size": "64x99999"}, "height"),
            ({"size": "64x٦٤"}, "size"),
            ({"response_format": "url"}, "response_format"),
        ],
        ids=_short,
    )
    def test_a_wrong_value_in_openai_s_form_is_refused(self, server: LocalServer, change: dict[str, Any], named: str):
        response = server.post("/v1/images/generations", {"prompt": "a red fox", **change})
        assert response.status_code == 422
        assert named in error_of(response)["message"]

    @pytest.mark.parametrize("headers", [{}, EVENTS], ids=["plain", "events"])
    def test_a_client_that_disconnects_cancels_its_generation(self, server: LocalServer, headers: dict[str, str]):
        """The log says that the work was cancelled, not finished, and the next request gets its turn."""
        before = server.log
        with closing(server.begin("/generate", self.SLOW, headers)):
            server.wait_queue(running=1, waiting=0)
        server.wait_queue(running=0, waiting=0)
        said = server.log.removeprefix(before)
        assert "started" in said
        assert "the client disconnected" in said
        assert "finished" not in said
        assert server.post("/generate", self.WORK).status_code == 200

    def test_a_client_that_disconnects_while_it_waits_leaves_the_queue(self, server: LocalServer):
        """Its work never starts."""
        before = server.log
        with closing(server.begin("/generate", self.SLOW)):
            server.wait_queue(running=1, waiting=0)
            with closing(server.begin("/generate", {**self.SLOW, "seed": 4_711})):
                server.wait_queue(running=1, waiting=1)
            server.wait_queue(running=1, waiting=0)
        server.wait_queue(running=0, waiting=0)
        said = server.log.removeprefix(before)
        assert "seed 4711 cancelled while it waited" in said
        assert "seed 4711 started" not in said

    def test_a_full_queue_refuses_with_the_time_to_wait(self, server: LocalServer):
        """One runs and eight wait; the tenth is refused at once, and served when there is room again."""
        connections = [server.begin("/generate", self.SLOW)]
        try:
            server.wait_queue(running=1, waiting=0)
            connections += [server.begin("/generate", self.SLOW) for _ in range(8)]
            server.wait_queue(running=1, waiting=8)
            refused = server.post("/generate", self.WORK)
            assert refused.status_code == 429
            assert error_of(refused)["code"] == "queue_full"
            assert int(refused.headers["Retry-After"]) >= 1
            assert server.post("/generate", self.WORK, EVENTS).status_code == 429
        finally:
            for connection in connections:
                connection.close()
        server.wait_queue(running=0, waiting=0)
        assert server.post("/generate", self.WORK).status_code == 200

    def test_sigterm_during_a_generation_ends_the_server_with_code_0(self, start: Start):
        """Nothing waits for the picture."""
        with start() as server:
            server.wait_ready()
            with closing(server.begin("/generate", self.SLOW)):
                server.wait_queue(running=1, waiting=0)
                stopwatch = Stopwatch()
                assert server.terminate() == 0
                assert stopwatch.waited < 2


class VisionServerCases(ServerCases):
    """The vision server."""

    POST = "/score"

    def test_scores_are_in_their_ranges_and_stay_the_same(self, server: LocalServer):
        scores = server.post("/score", self.WORK).json()
        assert set(scores) == {"alignment", "aesthetic", "total"}
        assert 0 <= scores["alignment"] <= 1
        assert 0 <= scores["aesthetic"] <= 10
        assert scores["total"] == pytest.approx(0.7 * scores["alignment"] + 0.3 * scores["aesthetic"] / 10)
        assert server.post("/score", self.WORK).json() == scores

    @pytest.mark.parametrize(
        "change",
        [
            {"image": None},
            {"image": ""},
            {"image": "no base64!"},
            {"image": 7},
            {"image": base64.b64encode(b"GIF89a").decode()},
            {"image": base64.b64encode(b"<svg/>").decode()},
            {"prompt": None},
            {"prompt": " "},
            {"prompt": "x" * 4_001},
        ],
        ids=_short,
    )
    def test_what_is_no_picture_or_no_prompt_is_refused(self, server: LocalServer, change: dict[str, Any]):
        response = server.post("/score", {**self.WORK, **change})
        assert response.status_code == 422
        error = error_of(response)
        assert error["code"] == "invalid_request"
        assert next(iter(change)) in error["message"]

    def test_an_image_of_too_many_bytes_is_refused(self, server: LocalServer):
        image = base64.b64encode(PNG + b"x" * 20_000_000).decode()
        response = server.post("/score", {**self.WORK, "image": image})
        assert response.status_code == 413

    def test_without_a_captioner_describe_says_so(self, server: LocalServer):
        response = server.post("/describe", {"image": self.WORK["image"]})
        assert response.status_code == 501
        assert "--captioner" in error_of(response)["message"]


def wait_for_exit(server: LocalServer) -> dict[str, Any]:
    """Return the last /health of a server whose load fails, once it has exited with code 1."""
    server.wait_listening()
    seen: list[dict[str, Any]] = []

    def has_failed() -> bool:
        seen.append(server.health())
        return seen[-1]["status"] == "failed"

    wait_until(has_failed, "the load to fail")
    assert server.process.wait(timeout=60) == 1
    return seen[-1]


def _events(response: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: ")]
