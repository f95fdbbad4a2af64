"""The real image and vision servers, with tiny models of random weights, on the CPU; `make test-local-services`.

The interface tests that the fakes pass too, and tests of what only the real servers do.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from tests.fakes.hub import FakeHub, Repo
from tests.local_services.cases import (
    EVENTS,
    PNG,
    ImageServerCases,
    VisionServerCases,
    error_of,
    size_of,
    until_sigterm,
    wait_for_exit,
)
from tests.support.local_servers import REAL, ROOT, LocalServer

ENVIRONMENT = ROOT / ".venv-local-services"
PYTHON = str(ENVIRONMENT / "bin" / "python")
MODELS = ENVIRONMENT / "models"
FLUX, CLIP = MODELS / "flux", MODELS / "clip"
HEAD = MODELS / "head.safetensors"
CONSTANT_SCORE = 6.5
Start = Callable[..., LocalServer]


def flux(log: Path, *arguments: str, model: str = str(FLUX), environment: dict[str, str] | None = None) -> LocalServer:
    return LocalServer(
        REAL / "flux_service.py", log, "--model", model, *arguments, python=PYTHON, environment=offline(environment)
    )


def vision(log: Path, *arguments: str, head: Path = HEAD) -> LocalServer:
    given = ["--model", str(CLIP), "--aesthetic-head", str(head), *arguments]
    return LocalServer(REAL / "vision_service.py", log, *given, python=PYTHON, environment=offline())


def offline(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return what the servers of these tests start with.

    One thread each, since the models are tiny. Tensors are mapped one by one, so that a limit on memory is felt.
    """
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return {**fixed, **(environment or {})}


