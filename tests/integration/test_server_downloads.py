"""The local servers' own program for downloads, with the fake Hugging Face hub and the app's huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cancellation import Cancelled, CancelToken
from services.engines.port import EngineError, Evidence
from services.engines.processes import ProcessRegistry
from services.engines.python_server.about import FLUX, VISION
from services.engines.python_server.packages import Packages
from services.engines.python_server.program import Order
from services.engines.python_server.weights import Weights
from tests.fakes.hub import FakeHub, Repo
from tests.support.console import ROOT
from tests.support.hub import hub_running

REAL = ROOT / "services" / "local_servers"
FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00001.safetensors": b"weights" * 200_000,
    "vae/diffusion_pytorch_model.safetensors": b"decoder" * 1_000,
    "flux1.safetensors": b"the weights a second time",
    "README.md": b"# A model",
}
ORDER = Order("org/tiny")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with hub_running({"org/tiny": Repo(FILES)}, monkeypatch, tmp_path / "hf") as hub:
        yield hub


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(FLUX, Packages(REAL, tmp_path / "no-environment"), ProcessRegistry(tmp_path / "state"))


def cached(tmp_path: Path) -> set[str]:
    snapshots = tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots"
    (commit,) = snapshots.iterdir()
    return {path.relative_to(commit).as_posix() for path in commit.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("hub")
def test_the_files_that_flux_loads_arrive_in_the_cache(weights: Weights, tmp_path: Path) -> None:
    """Reported by bytes; the weights that the repository holds a second time are left out."""
    seen: list[Evidence] = []
    weights.fetch(ORDER, seen.append, CancelToken())
    assert cached(tmp_path) == set(FILES) - {"flux1.safetensors", "README.md"}
    assert seen[-1].stage == "downloading"
    assert 0.9 < (seen[-1].fraction or 0.0) <= 1
    assert (seen[-1].detail or "").endswith("of 1.4 MB downloaded")


def test_files_in_the_cache_are_not_downloaded_again(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the next run of the app, which has no network."""
    with hub_running({"org/tiny": Repo(FILES)}, monkeypatch, tmp_path / "hf"):
        weights.fetch(ORDER, lambda _: None, CancelToken())
    again = Weights(FLUX, Packages(REAL, tmp_path / "no-environment"), ProcessRegistry(tmp_path / "next-run"))
    seen: list[Evidence] = []
    again.fetch(ORDER, seen.append, CancelToken())
    assert seen == []


@pytest.mark.usefixtures("hub")
def test_an_unknown_repository_is_named(weights: Weights) -> None:
    with pytest.raises(EngineError, match="The Hugging Face hub has no org/other"):
        weights.fetch(Order("org/other"), lambda _: None, CancelToken())


def test_a_download_under_way_can_be_cancelled(hub: FakeHub, weights: Weights, tmp_path: Path) -> None:
    hub.faults.bytes_per_second = 50_000
    token = CancelToken()
    with pytest.raises(Cancelled):
        weights.fetch(ORDER, lambda _: token.cancel(), token)
    assert list((tmp_path / "state" / "processes").iterdir()) == []


def test_the_files_that_vision_loads_are_those_of_both_its_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"w" * 100, "pytorch_model.bin": b"w" * 100}
    repos = {"org/tiny": Repo(files), "org/captioner": Repo(files)}
    vision = Weights(VISION, Packages(REAL, tmp_path / "no-environment"), ProcessRegistry(tmp_path / "state"))
    with hub_running(repos, monkeypatch, tmp_path / "hf"):
        vision.fetch(Order("org/tiny", arguments=("--captioner", "org/captioner")), lambda _: None, CancelToken())
    assert cached(tmp_path) == {"config.json", "model.safetensors"}
    assert (tmp_path / "hf" / "hub" / "models--org--captioner").is_dir()
