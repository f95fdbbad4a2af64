"""Parses what Ollama says during a pull: lines of `/api/pull`, frames of `ollama pull`, error messages.

Pure. Formats of Ollama 0.24.0.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.downloads.fetcher import DownloadError, Phase

DIGEST_DIGITS = 12
"""The command prints this many hex digits of a layer's digest, so all events use these."""
MAX_ROW = 16_384
"""Characters; longer rows are ignored."""
MAX_DETAIL = 400
"""Limit of Ollama's own message quoted to people, in characters."""

_PHASES: dict[str, Phase] = {
    "pulling manifest": "resolving",
    "verifying sha256 digest": "verifying",
    "writing manifest": "writing",
    "removing": "writing",  # "removing unused layers", before 0.2 "removing any unused layers"
}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = r"([0-9]{1,6}(?:\.[0-9])?) (B|KB|MB|GB|TB)"
_BAR_ROW = re.compile(
    rf"pulling ([0-9a-f]{{{DIGEST_DIGITS}}})(?::|\.\.\.) +([0-9]{{1,3}})% "
    rf"▕[█ ]*▏ *{_SIZE}(?:/ *{_SIZE})?(?: +{_SIZE}/s)?(?: +[^ ]+)?"
)
_ROW_END = re.compile(r"\x1b\[[0-9;?]{0,16}[@-~]|[\r\n]")
_LONGEST_ROW_END = 19
_SPINNER = " ⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ERROR = "Error: "


@dataclass(frozen=True, slots=True)
class PullLayer:
    """Progress of a layer in exact bytes. `digest` is the first 12 hex digits."""

    digest: str
    completed: int
    total: int


@dataclass(frozen=True, slots=True)
class Rounded:
    """A printed number of bytes, and its bounds: at least `low`, less than `high`.

    Ollama truncates figures from 10 on (`28 MB`) and rounds smaller ones to tenths (`2.6 MB`).
    """

    shown: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class DrawnLayer:
    """Progress of a layer as printed by the command, all figures rounded.

    `completed` is None in the row of a finished layer, which has its size only. `bytes_per_second` is None while the
    command prints none: in the first second, and when stalled.
    """

    digest: str
    percent: int
    completed: Rounded | None
    total: Rounded
    bytes_per_second: int | None


@dataclass(frozen=True, slots=True)
class PullStatus:
    """The current phase."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class PullFailed:
    """Ollama gave up; its own message."""

    text: str


@dataclass(frozen=True, slots=True)
class PullSucceeded:
    """The model is complete. Only this says so: neither exit code 0 nor the end of the stream does."""


PullEvent = PullLayer | DrawnLayer | PullStatus | PullFailed | PullSucceeded


def parse_line(json_line: bytes | str) -> PullEvent | None:
    """Parse a line of `/api/pull`; None if it has nothing of interest."""
    try:
        said = json.loads(json_line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    if said.get("error"):
        return PullFailed(str(said["error"]))
    digest, total, completed = said.get("digest"), said.get("total"), said.get("completed", 0)  # left out when 0
    if isinstance(digest, str) and isinstance(total, int) and isinstance(completed, int):
        return PullLayer(short_digest(digest), completed, total)
    return _parse_status(str(said.get("status", "")))


def short_digest(digest: str) -> str:
    """Return a layer's key in events: `sha256:2a8270a5fd3e4003…` gives `2a8270a5fd3e`."""
    return digest.removeprefix("sha256:")[:DIGEST_DIGITS]


class FrameParser:
    """Incremental parser of what `ollama pull` draws on stderr, fed with pieces split anywhere.

    A frame redraws every row, without a line end after the last; control sequences and line ends both end a row. An
    error message comes last and may have several lines, so it is complete only at `close`.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self._overlong = False
        self._error: str | None = None

    def feed(self, data: bytes) -> list[PullEvent]:
        """Return the events of every row that these bytes complete."""
        return [event for row in self._rows(self._decoder.decode(data)) for event in self._parse(row)]

    def close(self) -> list[PullEvent]:
        """Return the events of what remains at the end."""
        events = self.feed(b"\n")
        if self._error is not None:
            events.append(PullFailed(self._error.strip()))
            self._error = None
        return events

    def _rows(self, text: str) -> Iterator[str]:
        self._pending += text
        start = 0
        for end in _ROW_END.finditer(self._pending):
            row = self._pending[start : end.start()]
            if not self._overlong and len(row) <= MAX_ROW:
                yield row
            self._overlong = False
            start = end.end()
        self._pending = self._pending[start:]
        if len(self._pending) > MAX_ROW + _LONGEST_ROW_END:
            self._overlong = True
            self._pending = self._pending[-_LONGEST_ROW_END:]  # may contain the beginning of the row's end

    def _parse(self, row: str) -> Iterator[PullEvent]:
        if self._error is not None:
            self._error = f"{self._error}\n{row.strip()}"[:MAX_ROW]
        elif row.startswith(_ERROR):
            self._error = row.removeprefix(_ERROR)
        elif event := _parse_bar(row) or _parse_status(row):
            yield event


def explain(error_text: str, name: str) -> DownloadError:
    """Convert Ollama's error message about the pull of `name` to a DownloadError."""
    text = error_text.strip()
    for marks, make_error in _EXPLANATIONS:
        if marks.search(text):
            return make_error(name, _quotable(text))
    return DownloadError(
        "download_failed",
        f"Ollama could not download {name}. It said: {_quotable(text) or 'nothing'}. Resume to try again.",
        may_resume=True,
    )


