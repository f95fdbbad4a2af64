"""Names of models on Hugging Face, and which files of a repository a name stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.downloads.fetcher import DownloadError

MAX_NAME_LENGTH = 300
DEFAULT_TAG = "Q4_K_M"
"""The most common quantisation, chosen if a name has no tag and the repository has it."""
MAX_LISTED = 30

_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"  # Hugging Face's rule for owners and repositories
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._+=-]*"
_NAME = re.compile(
    rf"(?P<owner>{_WORD})/(?P<repo>{_WORD})"
    rf"(?::(?P<tag>[A-Za-z0-9][A-Za-z0-9._-]{{0,63}})|/(?P<path>(?:{_SEGMENT}/)*{_SEGMENT}\.gguf))?"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}))?"
)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class HubName:
    """`owner/repo`, `owner/repo:TAG` or `owner/repo/path/file.gguf`, each with an optional `@revision`."""

    owner: str
    repo: str
    tag: str | None = None
    path: str | None = None
    revision: str | None = None

    @property
    def repo_id(self) -> str:
        return f"{self.owner}/{self.repo}"

    def __str__(self) -> str:
        which = f":{self.tag}" if self.tag else f"/{self.path}" if self.path else ""
        return f"{self.repo_id}{which}" + (f"@{self.revision}" if self.revision else "")

    def covers(self, path: str) -> bool:
        """Return whether this name can stand for the file `path` of its repository."""
        if self.path is not None:
            return _first_part(path) == _first_part(self.path)
        return self.tag is None or self.tag.lower() in path.lower()


def parse(text: str) -> HubName:
    """Parse a name. Raises DownloadError `invalid_name`."""
    text = text.strip()
    match = _NAME.fullmatch(text) if len(text) <= MAX_NAME_LENGTH and ".." not in text else None
    if match is None or "--" in match["owner"] + "/" + match["repo"] or match["repo"].endswith(".git"):
        raise DownloadError(
            "invalid_name",
            f"{text[:100]!r} can't name a model on the Hugging Face hub. Write owner/repo, owner/repo:{DEFAULT_TAG} or "
            "owner/repo/path/file.gguf, each with @revision behind it where one is meant.",
        )
    return HubName(**match.groupdict())


def choose(name: HubName, listed: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of the files that `name` stands for, out of those that the repository lists.

    A split model (`x-00001-of-00003.gguf`) has all its parts. Projectors (`mmproj*`) are only chosen by path. Raises
    DownloadError: `unsafe_path`, `no_gguf`, `unknown_model` (no such file), `choose_file`, `incomplete_set`.
    """
    models = _models(name, listed)
    if name.path is not None:
        key = _first_part(name.path)
        if name.path not in models.get(key, ()):
            raise DownloadError(
                "unknown_model", f"{name.repo_id} has no file {name.path}. {_offer(name, _choices(models))}"
            )
    else:
        key = _pick(name, _choices(models))
    _check_whole(name, key, models[key])
    return models[key]


def _models(name: HubName, listed: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the files of every listed GGUF model in order, by the path of its first file."""
    models: dict[str, tuple[str, ...]] = {}
    for path in sorted(path for path in listed if path.endswith(".gguf")):
        if not stays_below(path):
            raise DownloadError(
                "unsafe_path",
                f"{name.repo_id} lists the file {path[:100]!r}, which would land outside of the models folder. Nothing "
                "was downloaded; don't trust this repository.",
            )
        first = _first_part(path)
        models[first] = (*models.get(first, ()), path)
    return models


def _choices(models: Iterable[str]) -> list[str]:
    return [path for path in models if not path.rpartition("/")[2].lower().startswith("mmproj")]


def _pick(name: HubName, choices: Sequence[str]) -> str:
    if not choices:
        raise DownloadError(
            "no_gguf",
            f"{name.repo_id} holds no GGUF model. Look for a repository whose name ends in GGUF, or convert it.",
        )
    hits = list(choices) if name.tag is None else _tagged(choices, name.tag)
    if len(hits) > 1 and name.tag is None:
        hits = _tagged(choices, DEFAULT_TAG)
    if len(hits) == 1:
        return hits[0]
    what = f"no file for {name.tag}" if name.tag and not hits else "more than one model"
    raise DownloadError("choose_file", f"{name.repo_id} has {what}. {_offer(name, hits or choices)}")


def _tagged(choices: Sequence[str], tag: str) -> list[str]:
    """Return the paths with `tag` in them; of several, those with it as a whole word (F16, not BF16)."""
    hits = [path for path in choices if tag.lower() in path.lower()]
    whole = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
    exact = [path for path in hits if whole.search(path)]
    return exact if exact and len(hits) > 1 else hits


def _check_whole(name: HubName, first: str, parts: Sequence[str]) -> None:
    match = _PART.fullmatch(first)
    if match is not None and len(parts) != int(match["count"]):
        raise DownloadError(
            "incomplete_set",
            f"{name.repo_id} holds {len(parts)} of the {int(match['count'])} parts of {first}. Choose another model; "
            "its owner has to upload the others.",
        )


def _first_part(path: str) -> str:
    match = _PART.fullmatch(path)
    return path if match is None else f"{match['stem']}-00001-of-{match['count']}.gguf"


def stays_below(path: str) -> bool:
    """Return whether a path listed by a repository stays below the folder it is put into."""
    return "\\" not in path and path.isprintable() and not {"", ".", ".."} & set(path.split("/"))


def _offer(name: HubName, choices: Sequence[str]) -> str:
    if not choices:
        return "It holds no GGUF model."
    listed = ", ".join(f"{name.repo_id}/{path}" for path in choices[:MAX_LISTED])
    more = f" and {len(choices) - MAX_LISTED} more" if len(choices) > MAX_LISTED else ""
    return f"Choose one of: {listed}{more}."
