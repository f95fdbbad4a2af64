"""Parsing Ollama's output during a pull: recordings of 0.24.0 (`tests/transcripts/ollama/pull-*`), and garbage.

`pull-*.bin` is stderr of `ollama pull`, byte for byte (of `registry-dies` some frames were left out);
`pull-stream*.ndjson` are the lines of `/api/pull`.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.downloads.fetcher import FileProgress
from services.downloads.ollama.output import (
    MAX_ROW,
    DrawnLayer,
    FrameParser,
    PullEvent,
    PullFailed,
    PullLayer,
    PullStatus,
    PullSucceeded,
    Rounded,
    explain,
    parse_line,
)
from services.downloads.ollama.rounding import Unrounding

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts" / "ollama"
WHOLE = ["piped-fast", "piped-slow", "resume"]
BROKEN_OFF = ["sigint", "sigkill", "server-ended"]
FAILED = {
    "bad-name": "invalid_name",
    "no-server": "ollama_unreachable",
    "registry-dies": "registry_unreachable",
    "registry-down": "registry_unreachable",
    "unknown-name": "unknown_model",
}
STREAM_FAILED = {"stream-unknown-name": "unknown_model", "stream-no-tls": "registry_unreachable"}


def recorded(name: str) -> bytes:
    return (TRANSCRIPTS / f"pull-{name}.bin").read_bytes()


def drawn(data: bytes, *cuts: int) -> list[PullEvent]:
    """The events of these bytes, fed to the parser in pieces split at these offsets."""
    parser = FrameParser()
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    events = [event for start, end in pairwise(places) for event in parser.feed(data[start:end])]
    return events + parser.close()


def lines(name: str) -> list[PullEvent]:
    events = [parse_line(line) for line in (TRANSCRIPTS / f"pull-{name}.ndjson").read_bytes().splitlines()]
    assert None not in events
    return [event for event in events if event is not None]


@pytest.mark.parametrize("name", WHOLE)
def test_a_complete_pull_is_parsed_up_to_success(name):
    """Phases in order, success once at the end, and every layer complete by then."""
    events = drawn(recorded(name))
    assert events[0] == PullStatus("resolving")
    assert events[-1] == PullSucceeded()
    assert events.count(PullSucceeded()) == 1
    assert {event.phase for event in events if isinstance(event, PullStatus)} == {"resolving", "verifying", "writing"}
    last = {event.digest: event for event in events if isinstance(event, DrawnLayer)}
    assert all((layer.percent, layer.completed) == (100, None) for layer in last.values())
    assert len(last) == (2 if name == "resume" else 4)


@pytest.mark.parametrize("name", [*WHOLE, *BROKEN_OFF, *FAILED])
def test_no_layer_decreases(name):
    """The bytes of each layer never decrease, in every recording."""
    seen = defaultdict(list)
    for event in drawn(recorded(name)):
        if isinstance(event, DrawnLayer):
            seen[event.digest].append(event.total.shown if event.completed is None else event.completed.shown)
    assert all(before <= after for figures in seen.values() for before, after in pairwise(figures))


@pytest.mark.parametrize("name", BROKEN_OFF)
def test_an_interrupted_pull_ends_without_success_or_error(name):
    """Interrupted, killed, or its server ended (the command then exits with 0): the last row is a layer's."""
    events = drawn(recorded(name))
    assert isinstance(events[-1], DrawnLayer)
    assert not any(isinstance(event, PullSucceeded | PullFailed) for event in events)


@pytest.mark.parametrize(("name", "code"), FAILED.items())
def test_a_failed_pull_ends_with_its_error(name, code):
    """Its text leads to the right error code."""
    *before, last = drawn(recorded(name))
    assert isinstance(last, PullFailed)
    assert not any(isinstance(event, PullSucceeded | PullFailed) for event in before)
    assert explain(last.text, "tiny-b").code == code


@settings(deadline=None)
@given(st.data())
def test_the_split_of_the_bytes_changes_nothing(data):
    """In the middle of a character, a control sequence or a word: the events are the same."""
    recording = recorded(data.draw(st.sampled_from([*WHOLE, *BROKEN_OFF, *FAILED])))
    cuts = data.draw(st.lists(st.integers(0, len(recording)), max_size=30))
    assert drawn(recording, *cuts) == drawn(recording)


