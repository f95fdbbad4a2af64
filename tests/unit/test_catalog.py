"""The catalogue: sources of models, their ids and aliases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.catalog import Catalog, UnknownModel
from services.config import ModelEntry
from services.engines.port import Model


class FakeEngine:
    """A minimal engine for the catalogue."""

    def __init__(self, name: str, *models: Model) -> None:
        self.name = name
        self.models = models

    def discover(self) -> Sequence[Model]:
        return self.models

    def describe(self, model: Model) -> Model:
        return replace(model, size_bytes=1)


def catalog(*engines: Any, entries: Sequence[ModelEntry] = ()) -> Catalog:
    return Catalog(entries, {engine.name: engine for engine in engines})


GGUF = Model("llama3.2", "llamacpp", "/models/llama3.2.gguf")
PULLED = Model("llama3.2:latest", "ollama", "llama3.2:latest", aliases=("llama3.2",))


def test_a_model_answers_to_its_aliases():
    """`llama3.2` means `llama3.2:latest` unless another model has that id."""
    found = catalog(FakeEngine("ollama", PULLED))
    assert found.get("llama3.2").id == "llama3.2:latest"
    assert found.id_of("llama3.2") == "llama3.2:latest"
    assert found.id_of("unknown") == "unknown"


def test_an_id_wins_over_an_alias():
    """A file named like the alias wins."""
    found = catalog(FakeEngine("llamacpp", GGUF), FakeEngine("ollama", PULLED))
    assert found.get("llama3.2").engine == "llamacpp"
    assert set(found.models) == {"llama3.2", "llama3.2:latest"}


def test_a_name_that_two_engines_have_stays_reachable_on_both():
    """The second engine's model gets the engine's name as a prefix."""
    twin = Model("llama3.2", "ollama", "llama3.2:x")
    found = catalog(FakeEngine("llamacpp", GGUF), FakeEngine("ollama", twin))
    assert found.get("llama3.2").engine == "llamacpp"
    assert found.get("ollama/llama3.2").source == "llama3.2:x"


def test_a_listed_model_is_not_found_a_second_time():
    """The listed entry and the discovered model are one, with the entry's id and what the engine knows."""
    entry = ModelEntry(id="mine", engine="ollama", source="llama3.2:latest")
    found = catalog(FakeEngine("ollama", PULLED), entries=[entry])
    assert list(found.models) == ["mine"]
    assert found.get("mine").size_bytes == 1


def test_an_unknown_name_lists_the_known_ones():
    """A script's log then shows the possible names."""
    with pytest.raises(UnknownModel, match=r"Available: llama3.2:latest\."):
        catalog(FakeEngine("ollama", PULLED)).get("nope")
