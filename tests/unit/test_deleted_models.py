"""A deleted model stays hidden while its file is unchanged, also over restarts."""

from __future__ import annotations

import pytest

from services.deleted_models import MAX_ENTRIES, DeletedModels
from services.engines.port import Model


class Notes(dict[str, str]):
    def put(self, key: str, value: str) -> None:
        self[key] = value


def model(model_id: str, digest: str | None = "1", file: str = "/m/x.gguf") -> Model:
    return Model(model_id, "llamacpp", file, digest=digest, files=(file,))


def test_a_model_whose_file_stays_is_hidden_until_the_file_changes() -> None:
    """Other models with the same file stay listed; after a restart the model is still hidden."""
    notes = Notes()
    DeletedModels(notes).add(model("a"), file_stays=True, listed=True)
    deleted = DeletedModels(notes)
    assert deleted.hides(model("a"))
    assert deleted.hides(model("a", None)), "a hanging share says nothing about the file"
    assert deleted.hides(model("a"))
    assert not deleted.hides(model("b"))
    assert not deleted.hides(model("a", file="/m/y.gguf")), "the settings name another file now"
    assert not deleted.hides(model("a", "2"))
    assert not DeletedModels(notes).hides(model("a")), "it was listed again once"


def test_a_model_whose_file_was_deleted_returns_with_a_file() -> None:
    """Even the same file, once it was missing; a scan that started before the deletion doesn't count."""
    deleted = DeletedModels(Notes())
    deleted.add(model("a"), file_stays=False, listed=True)
    assert deleted.hides(model("a")), "an outdated scan still saw the file"
    assert deleted.hides(model("a", None))
    assert not deleted.hides(model("a"))


def test_a_model_not_in_the_settings_is_not_remembered() -> None:
    """Nothing is remembered, because nothing lists it any more."""
    notes = Notes()
    DeletedModels(notes).add(model("a"), file_stays=False, listed=False)
    assert not DeletedModels(notes).hides(model("a"))


def test_all_entries_of_a_shared_file_return_with_it() -> None:
    """The file was deleted with its last entry; with a new file all entries are listed again."""
    deleted = DeletedModels(Notes())
    deleted.add(model("a"), file_stays=True, listed=True)
    deleted.add(model("b"), file_stays=False, listed=True)
    for name in ("a", "b"):
        assert deleted.hides(model(name, None))
        assert not deleted.hides(model(name))


def test_models_that_their_engine_lists_are_not_remembered() -> None:
    """Ollama's models disappear from its list when they are deleted."""
    deleted = DeletedModels(Notes())
    deleted.add(Model("a", "ollama", "a", digest="1"), file_stays=True, listed=True)
    assert not deleted.hides(Model("a", "ollama", "a", digest="1"))


@pytest.mark.parametrize("note", ["", "null", "{", "[1]", "{}", '[{"id": "a"}]', '[{"id": "a", "files": 1}]'])
def test_an_invalid_note_hides_nothing(note: str) -> None:
    """For example a note of another version, or a damaged one."""
    assert not DeletedModels(Notes({"deleted_models": note})).hides(model("a"))


def test_the_number_of_remembered_models_is_limited() -> None:
    """The oldest entries are dropped."""
    deleted = DeletedModels(Notes())
    for number in range(MAX_ENTRIES + 1):
        deleted.add(model(f"m{number}", file=f"/m/{number}"), file_stays=True, listed=True)
    assert not deleted.hides(model("m0", file="/m/0"))
    assert deleted.hides(model("m1", file="/m/1"))