def download(server: str, model: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the program that downloads what a server loads, to its end."""
    return subprocess.run(
        [PYTHON, str(REAL / "download.py"), server, "--model", model],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **offline(environment)},
    )


def png(width: int, height: int, colour: bytes = b"\xc0\x30\x30") -> bytes:
    """Return a PNG of one colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(b"\0" + colour * width) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class TestFlux(ImageServerCases):
    SLOW: ClassVar[dict[str, Any]] = {"prompt": "a slow fox", "width": 1_024, "height": 1_024, "steps": 50, "seed": 1}

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
        yield from until_sigterm(flux(tmp_path_factory.mktemp("flux") / "log"))

    @pytest.fixture
    def start(self, tmp_path: Path) -> Start:
        return lambda *arguments: flux(tmp_path / "log", *arguments)

    def test_health_tells_that_nothing_is_offloaded_on_the_cpu(self, server: LocalServer):
        assert server.health()["offload"] == "none"

    def test_prompts_of_any_length_are_drawn(self, server: LocalServer):
        """What exceeds the model's 256 tokens is cut off, and not written into the log."""
        body = {"prompt": "secretword " * 360, "width": 64, "height": 64, "steps": 1, "seed": 1}
        assert size_of(server.post("/generate", body).content) == (64, 64)
        assert "secretword" not in server.log

    def test_out_of_memory_is_told_with_figures_and_survived(self, server: LocalServer):
        """A limit on the process's memory makes an allocation fail; without it the next picture is drawn.

        The first picture of that size prepares oneDNN's code for it: it never recovers from a failure in preparing.
        """
        assert server.post("/generate", {**self.SLOW, "steps": 1}).status_code == 200
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        with closing(server.begin("/generate", {**self.SLOW, "steps": 20}, EVENTS)) as connection:
            response = connection.getresponse()
            assert response.readline() == b'data: {"step": 1, "steps": 20}\n'
            held = psutil.Process(server.process.pid).memory_info().vms
            resource.prlimit(server.process.pid, resource.RLIMIT_AS, (held, resource.RLIM_INFINITY))
            try:
                last = response.read().decode().split("data: ")[-1]
            finally:
                resource.prlimit(server.process.pid, resource.RLIMIT_AS, unlimited)
        error = json.loads(last)["error"]
        assert error["code"] == "out_of_memory", error
        assert error["free_bytes"] > 0
        assert error["needed_bytes"] > 0
        assert server.post("/generate", self.WORK).status_code == 200


class TestFluxLoad:
    def test_a_model_is_downloaded_with_bytes_as_progress_and_only_the_files_it_needs(self, tmp_path: Path):
        """The second start needs no network."""
        files = {str(path.relative_to(FLUX)): path.read_bytes() for path in FLUX.rglob("*") if path.is_file()}
        unneeded = {"flux1-schnell.safetensors": b"the same weights again", "README.md": b"# FLUX"}
        needed = sum(map(len, files.values()))
        environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        with FakeHub({"someone/tiny-flux": Repo({**files, **unneeded})}) as hub:
            hub.faults.bytes_per_second = 100_000
            online = {**environment, "HF_ENDPOINT": hub.url}
            with flux(tmp_path / "log", model="someone/tiny-flux", environment=online) as server:
                seen = []
                while (health := server.wait_listening().health())["status"] == "loading":
                    seen.append(health["progress"])
                    if seen[-1] and seen[-1]["stage"] == "loading":
                        break
                assert health["status"] != "failed", server.log
            fetched = {request.path for request in hub.requests_to("hub")}
        downloading = [progress for progress in seen if progress and progress["stage"] == "downloading"]
        assert {progress["total_bytes"] for progress in downloading} == {needed}
        counts = [progress["completed_bytes"] for progress in downloading]
        assert counts == sorted(counts)
        assert any(0 < count < needed for count in counts)
        assert counts[-1] <= needed
        assert not [path for path in fetched if path.endswith(("README.md", "flux1-schnell.safetensors"))]
        with flux(tmp_path / "log", model="someone/tiny-flux", environment=environment) as server:  # the hub is gone
            assert server.wait_ready().post("/generate", TestFlux.WORK).status_code == 200

    def test_the_program_that_only_downloads_tells_bytes_and_leaves_nothing_for_the_server_to_do(self, tmp_path: Path):
        """Lines of JSON on stdout; a second run finds everything there and says nothing, without a network."""
        files = {str(path.relative_to(FLUX)): path.read_bytes() for path in FLUX.rglob("*") if path.is_file()}
        home = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        with FakeHub({"someone/tiny-flux": Repo(files)}) as hub:
            fetched = download("flux", "someone/tiny-flux", {**home, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url})
        total = sum(map(len, files.values()))
        assert fetched.returncode == 0, fetched.stderr
        lines = [json.loads(line) for line in fetched.stdout.splitlines()]
        assert {line["total_bytes"] for line in lines} == {total}
        assert lines[-1]["completed_bytes"] == total
        again = download("flux", "someone/tiny-flux", home)
        assert (again.returncode, again.stdout) == (0, ""), again.stderr

    def test_the_program_that_only_downloads_explains_what_it_lacks(self, tmp_path: Path):
        failed = download("vision", "someone/unknown", {"HF_HOME": str(tmp_path)})
        assert failed.returncode == 1
        assert "can't be reached" in json.loads(failed.stdout)["error"]

    def test_a_gated_model_is_explained(self, tmp_path: Path):
        files = {"model_index.json": b"{}", "vae/config.json": b"{}"}
        with FakeHub({"someone/gated": Repo(files, gated="hf_secret")}) as hub:
            environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
            with flux(tmp_path / "log", model="someone/gated", environment=environment) as server:
                error = wait_for_exit(server)["error"]
        assert "accept its licence" in error
        assert "HF_TOKEN" in error

    @pytest.mark.parametrize(
        ("model", "said"),
        [
            ("someone/unknown", "can't be reached"),
            ("/nowhere/flux", "There is no folder /nowhere/flux"),
            ("not a name", "neither a folder nor a name"),
            (str(CLIP), "is not a diffusers model"),
        ],
    )
    def test_a_model_that_can_t_be_had_is_explained(self, tmp_path: Path, model: str, said: str):
        with flux(tmp_path / "log", model=model, environment={"HF_HOME": str(tmp_path)}) as server:
            assert said in wait_for_exit(server)["error"]

    @pytest.mark.parametrize("damage", ["cut", "header"])
    def test_damaged_weights_are_explained(self, tmp_path: Path, damage: str):
        model = Path(shutil.copytree(FLUX, tmp_path / "flux"))
        weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100_000] if damage == "cut" else b"\xff" * 1_000)
        with flux(tmp_path / "log", model=str(model)) as server:
            assert wait_for_exit(server)["error"]
            assert "Traceback" in server.log