_MakeError = Callable[[str, str], DownloadError]


def _error(code: str, words: str, may_resume: bool = False) -> _MakeError:
    """Return a factory of DownloadErrors.

    `words` may contain {name} and {text}, Ollama's message without a full stop.
    """
    return lambda name, text: DownloadError(code, words.format(name=name, text=text), may_resume=may_resume)


def _marks(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_EXPLANATIONS: tuple[tuple[re.Pattern[str], _MakeError], ...] = (
    (
        _marks("could not connect to ollama|ollama server not responding|connect to ollama app"),
        _error(
            "ollama_unreachable",
            "Ollama does not answer, so {name} can't be downloaded. Start it with `ollama serve`, then resume.",
            may_resume=True,
        ),
    ),
    (
        _marks("newer version of ollama"),
        _error(
            "needs_newer_ollama",
            "{name} requires a newer version of Ollama than the one that runs here. Update Ollama from"
            " https://ollama.com/download, then try again.",
        ),
    ),
    (
        _marks("no space left on device|not enough space|disk quota exceeded"),
        _error(
            "disk_full",
            "The disk that Ollama keeps its models on is full, so {name} is incomplete. Remove models or other files,"
            " then resume: what has arrived is kept.",
            may_resume=True,
        ),
    ),
    (
        _marks("digest mismatch"),
        _error(
            "digest_mismatch",
            "A layer of {name} arrived damaged: its checksum is not the registry's. Ollama has thrown that layer away;"
            " resume to download it again.",
            may_resume=True,
        ),
    ),
    (
        _marks("invalid model name|invalid model path|name is invalid"),
        _error(
            "invalid_name", "Ollama does not accept the name {name}. Write model:tag, such as llama3.2 or llama3.2:1b."
        ),
    ),
    (
        _marks(r"unauthorized|access denied|forbidden|(?:^|[\s:])40[13](?:[\s:]|$)"),
        _error(
            "access_denied",
            "The registry does not give {name} to this Ollama: it is private, needs an agreement, or does not exist"
            " ({text}). Check the name and your access to it.",
        ),
    ),
    (
        _marks(
            r"pull model manifest: file does not exist|manifest unknown|repository not found"
            r"|(?:^|[\s:])404(?:[\s:]|$)|not a valid quantization scheme"
        ),
        _error(
            "unknown_model",
            "There is no model {name}: its registry doesn't know the name or the tag. Check the spelling, for example"
            " at https://ollama.com/library.",
        ),
    ),
    (
        _marks(r"\btls\b.*handshake|HTTP response to HTTPS client"),
        _error(
            "registry_unreachable",
            "The registry of {name} does not speak TLS ({text}). If it is yours and you trust the way to it, set"
            " ollama_insecure_registry, then try again.",
            may_resume=True,
        ),
    ),
    (
        _marks(
            r"connection refused|no such host|max retries exceeded|dial tcp|dial udp|timeout|timed out|\btls: |x509:"
            r"|deadline exceeded|connection reset|network is unreachable|no route to host|unexpected EOF"
        ),
        _error(
            "registry_unreachable",
            "Ollama can't reach the registry of {name} ({text}). Check the network, then resume: what has arrived is"
            " kept.",
            may_resume=True,
        ),
    ),
)


def _parse_bar(row: str) -> PullEvent | None:
    found = _BAR_ROW.fullmatch(row.rstrip())
    if found is None:
        return None
    digest, percent, first, first_unit, second, second_unit, speed, speed_unit = found.groups()
    done = second is None
    return DrawnLayer(
        digest,
        min(int(percent), 100),
        None if done else _rounded(first, first_unit),
        _rounded(first, first_unit) if done else _rounded(second, second_unit),
        _rounded(speed, speed_unit).shown if speed else None,
    )


def _rounded(figure: str, unit: str) -> Rounded:
    whole, _, tenth = figure.partition(".")
    size = _UNITS[unit]
    shown = int(whole) * size + int(tenth or 0) * size // 10
    return Rounded(shown, shown - size // 20, shown + size // 20) if tenth else Rounded(shown, shown, shown + size)


def _parse_status(text: str) -> PullEvent | None:
    words = text.strip(_SPINNER)
    if words == "success":
        return PullSucceeded()
    for beginning, phase in _PHASES.items():
        if words.startswith(beginning):
            return PullStatus(phase)
    return None


def _quotable(text: str) -> str:
    """Return the text as one line of limited length, without the signatures in registry URLs."""
    unsigned = re.sub(r'(https?://[^\s"?]+)\?[^\s"]*', r"\1", text)
    line = " ".join(unsigned.split()).rstrip(".")
    return line if len(line) <= MAX_DETAIL else f"{line[: MAX_DETAIL - 1]}…"
