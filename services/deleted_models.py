"""Models that people have deleted and that would be listed all the same: by the settings, or for a file others use."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from services.engines.port import Model

NOTE = "deleted_models"
MOST_KEPT = 500
"""The oldest are forgotten then; each was listed by somebody."""


class Notes(Protocol):
    """Where it is kept over a restart."""

    def get(self, key: str) -> str | None: ...

    def put(self, key: str, value: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Deleted:
    """What was deleted. `digest` tells its file from another one that takes its place.

    `file_deleted`: its file was, too. `gone`: it has been missing since; a look that is late may still have seen it.
    """

    id: str
    source: str
    digest: str | None
    files: tuple[str, ...]
    file_deleted: bool
    gone: bool = False


class DeletedModels:
    """Hides a deleted model until its file is another one, or is back after it was gone."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes
        self._deleted: dict[str, _Deleted] = _read(notes.get(NOTE) if notes is not None else None)

    def add(self, model: Model, *, file_stays: bool, listed: bool) -> None:
        """It was deleted: with its file, or without it, because others use that. `listed`: the settings go on to."""
        if not model.files:
            return  # its engine lists what there is, and nothing else
        if not file_stays:
            for other in [d for d in self._deleted.values() if not {*d.files}.isdisjoint(model.files)]:
                self._deleted[other.id] = replace(other, file_deleted=True)
        if file_stays or listed:
            self._deleted[model.id] = _Deleted(model.id, model.source, model.digest, model.files, not file_stays)
        while len(self._deleted) > MOST_KEPT:
            del self._deleted[next(iter(self._deleted))]
        self._save()

    def hides(self, model: Model) -> bool:
        """Whether not to list it. Forgets that it was deleted once its file is a new one."""
        deleted = self._deleted.get(model.id)
        if deleted is None or deleted.source != model.source:
            return False
        if model.digest is None:
            if deleted.file_deleted and not deleted.gone:
                self._deleted[model.id] = replace(deleted, gone=True)
                self._save()
            return True
        if deleted.gone or model.digest != deleted.digest:
            del self._deleted[model.id]
            self._save()
            return False
        return True

    def _save(self) -> None:
        if self._notes is not None:
            self._notes.put(NOTE, json.dumps([asdict(deleted) for deleted in self._deleted.values()]))


def _read(note: str | None) -> dict[str, _Deleted]:
    """What an earlier run has noted; nothing where that is no note of this version."""
    try:
        found = [_Deleted(**{**entry, "files": tuple(entry["files"])}) for entry in json.loads(note or "[]")]
    except (ValueError, TypeError, KeyError):
        return {}
    return {deleted.id: deleted for deleted in found}
