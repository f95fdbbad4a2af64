"""Models that were deleted and would be listed nevertheless: by the settings, or because others use their file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from services.engines.port import Model
from services.notes import Notes

NOTE = "deleted_models"
MAX_ENTRIES = 500
"""Limit of remembered models; the oldest are forgotten."""


@dataclass(frozen=True, slots=True)
class _Deleted:
    """A deleted model. `digest` identifies its file, so that a new file at the same path is recognised.

    `file_deleted`: its file was deleted too. `gone`: a scan has seen that the file is missing. Until then a scan that
    began before the deletion may still report the old file.
    """

    id: str
    source: str
    digest: str | None
    files: tuple[str, ...]
    file_deleted: bool
    gone: bool = False


class DeletedModels:
    """Hides a deleted model until its file is a different one, or reappears after it was gone."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes
        self._deleted: dict[str, _Deleted] = _read(notes.get(NOTE) if notes is not None else None)

    def add(self, model: Model, *, file_stays: bool, listed: bool) -> None:
        """Remember a deleted model. `file_stays`: others use its file. `listed`: the settings still list it."""
        if not model.files:
            return  # its engine lists existing models only
        if not file_stays:
            for other in [d for d in self._deleted.values() if not {*d.files}.isdisjoint(model.files)]:
                self._deleted[other.id] = replace(other, file_deleted=True)
        if file_stays or listed:
            self._deleted[model.id] = _Deleted(model.id, model.source, model.digest, model.files, not file_stays)
        while len(self._deleted) > MAX_ENTRIES:
            del self._deleted[next(iter(self._deleted))]
        self._save()

    def hides(self, model: Model) -> bool:
        """Return whether to hide a model. Forgets the deletion once its file is a new one."""
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
    """Parse the note of an earlier run; {} if it is not in this version's format."""
    try:
        found = [_Deleted(**{**entry, "files": tuple(entry["files"])}) for entry in json.loads(note or "[]")]
    except (ValueError, TypeError, KeyError):
        return {}
    return {deleted.id: deleted for deleted in found}
