"""The users of a GGUF file, by any path, and which files are deleted with a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.catalog import Catalog
from services.config import ModelEntry
from services.engines.llamacpp.engine import LlamaCpp
from services.engines.llamacpp.folder import ModelFolder
from services.engines.port import EngineError
from services.engines.processes import ProcessRegistry
from tests.support.console import DEMO_MODELS

MINI = DEMO_MODELS / "switchyard-mini.gguf"
MakeCatalog = Callable[..., Catalog]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(MINI, folder / "real.gguf")
    return folder


@pytest.fixture
def engine(models: Path, tmp_path: Path) -> Iterator[LlamaCpp]:
    engine = LlamaCpp(
        ModelFolder(models), ProcessRegistry(tmp_path / "state"), context_length=512, parallel=1, standby=False
    )
    yield engine
    engine.close()


@pytest.fixture
def make_catalog(engine: LlamaCpp) -> MakeCatalog:
    def make(**sources: Any) -> Catalog:
        """With models listed in the settings: id to source, or to the whole entry."""
        entries = [
            ModelEntry(id=name, **(source if isinstance(source, dict) else {"source": str(source)}))
            for name, source in sources.items()
        ]
        return Catalog(entries, {"llamacpp": engine})

    return make


def delete(catalog: Catalog, engine: LlamaCpp, name: str) -> None:
    """Delete a model as the switcher's job does."""
    model = catalog.get(name)
    engine.remove(model, {file for m in catalog.sharers_of(model) for file in (*m.files, *m.companions)})
    catalog.forget(model)


def sharers(catalog: Catalog, name: str) -> list[str]:
    return [model.id for model in catalog.sharers_of(catalog.get(name))]


def test_two_names_for_one_path_share_it(make_catalog: MakeCatalog, models: Path) -> None:
    """Relative, absolute, and with `..` in it."""
    (models / "sub").mkdir()
    catalog = make_catalog(a="real.gguf", b=models / "real.gguf", c="sub/../real.gguf")
    assert (sharers(catalog, "a"), sharers(catalog, "c")) == (["b", "c"], ["a", "b"])


def test_deleting_a_link_keeps_its_file(make_catalog: MakeCatalog, engine: LlamaCpp, models: Path) -> None:
    """The file stays for its own entry."""
    (models / "link.gguf").symlink_to("real.gguf")
    catalog = make_catalog()
    assert (sharers(catalog, "link"), sharers(catalog, "real")) == (["real"], ["link"])
    delete(catalog, engine, "link")
    assert [path.name for path in models.iterdir()] == ["real.gguf"]
    assert list(catalog.models) == ["real"]


def test_a_file_stays_while_links_lead_to_it(make_catalog: MakeCatalog, engine: LlamaCpp, models: Path) -> None:
    """The file's own entry is deleted; the file goes with the last link, and a new file of that name is listed."""
    (models / "link.gguf").symlink_to("real.gguf")
    catalog = make_catalog()
    delete(catalog, engine, "real")
    assert list(catalog.models) == ["link"]
    assert catalog.get("link").fault is None
    delete(catalog, engine, "link")
    assert list(models.iterdir()) == []
    shutil.copy(MINI, models / "real.gguf")
    catalog.refresh()
    assert list(catalog.models) == ["real"]


def test_a_hard_link_is_a_file_of_its_own(make_catalog: MakeCatalog, engine: LlamaCpp, models: Path) -> None:
    """Deleting one name leaves the other intact."""
    (models / "other.gguf").hardlink_to(models / "real.gguf")
    catalog = make_catalog()
    assert sharers(catalog, "real") == []
    delete(catalog, engine, "real")
    assert catalog.get("other").fault is None


def test_a_copy_of_the_same_size_and_time_is_another_file(make_catalog: MakeCatalog, models: Path) -> None:
    """For example a copy made by `cp -p`."""
    shutil.copy2(models / "real.gguf", models / "copy.gguf")
    assert sharers(make_catalog(), "real") == []


def test_a_file_used_by_another_models_arguments_stays(
    make_catalog: MakeCatalog, engine: LlamaCpp, models: Path
) -> None:
    """A draft model or projector, named in the arguments."""
    shutil.copy(MINI, models / "draft.gguf")
    catalog = make_catalog(
        big={"source": "real.gguf", "options": {"arguments": ["--model-draft", str(models / "draft.gguf")]}}
    )
    assert (sharers(catalog, "draft"), sharers(catalog, "big")) == (["big"], [])
    delete(catalog, engine, "draft")
    assert (models / "draft.gguf").exists()
    assert list(catalog.models) == ["big"]


def test_a_split_model_is_shared_by_any_of_its_parts(make_catalog: MakeCatalog, engine: LlamaCpp, models: Path) -> None:
    """All parts are deleted together; of an incomplete set, those that exist."""
    for number in (1, 2):
        shutil.copy(MINI, models / f"split-0000{number}-of-00002.gguf")
    catalog = make_catalog(second="split-00002-of-00002.gguf")
    assert sharers(catalog, "second") == ["split"]
    delete(catalog, engine, "second")
    assert len(list(models.glob("split-*"))) == 2
    (models / "split-00002-of-00002.gguf").unlink()
    catalog.refresh()
    delete(catalog, engine, "split")
    assert list(models.glob("split-*")) == []


def test_a_file_outside_the_folder_is_not_deleted(
    make_catalog: MakeCatalog, engine: LlamaCpp, models: Path, tmp_path: Path
) -> None:
    """Even behind a link in the folder; but an entry can be deleted while others use the file."""
    elsewhere = tmp_path / "elsewhere.gguf"
    shutil.copy(MINI, elsewhere)
    catalog = make_catalog(listed=elsewhere)
    with pytest.raises(EngineError, match="is not in the models folder"):
        delete(catalog, engine, "listed")
    (models / "link.gguf").symlink_to(elsewhere)
    catalog.refresh()
    delete(catalog, engine, "listed")
    assert "listed" not in catalog.models
    with pytest.raises(EngineError, match="is not in the models folder"):
        delete(catalog, engine, "link")
    assert (models / "link.gguf").exists()
    assert elsewhere.exists()
