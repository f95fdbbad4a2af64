"""Installed and recommended models: their updates, and their deletion."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.catalog import Catalog
from services.config import Recommendation
from services.downloads.fetcher import DownloadError, Source
from services.downloads.huggingface import names as hub_names
from services.downloads.ollama.updates import UpdateCheck
from services.engines.ollama.names import full_name, other_names
from services.engines.port import Model
from services.sizes import GB
from services.switching.jobs import SwitchError
from services.switching.switcher import Switcher


@dataclass(frozen=True, slots=True)
class Recommended:
    """A recommended model. `installed` is its id in the catalogue, None if it is not installed.

    `model` is the name in the settings, `name` the source's, under which its download is listed; `aliases` are other
    names that people use for it.
    """

    model: str
    name: str
    aliases: tuple[str, ...]
    source: Source
    description: str
    size_bytes: int | None
    recommended: bool
    installed: str | None


@dataclass(frozen=True, slots=True)
class Deletion:
    """The effect of deleting a model.

    `frees_bytes` is None if its size is unknown. Its files stay while other models (`shared_with`) use them. `files`
    are their names, if the engine reports them. `listed`: the settings list it, so that it reappears with its file.
    """

    frees_bytes: int | None
    shared_with: tuple[str, ...]
    files: tuple[str, ...]
    listed: bool


@dataclass(frozen=True, slots=True)
class Removed:
    """A deleted model, and the effect."""

    model: str
    deletion: Deletion


class Library:
    """Reads the catalogue; deletes through the switcher, so that nothing loads a model meanwhile."""

    def __init__(
        self,
        catalog: Catalog,
        switcher: Switcher,
        updates: UpdateCheck,
        recommended: tuple[Recommendation, ...],
        longest_seconds: float,
    ) -> None:
        self._catalog = catalog
        self._switcher = switcher
        self._updates = updates
        self._recommended = recommended
        self._longest_seconds = longest_seconds

    @property
    def outdated(self) -> frozenset[str]:
        """Ids of models with a newer version in their registry, as far as known."""
        names = self._updates.available
        return frozenset(m.id for m in self._catalog.models.values() if m.engine == "ollama" and m.source in names)

    def check_updates(self) -> frozenset[str]:
        """Ask the registries now; takes up to some seconds per model. Return the ids of models with a newer version."""
        self._updates.check()
        return self.outdated

    def recommendations(self) -> list[Recommended]:
        """Return the recommended models, each with whether it is installed."""
        return [
            Recommended(
                model=r.model,
                name=_name_of(r),
                aliases=other_names(_name_of(r)),
                source=r.source,
                description=r.description,
                size_bytes=None if r.size_gb is None else int(r.size_gb * GB),
                recommended=r.recommended,
                installed=self._find(r),
            )
            for r in self._recommended
        ]

    def deletion(self, model: Model) -> Deletion:
        """Return what deleting a model would do."""
        sharers = tuple(sharer.id for sharer in self._catalog.sharers_of(model))
        return Deletion(
            frees_bytes=0 if sharers else model.size_bytes,
            shared_with=sharers,
            files=tuple(Path(file).name for file in model.files),
            listed=bool(model.files) and self._catalog.is_listed(model),
        )

    def remove(self, model_id: str, requested_by: str) -> Removed:
        """Unload a model and delete its files, except those that other models use.

        Raises UnknownModel and SwitchError.
        """
        model = self._catalog.get(model_id)
        deletion = self.deletion(model)
        job = self._switcher.remove(model.id, requested_by=requested_by)
        if not job.wait_done(self._longest_seconds):
            raise SwitchError("engine_timeout", f"{model.id} was not deleted in time; it may still happen.")
        if job.error is not None:
            raise job.error
        return Removed(model.id, deletion)

    def _find(self, wanted: Recommendation) -> str | None:
        """Return the id of a recommended model if it is installed."""
        name = _name_of(wanted)
        names = (name, *map(full_name, other_names(name)))
        models = self._catalog.models.values()
        return next((m.id for name in names for m in models if _is(m, wanted.source, name)), None)


def refresh_and_find(catalog: Catalog, source: Source, name: str) -> bool:
    """Refresh the catalogue; return whether the model called `name` at `source` can be loaded."""
    catalog.refresh()
    return any(_is(model, source, name) and model.fault is None for model in catalog.models.values())


def _name_of(wanted: Recommendation) -> str:
    """Return a name as its source writes it; an invalid one is returned unchanged, and its download reports that."""
    if wanted.source == "ollama":
        return full_name(wanted.model)
    with suppress(DownloadError):
        return str(hub_names.parse(wanted.model))
    return wanted.model


def _is(model: Model, source: Source, name: str) -> bool:
    """Return whether a catalogue model is the one called `name` at `source`."""
    if source == "ollama":
        return (model.engine, model.source) == ("ollama", name)
    with suppress(DownloadError):
        wanted = hub_names.parse(name)
        _, below, path = model.source.partition(f"/{wanted.repo_id}/")  # the folder of a download from Hugging Face
        return model.engine == "llamacpp" and bool(below) and wanted.covers(path)
    return False
