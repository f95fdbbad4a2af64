"""Where models come from, and the names they answer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.catalog import Catalog, UnknownModel
from services.config import ModelEntry
from services.engines.port import Model


class Shelf:
    """An engine as far as the catalogue needs one."""

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
    """`llama3.2` means `llama3.2:latest` where nothing else has that name."""
    found = catalog(Shelf("ollama", PULLED))
    assert found.get("llama3.2").id == "llama3.2:latest"
    assert found.id_of("llama3.2") == "llama3.2:latest"
    assert found.id_of("unknown") == "unknown"


def test_an_id_wins_over_an_alias():
    """A file of that very name is what is meant."""
    found = catalog(Shelf("llamacpp", GGUF), Shelf("ollama", PULLED))
    assert found.get("llama3.2").engine == "llamacpp"
    assert set(found.models) == {"llama3.2", "llama3.2:latest"}


def test_a_name_that_two_engines_have_stays_reachable_on_both():
    """The second one carries its engine in front."""
    twin = Model("llama3.2", "ollama", "llama3.2:x")
    found = catalog(Shelf("llamacpp", GGUF), Shelf("ollama", twin))
    assert found.get("llama3.2").engine == "llamacpp"
    assert found.get("ollama/llama3.2").source == "llama3.2:x"


def test_a_listed_model_is_not_found_a_second_time():
    """The entry's id stands for the engine's model, with what the engine knows of it."""
    entry = ModelEntry(id="mine", engine="ollama", source="llama3.2:latest")
    found = catalog(Shelf("ollama", PULLED), entries=[entry])
    assert list(found.models) == ["mine"]
    assert found.get("mine").size_bytes == 1


def test_an_unknown_name_lists_the_known_ones():
    """So that a script's log says what to write instead."""
    with pytest.raises(UnknownModel, match=r"Available: llama3.2:latest\."):
        catalog(Shelf("ollama", PULLED)).get("nope")