class TestVision(VisionServerCases):
    WORK: ClassVar[dict[str, Any]] = {"image": in_base64(png(64, 64)), "prompt": "a red square"}

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
        yield from until_sigterm(vision(tmp_path_factory.mktemp("vision") / "log"))

    @pytest.fixture
    def start(self, tmp_path: Path) -> Start:
        return lambda *arguments: vision(tmp_path / "log", *arguments)

    def test_the_aesthetic_score_is_the_head_s(self, server: LocalServer):
        assert server.post("/score", self.WORK).json()["aesthetic"] == CONSTANT_SCORE

    def test_the_alignment_is_clipscore(self, server: LocalServer):
        """2.5 times the cosine that transformers gets for the same PNG, JPEG or WebP and words, or 0 below that."""
        references = json.loads((MODELS / "references.json").read_text())
        assert sum(reference["cosine"] > 0.02 for reference in references) > 3
        for reference in references:
            scores = server.post("/score", {"image": reference["image"], "prompt": reference["prompt"]}).json()
            assert scores["alignment"] == pytest.approx(min(max(2.5 * reference["cosine"], 0), 1), abs=1e-3)

    def test_long_prompts_are_scored(self, server: LocalServer):
        """Beyond CLIP's 77 tokens, text doesn't count."""
        assert server.post("/score", {**self.WORK, "prompt": "red square " * 300}).status_code == 200

    def test_a_picture_that_unpacks_to_gigabytes_is_refused_unread(self, server: LocalServer):
        """A PNG of 1 MB with 900 million pixels would take 2.7 GB."""
        bomb = bytearray(png(64, 64))
        bomb[16:24] = struct.pack(">II", 30_000, 30_000)
        bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
        response = server.post("/score", {**self.WORK, "image": in_base64(bytes(bomb))})
        assert response.status_code == 422
        assert "more than 40 million pixels" in error_of(response)["message"]

    @pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (6_000, 6_000)], ids=str)
    def test_pictures_of_odd_sizes_are_scored(self, server: LocalServer, size: tuple[int, int]):
        """Scaling the short side of a picture of one row, as CLIP's preprocessing does, would take gigabytes."""
        before = psutil.Process(server.process.pid).memory_info().rss
        assert server.post("/score", {**self.WORK, "image": in_base64(png(*size))}).status_code == 200
        assert psutil.Process(server.process.pid).memory_info().rss < before + 700_000_000

    @pytest.mark.parametrize("kept", [8, 20, 60, 100])
    def test_a_picture_that_is_cut_off_is_refused(self, server: LocalServer, kept: int):
        response = server.post("/score", {**self.WORK, "image": in_base64(png(64, 64)[:kept])})
        assert response.status_code == 422
        assert "decoded" in error_of(response)["message"]

    def test_a_file_of_another_kind_with_png_s_first_bytes_is_refused(self, server: LocalServer):
        assert server.post("/score", {**self.WORK, "image": in_base64(PNG + b"\0" * 5_000)}).status_code == 422

    def test_a_captioner_describes_pictures_and_a_head_for_another_clip_gives_no_score(self, tmp_path: Path):
        """No aesthetic score is invented: /health says what is wrong, and the total is the alignment alone."""
        head, captioner = MODELS / "wide-head.pth", str(MODELS / "blip")
        with vision(tmp_path / "log", "--captioner", captioner, head=head) as server:
            health = server.wait_ready().health()
            assert health["captioner"] == captioner
            assert server.post("/describe", {"image": self.WORK["image"]}).json()["description"]
            assert "does not fit embeddings of 16 numbers" in health["aesthetic_error"]
            scores = server.post("/score", self.WORK).json()
            assert scores["aesthetic"] is None
            assert scores["total"] == scores["alignment"]

    def test_a_score_that_is_no_number_is_an_error(self, tmp_path: Path):
        with vision(tmp_path / "log", head=MODELS / "nan-head.pth") as server:
            response = server.wait_ready().post("/score", self.WORK)
            assert response.status_code == 500
            assert error_of(response)["code"] == "bad_score"
            assert "NaN" not in response.text
