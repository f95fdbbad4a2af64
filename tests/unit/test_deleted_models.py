"""A deleted model stays away as long as its file is the one it was deleted with, over restarts too."""

from __future__ import annotations

import pytest

from services.deleted_models import MAX_ENTRIES, DeletedModels
from services.engines.port import Model


class Notes(dict[str, str]):
    def put(self, key: str, value: str) -> None:
        self[key] = value


def model(model_id: str, digest: str | None = "1", file: str = "/m/x.gguf") -> Model:
    return Model(model_id, "llamacpp", file, digest=digest, files=(file,))


def test_one_whose_file_stays_is_hidden_until_that_is_another() -> None:
    """Others with the same file are not; after a restart it is still away."""
    notes = Notes()
    DeletedModels(notes).add(model("a"), file_stays=True, listed=True)
    deleted = DeletedModels(notes)
    assert deleted.hides(model("a"))
    assert deleted.hides(model("a", None)), "a share that hangs says nothing of it"
    assert deleted.hides(model("a"))
    assert not deleted.hides(model("b"))
    assert not deleted.hides(model("a", file="/m/y.gguf")), "the settings name another file by now"
    assert not deleted.hides(model("a", "2"))
    assert not DeletedModels(notes).hides(model("a")), "it was back once"


def test_one_whose_file_went_is_back_with_its_file() -> None:
    """Also with the very same one, once it was missing; a look that began before it went doesn't count."""
    deleted = DeletedModels(Notes())
    deleted.add(model("a"), file_stays=False, listed=True)
    assert deleted.hides(model("a")), "a late look still saw it"
    assert deleted.hides(model("a", None))
    assert not deleted.hides(model("a"))


def test_what_the_settings_don_t_list_is_gone_with_its_file() -> None:
    """Nothing has to be remembered: nobody lists it."""
    notes = Notes()
    DeletedModels(notes).add(model("a"), file_stays=False, listed=False)
    assert not DeletedModels(notes).hides(model("a"))


def test_all_who_shared_a_file_are_back_with_it() -> None:
    """It went with its last entry, and comes back for each."""
    deleted = DeletedModels(Notes())
    deleted.add(model("a"), file_stays=True, listed=True)
    deleted.add(model("b"), file_stays=False, listed=True)
    for name in ("a", "b"):
        assert deleted.hides(model(name, None))
        assert not deleted.hides(model(name))


def test_an_engine_that_lists_what_there_is_needs_no_memory() -> None:
    """Ollama's models are gone when they are deleted."""
    deleted = DeletedModels(Notes())
    deleted.add(Model("a", "ollama", "a", digest="1"), file_stays=True, listed=True)
    assert not deleted.hides(Model("a", "ollama", "a", digest="1"))


@pytest.mark.parametrize("note", ["", "null", "{", "[1]", "{}", '[{"id": "a"}]', '[{"id": "a", "files": 1}]'])
def test_a_note_that_is_none_hides_nothing(note: str) -> None:
    """Of another version, or damaged."""
    assert not DeletedModels(Notes({"deleted_models": note})).hides(model("a"))


def test_no_more_are_remembered_than_anybody_deletes() -> None:
    """The oldest are forgotten."""
    deleted = DeletedModels(Notes())
    for number in range(MAX_ENTRIES + 1):
        deleted.add(model(f"m{number}", file=f"/m/{number}"), file_stays=True, listed=True)
    assert not deleted.hides(model("m0", file="/m/0"))
    assert deleted.hides(model("m1", file="/m/1"))
