"""The catalogue: models listed in the settings, and models discovered by their engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from services.config import ModelEntry
from services.deleted_models import DeletedModels
from services.engines.port import Engine, Model
from services.sizes import GB


class UnknownModel(Exception):
    """No model has this id. The text names the available ones."""

    def __init__(self, model_id: str, available: Sequence[str]) -> None:
        shown = ", ".join(available) if available else "none yet"
        super().__init__(f"There is no model {model_id[:200]!r}. Available: {shown}.")
        self.model_id = model_id


class Catalog:
    """All models, as an immutable mapping that is replaced when a scan of the engines finds a difference.

    Thread-safe.
    """

    def __init__(
        self, entries: Sequence[ModelEntry], engines: Mapping[str, Engine], deleted: DeletedModels | None = None
    ) -> None:
        self._listed = tuple(_model_of(entry) for entry in entries)
        self._deleted = deleted or DeletedModels()
        self._engines = engines
        self._models: Mapping[str, Model] = MappingProxyType({})
        self._aliases: Mapping[str, str] = MappingProxyType({})
        self._listeners: list[Callable[[], object]] = []
        self._in_use: Callable[[], Iterable[Model]] = tuple
        self._refreshing = threading.Lock()  # a slow scan must not overwrite the result of a later one
        self.refresh()

    @property
    def models(self) -> Mapping[str, Model]:
        return self._models

    def id_of(self, name: str) -> str:
        """Resolve an id or alias to an id; an unknown name is returned unchanged."""
        return name if name in self._models else self._aliases.get(name, name)

    def get(self, model_id: str) -> Model:
        """Return the model with this id or alias. Raises UnknownModel."""
        try:
            return self._models[self.id_of(model_id)]
        except (KeyError, TypeError):
            raise UnknownModel(str(model_id), sorted(self._models)) from None

    def names_of(self, model_id: str) -> list[str]:
        """Return the ids of all models with the same weights in memory (`Model.held_as`), this one included."""
        model = self._models.get(model_id)
        if model is None or model.held_as is None:
            return [model_id]
        same = (model.engine, model.held_as)
        return [m.id for m in self._models.values() if (m.engine, m.held_as) == same]

    def is_listed(self, model: Model) -> bool:
        """Whether the settings list this model, so that it would appear without its file too."""
        return any(entry.id == model.id for entry in self._listed)

    def sharers_of(self, model: Model) -> list[Model]:
        """Return the other models that use a file of this one."""
        return [other for other in self._models.values() if other.id != model.id and _uses_files_of(other, model)]

    def forget(self, model: Model) -> None:
        """Hide a deleted model, even if the settings list it, or its file stays because others use it."""
        self._deleted.add(model, file_stays=bool(self.sharers_of(model)), listed=self.is_listed(model))
        self.refresh()

    def keep_listed(self, in_use: Callable[[], Iterable[Model]]) -> None:
        """Set the source of loaded models.

        They stay listed when their files are gone, so that people can unload them.
        """
        self._in_use = in_use

    def on_change(self, listener: Callable[[], object]) -> None:
        self._listeners.append(listener)

    def refresh(self) -> bool:
        """Scan the engines; return whether a model was added, removed or changed."""
        with self._refreshing:
            changed = self._scan()
        if changed:
            for listener in self._listeners:
                listener()
        return changed

    def _scan(self) -> bool:
        discovered = [found for engine in self._engines.values() for found in engine.discover()]
        models = {m.id: m for m in (self._engines[m.engine].describe(m) for m in self._listed)}
        taken = {(m.engine, m.source) for m in models.values()}
        for found in discovered:
            if (found.engine, found.source) not in taken:
                free = found if found.id not in models else replace(found, id=f"{found.engine}/{found.id}")
                models.setdefault(free.id, free)
        models = {m.id: m for m in models.values() if not self._deleted.hides(m)}
        for loaded in self._in_use():
            if loaded.id not in models:
                gone = "Its files are gone. It works as long as it stays loaded."
                models[loaded.id] = replace(loaded, fault=gone)
        if models == self._models:
            return False
        self._aliases = MappingProxyType({alias: m.id for m in reversed(models.values()) for alias in m.aliases})
        self._models = MappingProxyType(models)
        return True


def _uses_files_of(other: Model, model: Model) -> bool:
    if other.engine != model.engine:
        return False
    if model.files:
        return not {*other.files, *other.companions}.isdisjoint(model.files)
    return model.digest is not None and other.digest == model.digest


def _model_of(entry: ModelEntry) -> Model:
    model = Model(
        id=entry.id,
        engine=entry.engine,
        source=entry.source,
        kind=entry.kind,
        description=entry.description,
        load_seconds=entry.load_time_seconds,
        tags=entry.tags,
        options=MappingProxyType(dict(entry.options)),
    )
    if entry.size_gb is not None:
        model = replace(model, size_bytes=int(entry.size_gb * GB))
    if entry.required_gb is not None:
        model = replace(model, required_bytes=int(entry.required_gb * GB))
    return model
