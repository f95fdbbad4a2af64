"""The fakes of the image and vision servers keep to the servers' interface, and show the faults they promise.

Also what the real servers do in an environment without the packages that they need, such as the one of the tests.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests

from tests.local_services.cases import (
    EVENTS,
    ImageServerCases,
    VisionServerCases,
    error_of,
    size_of,
    until_sigterm,
    wait_for_exit,
)
from tests.support.console import wait_until
from tests.support.local_servers import FAKE, REAL, LocalServer

FLUX, VISION = FAKE / "flux_service.py", FAKE / "vision_service.py"
PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\nnot decoded by the fake").decode()
Start = Callable[..., LocalServer]


@pytest.fixture
def start_flux(tmp_path: Path) -> Start:
    def start(*arguments: str, faults: str = "slow:0.2@slow") -> LocalServer:
        return LocalServer(FLUX, tmp_path / "flux.log", *arguments, environment={"FAKE_FLUX_FAULT": faults})

    return start


@pytest.fixture
def start_vision(tmp_path: Path) -> Start:
    def start(*arguments: str, faults: str = "") -> LocalServer:
        return LocalServer(VISION, tmp_path / "vision.log", *arguments, environment={"FAKE_VISION_FAULT": faults})

    return start


class TestFakeFlux(ImageServerCases):
    SLOW: ClassVar[dict[str, Any]] = {"prompt": "a slow fox", "width": 64, "height": 64, "steps": 50}

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
        log = tmp_path_factory.mktemp("flux") / "log"
        yield from until_sigterm(LocalServer(FLUX, log, environment={"FAKE_FLUX_FAULT": "slow:0.2@slow"}))

    @pytest.fixture
    def start(self, start_flux: Start) -> Start:
        return start_flux


class TestFakeVision(VisionServerCases):
    WORK: ClassVar[dict[str, Any]] = {"image": PICTURE, "prompt": "a red fox"}

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
        yield from until_sigterm(LocalServer(VISION, tmp_path_factory.mktemp("vision") / "log"))

    @pytest.fixture
    def start(self, start_vision: Start) -> Start:
        return start_vision

    def test_with_a_captioner_pictures_are_described(self, start: Start):
        with start("--captioner", "any") as server:
            server.wait_ready()
            assert server.post("/describe", {"image": PICTURE}).json()["description"]


class TestFaults:
    def test_a_download_tells_its_bytes_and_requests_meanwhile_when_to_come_again(self, start_flux: Start):
        with start_flux(faults="slow-load:60,download:12000000000") as server:
            server.wait_listening()
            wait_until(lambda: (server.health()["progress"] or {}).get("total_bytes") is not None, "progress")
            health = server.health()
            assert health["status"] == "loading"
            assert health["progress"]["stage"] == "downloading"
            assert health["progress"]["total_bytes"] == 12_000_000_000
            refused = server.post("/generate", {"prompt": "fox"})
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "loading"
            assert int(refused.headers["Retry-After"]) >= 1

    def test_a_load_that_fails_is_told_and_ends_the_process_with_code_1(self, start_flux: Start):
        """`failed` with the cause in /health for a moment; a traceback in the log."""
        with start_flux(faults="die-loading,slow-load:0.5") as server:
            health = wait_for_exit(server)
            assert "damaged" in health["error"]
            assert "Traceback" in server.log
            assert "damaged" in server.log

    def test_a_load_that_lacks_memory_tells_the_figures(self, start_flux: Start):
        with start_flux(faults="load-oom,slow-load:0.5") as server:
            assert "12.0 GB are needed" in wait_for_exit(server)["error"]

    def test_a_hanging_health_hangs_alone(self, start_flux: Start):
        with start_flux(faults="hang-health") as server:
            wait_until(lambda: "ready" in server.log, "the model to load")
            with pytest.raises(requests.Timeout):
                requests.get(f"{server.url}/health", timeout=0.3)
            assert server.post("/generate", {"prompt": "fox", "width": 64, "height": 64}).status_code == 200

    def test_out_of_memory_is_told_with_figures(self, start_flux: Start):
        """Only requests whose prompt has the text of the fault fail."""
        with start_flux(faults="oom@whale,fail@squid") as server:
            server.wait_ready()
            body = {"prompt": "a whale", "width": 64, "height": 64}
            response = server.post("/generate", body)
            assert response.status_code == 507
            error = error_of(response)
            assert error["code"] == "out_of_memory"
            assert error["needed_bytes"] > error["free_bytes"] > 0
            streamed = server.post("/generate", body, EVENTS)
            assert '"code": "out_of_memory"' in streamed.text
            failed = server.post("/generate", {**body, "prompt": "a squid"})
            assert (failed.status_code, error_of(failed)["code"]) == (500, "failed")
            assert server.post("/generate", {**body, "prompt": "a fox"}).status_code == 200

    def test_an_answer_that_is_no_picture(self, start_flux: Start):
        with start_flux(faults="no-image@fox") as server:
            server.wait_ready()
            answer = server.post("/generate", {"prompt": "fox", "width": 64, "height": 64})
            assert answer.headers["Content-Type"] == "image/png"
            with pytest.raises(AssertionError):
                size_of(answer.content)

    def test_a_crash_in_the_middle_of_a_generation(self, start_flux: Start):
        with start_flux(faults="die-generating@fox") as server:
            server.wait_ready()
            with pytest.raises(requests.ConnectionError):
                server.post("/generate", {"prompt": "fox"})
            assert server.process.wait(timeout=60) == 3

    def test_stuck_work_keeps_neither_health_nor_sigterm_from_an_answer(self, start_flux: Start):
        with start_flux(faults="stuck") as server:
            server.wait_ready()
            with closing(server.begin("/generate", {"prompt": "fox"})):
                server.wait_queue(running=1, waiting=0)
            assert server.queue() == (1, 0)
            assert server.terminate() == 0

    def test_a_server_that_ignores_sigterm(self, start_flux: Start):
        with start_flux(faults="ignore-sigterm") as server:
            server.wait_ready()
            server.process.terminate()
            assert server.post("/generate", {"prompt": "fox", "width": 64, "height": 64}).status_code == 200
            assert server.process.poll() is None

    def test_scores_that_are_no_numbers(self, start_vision: Start):
        """As a careless server would send them: `NaN` is not JSON, though Python's reader takes it."""
        with start_vision(faults="nan@fox") as server:
            server.wait_ready()
            answer = server.post("/score", {"image": PICTURE, "prompt": "fox"})
            assert "NaN" in answer.text
            assert math.isnan(answer.json()["total"])
            assert server.post("/score", {"image": PICTURE, "prompt": "whale"}).json()["total"] >= 0

    def test_memory_is_held_and_reported(self, start_flux: Start):
        with start_flux(faults="hold:100,needs:150") as server:
            health = server.wait_ready().health()
            assert health["memory_bytes"] > 100_000_000
            assert health["needed_bytes"] == 150_000_000


class TestRealWithoutPackages:
    """The real servers, run by a Python that lacks torch and the rest."""

    @pytest.mark.parametrize("script", ["flux_service.py", "vision_service.py"])
    def test_the_missing_packages_are_named_with_the_command_that_installs_them(self, tmp_path: Path, script: str):
        with LocalServer(REAL / script, tmp_path / "log") as server:
            error = wait_for_exit(server)["error"]
            assert "torch" in error
            assert "transformers" in error
            assert f"pip install --requirement {REAL / 'requirements.txt'}" in error

    @pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", ""])
    def test_only_loopback_addresses_are_listened_on(self, tmp_path: Path, host: str):
        with LocalServer(REAL / "flux_service.py", tmp_path / "log", "--host", host) as server:
            assert server.process.wait(timeout=60) == 2
            assert "loopback" in server.log