@pytest.mark.parametrize("name", ["piped-fast", "unknown-name"])
def test_byte_by_byte_gives_the_same(name):
    """The smallest possible pieces."""
    recording = recorded(name)
    assert drawn(recording, *range(len(recording))) == drawn(recording)


_CONTROLS = ["\x1b", "\x1b[", "\x1b[K", "\x1b[?2026h", "\x1b[" + "1" * 20, "\n", "\r"]
_WORDS = ["pulling manifest ⠋", "pulling 2a8270a5fd3e:", " 62% ", "▕█ ▏", "28 MB", "/ 46 MB", "success ", "Error: x"]
pieces = st.sampled_from([*_CONTROLS, *_WORDS, "x" * MAX_ROW, "?" * 100_000])


@settings(deadline=None)
@given(st.lists(pieces.map(str.encode) | st.binary(max_size=20), max_size=20), st.lists(st.integers(0, 300_000)))
def test_garbage_neither_raises_nor_depends_on_its_split(garbage, cuts):
    """Incomplete sequences, incomplete characters, endless rows."""
    data = b"".join(garbage)
    assert drawn(data, *cuts) == drawn(data)


@pytest.mark.parametrize("noise", [b"x", b"\x1b", b"\x1b[1", "▕".encode(), b"\xff", b"Error: x", b"\n"])
def test_a_million_bytes_of_garbage_are_dropped(noise):
    """What follows is parsed; of an error text only a limited length is kept."""
    parser = FrameParser()
    piece = noise * (10_000 // len(noise))
    for _ in range(100):
        assert parser.feed(piece) == []
    events = parser.feed(b"\nsuccess \x1b[K") + parser.close()
    assert events == [PullSucceeded()]


def test_an_error_of_several_lines_is_kept_together():
    """For example for a model that needs a newer Ollama."""
    said = (
        b"\x1b[?25h\x1b[?2026l\nError: pull model manifest: 412: \n\nThe model you are attempting to pull requires a"
        b" newer version of Ollama.\n\nPlease download the latest version at:\n\n\thttps://ollama.com/download\n\n"
    )
    (failed,) = drawn(said)
    assert isinstance(failed, PullFailed)
    assert failed.text.startswith("pull model manifest: 412:")
    assert failed.text.endswith("https://ollama.com/download")
    assert explain(failed.text, "x").code == "needs_newer_ollama"


def test_an_endless_error_is_truncated():
    """Its beginning says what happened."""
    (failed,) = drawn(b"Error: beginning\n" + b"and so on\n" * 100_000)
    assert isinstance(failed, PullFailed)
    assert failed.text.startswith("beginning")
    assert len(failed.text) <= MAX_ROW


MB, GB = 10**6, 10**9


@pytest.mark.parametrize(
    ("row", "layer"),
    [
        (
            "pulling 2a8270a5fd3e:  62% ▕███████████       ▏  28 MB/ 46 MB   14 MB/s      1s",
            DrawnLayer(
                "2a8270a5fd3e", 62, Rounded(28 * MB, 28 * MB, 29 * MB), Rounded(46 * MB, 46 * MB, 47 * MB), 14 * MB
            ),
        ),
        (
            "pulling 2a8270a5fd3e:   2% ▕                  ▏ 1.0 MB/ 46 MB                  ",
            DrawnLayer("2a8270a5fd3e", 2, Rounded(MB, 950_000, 1_050_000), Rounded(46 * MB, 46 * MB, 47 * MB), None),
        ),
        (
            "pulling 2a8270a5fd3e: 100% ▕██████████████████▏  46 MB                         ",
            DrawnLayer("2a8270a5fd3e", 100, None, Rounded(46 * MB, 46 * MB, 47 * MB), None),
        ),
        (
            "pulling f02dd72bb242: 100% ▕██████████████████▏   59 B                         ",
            DrawnLayer("f02dd72bb242", 100, None, Rounded(59, 59, 60), None),
        ),
        (
            "pulling 2a8270a5fd3e:   0% ▕                  ▏    0 B/4.1 GB  900 KB/s  1h15m",
            DrawnLayer("2a8270a5fd3e", 0, Rounded(0, 0, 1), Rounded(4_100 * MB, 4_050 * MB, 4_150 * MB), 900_000),
        ),
        (
            "pulling 2a8270a5fd3e... 10% ▕█    ▏ 1.0 TB/9.9 TB",
            DrawnLayer(
                "2a8270a5fd3e",
                10,
                Rounded(1000 * GB, 950 * GB, 1050 * GB),
                Rounded(9900 * GB, 9850 * GB, 9950 * GB),
                None,
            ),
        ),
    ],
)
def test_a_layers_row_is_parsed_with_its_rounding_range(row, layer):
    """Units are decimal; figures from 10 on are truncated, smaller ones rounded to a tenth."""
    assert drawn(f"{row}\x1b[K".encode()) == [layer]


@pytest.mark.parametrize(
    "row",
    [
        "",
        "pulling",
        "pulling nothing: 5% ▕█▏ 1 MB",
        "pulling 2a8270a5fd3e:",
        "pulling 2a8270a5fd3e:  62% ▕███",
        "pulling 2a8270a5fd3e:  62% ▕███ ▏ 28 MiB/ 46 MiB",
        "something new in a later Ollama",
    ],
)
def test_unknown_rows_are_ignored(row):
    """Later versions of Ollama may draw other rows."""
    assert drawn(row.encode() + b"\n") == []


@pytest.mark.parametrize("spinner", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
def test_a_spinner_is_not_part_of_the_status(spinner):
    """The row is drawn again with the next glyph each time."""
    assert drawn(f"verifying sha256 digest {spinner} \x1b[K".encode()) == [PullStatus("verifying")]


def test_a_complete_stream_is_parsed_up_to_success():
    """Exact bytes, layers with the same short digests as the command's."""
    events = lines("stream")
    assert events[0] == PullStatus("resolving")
    assert events[-3:] == [PullStatus("verifying"), PullStatus("writing"), PullSucceeded()]
    last = {event.digest: event for event in events if isinstance(event, PullLayer)}
    assert last["2a8270a5fd3e"] == PullLayer("2a8270a5fd3e", 46_236_384, 46_236_384)
    assert sum(layer.total for layer in last.values()) == 46_236_961
    assert list(last) == ["2a8270a5fd3e", "e3b2721cec51", "f02dd72bb242", "2b3ec63a04e7"]


@pytest.mark.parametrize("name", ["stream", "stream-resume", "stream-server-killed", "stream-uptodate"])
def test_no_layer_of_a_stream_decreases(name):
    """Nor exceeds its size."""
    seen = defaultdict(list)
    for event in lines(name):
        if isinstance(event, PullLayer):
            seen[event.digest].append(event.completed)
            assert event.completed <= event.total
    assert all(before <= after for figures in seen.values() for before, after in pairwise(figures))


def test_a_resumed_stream_continues_where_it_was():
    """The first figure is what an earlier attempt has completed."""
    first = next(event for event in lines("stream-resume") if isinstance(event, PullLayer))
    assert first.completed == 143_593_088


def test_the_stream_of_a_killed_server_ends_without_a_result():
    """Without an error and without success."""
    assert not any(isinstance(event, PullSucceeded | PullFailed) for event in lines("stream-server-killed"))


@pytest.mark.parametrize(("name", "code"), STREAM_FAILED.items())
def test_an_error_in_a_stream_is_its_last_line(name, code):
    """For a response that began with status 200."""
    last = lines(name)[-1]
    assert isinstance(last, PullFailed)
    assert explain(last.text, "tiny-b").code == code


def test_a_layer_without_a_completed_figure_has_0():
    """Ollama omits a figure that is 0."""
    line = '{"status":"pulling 2a8270a5fd3e","digest":"sha256:2a8270a5fd3e4003","total":46236384}'
    assert parse_line(line) == PullLayer("2a8270a5fd3e", 0, 46_236_384)


@settings(deadline=None)
@given(st.binary() | st.text() | st.sampled_from(["null", "[]", "7", '{"status": 7}', "[" * 100_000, '{"total": "x"}']))
def test_an_invalid_line_is_ignored(line):
    """Garbage in a stream neither raises nor gives an event."""
    assert parse_line(line) is None


@pytest.mark.parametrize(
    ("text", "code", "may_resume"),
    [
        ("pull model manifest: file does not exist", "unknown_model", False),
        ('pull model manifest: 404: {"error":"Repository not found"}', "unknown_model", False),
        ("400 Bad Request: invalid model name", "invalid_name", False),
        ("could not connect to ollama server, run 'ollama serve' to start it", "ollama_unreachable", True),
        ('pull model manifest: Get "https://r/v2/": dial tcp: lookup r: no such host', "registry_unreachable", True),
        ('max retries exceeded: Get "http://r/e7": dial tcp 127.0.0.2:5006: connect', "registry_unreachable", True),
        ("Get https://r: net/http: TLS handshake timeout", "registry_unreachable", True),
        ("read tcp 10.0.0.2:401->10.0.0.3:443: i/o timeout", "registry_unreachable", True),
        ("tls: failed to verify certificate: x509: unknown authority", "registry_unreachable", True),
        ("write /models/blobs/sha256-e7-partial: no space left on device", "disk_full", True),
        ("digest mismatch, file must be downloaded again: want sha256:2a, got sha256:1c", "digest_mismatch", True),
        ('pull model manifest: 401: {"error":"Invalid username or password."}', "access_denied", False),
        ("pull model manifest: 403 Forbidden", "access_denied", False),
        ("unauthorized: authentication required", "access_denied", False),
        ("pull model manifest: 412: requires a newer version of Ollama.", "needs_newer_ollama", False),
        ("something nobody has seen before", "download_failed", True),
        ("", "download_failed", True),
    ],
)
def test_an_error_text_becomes_a_code_and_a_message(text, code, may_resume):
    """The message names the model, and what to do."""
    error = explain(text, "llama3.2")
    assert (error.code, error.may_resume) == (code, may_resume)
    assert "llama3.2" in error.message
    assert error.message.endswith(".")
    assert "{" not in error.message.replace(text, "")


def test_an_unknown_error_is_shown_without_signed_urls():
    """Storage URLs carry keys in their query; long texts are truncated."""
    text = 'Get "https://store.example/blob?X-Signature=secret&x=1": odd {thing} ' + "x" * 5000
    message = explain(text, "llama3.2").message
    assert '"https://store.example/blob": odd {thing}' in message
    assert "secret" not in message
    assert len(message) < 600


class TestUnrounding:
    """Estimating the bytes behind rounded figures."""

    def row(self, percent: int, low: int, high: int, speed: int | None = 20 * MB) -> DrawnLayer:
        return DrawnLayer("2a8270a5fd3e", percent, Rounded(low, low, high), Rounded(4 * GB, 4 * GB, 5 * GB), speed)

    def test_the_registrys_size_replaces_the_rounded_one(self):
        """A finished layer has all of it; a size that contradicts the row is ignored."""
        done = DrawnLayer("2a8270a5fd3e", 100, None, Rounded(46 * MB, 46 * MB, 47 * MB), None)
        assert Unrounding({"2a8270a5fd3e": 46_236_384}).part(done, 0.0) == FileProgress(46_236_384, 46_236_384)
        assert Unrounding({"2a8270a5fd3e": 7}).part(done, 0.0) == FileProgress(46 * MB, 46 * MB)

    def test_between_two_steps_the_speed_advances_the_estimate(self):
        """1 GB stands for 0.95 to 1.05, and 25 % of 4 GB for 0.98 to 1.02: the estimate moves within that range."""
        unrounding = Unrounding({"2a8270a5fd3e": 4 * GB})
        row = self.row(25, 950 * MB, 1050 * MB)
        assert unrounding.part(row, 0.0).completed == 980 * MB
        assert unrounding.part(row, 1.0).completed == 1000 * MB
        assert unrounding.part(row, 9.0).completed == 1020 * MB

    def test_a_layer_without_a_speed_does_not_advance(self):
        """Without a speed the estimate doesn't move."""
        unrounding = Unrounding({})
        row = self.row(25, 950 * MB, 1050 * MB, None)
        assert unrounding.part(row, 0.0) == unrounding.part(row, 5.0) == FileProgress(980 * MB, 4 * GB)

    @settings(deadline=None)
    @given(st.integers(1, 10**12), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 10)), max_size=20))
    def test_the_estimate_stays_within_the_rows_range(self, total, looks):
        """Whatever the speed, the estimate stays within the rounding and below the total."""
        unrounding, now = Unrounding({"2a8270a5fd3e": total}), 0.0
        for fraction, step in sorted(looks):
            now += step
            true = int(fraction * total)
            row = DrawnLayer(
                "2a8270a5fd3e",
                round(true / total * 100),
                Rounded(true, int(true * 0.95), int(true * 1.05) + 1),
                Rounded(total, total, total + 1),
                10**9,
            )
            part = unrounding.part(row, now)
            assert 0 <= part.completed <= part.total == total
            assert abs(part.completed - true) <= min(0.05 * true, 0.01 * total) + 2
