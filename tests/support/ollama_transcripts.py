"""Recordings of a real Ollama 0.24.0 (`tests/transcripts/ollama`), with everything masked that varies between runs."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "transcripts" / "ollama"
_BLOCK = re.compile(rb"\n\[\+[\d.]+s \d+B\]\n")
_TITLE = re.compile(rb"^### (.*?)   \[\d\d:\d\d:\d\dZ\]\n>>> REQUEST\n", re.MULTILINE)
_MASKS = [
    (r'"2[3-9]\d\d-\d\d-\d\dT[\d:.]+Z"', '"FOR EVER"'),
    (r'"\d{4}-\d\d-\d\dT[\d:.]+Z"', '"TIME"'),
    (r'"created":\d+', '"created":N'),
    (r'"(chatcmpl|cmpl)-\d+"', r'"\1-N"'),
    (r'"(\w+_duration|prompt_eval_count|prompt_tokens|total_tokens)":\d+', r'"\1":N'),
    (r"sha256[:-][0-9a-f]{64}", "sha256:HEX"),
    (r'"[0-9a-f]{64}"', '"HEX"'),
    (r"pulling [0-9a-f]{12}", "pulling HEX"),
    (r'"(response|content|text)":"[^"]+"', r'"\1":"SAID"'),
    (r'"(context|embedding)":\[[^\]]*\]', r'"\1":[N]'),
    (r'\\npanic:[^"]*', r"\\npanic:"),
    (r'"(total":46236384,"completed)":\d+', r'"\1":N'),
]


@dataclass(frozen=True)
class Answer:
    """A response as received; `pieces` are its chunks, or its one body."""

    head: tuple[str, ...]
    pieces: tuple[str, ...]

    @classmethod
    def read(cls, data: bytes) -> Answer:
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        pieces = _chunks(body) if "Transfer-Encoding: chunked" in lines else [body]
        return cls(tuple(lines), tuple(piece.decode() for piece in pieces))

    def masked(self) -> tuple[list[str], list[str]]:
        """Head and pieces with all variable parts masked; repeated pieces are left out."""
        head = [re.sub(r"^(Date|Content-Length): .*", r"\1", line) for line in self.head]
        pieces: list[str] = []
        for piece in self.pieces:
            for pattern, mask in _MASKS:
                piece = re.sub(pattern, mask, piece)
            if not pieces or piece != pieces[-1]:
                pieces.append(piece)
        return head, pieces


@dataclass(frozen=True)
class Exchange:
    title: str
    request: bytes
    answer: Answer

    def again(self, port: int, **renamed: str) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
        """Send the same request to `port`; return that response and the recorded one, both masked.

        `renamed` maps recorded names of models or registries to others (`_` stands for `-`; see `_other`).
        """
        head, _, body = _other(self.request, renamed).partition(b"\r\n\r\n")
        head = re.sub(rb"Host: .*", b"Host: 127.0.0.1:%d" % port, head.rstrip(b"\r"))
        head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(head + b"\r\n\r\n" + body)
            data = b""
            while piece := connection.recv(65536):
                data += piece
        answer = Answer.read(data)
        length = [int(line[16:]) for line in answer.head if line.startswith("Content-Length: ")]
        assert head.startswith(b"HEAD") or length in ([], [len(data.partition(b"\r\n\r\n")[2])])
        recorded = Answer(self.answer.head, tuple(_other(p.encode(), renamed).decode() for p in self.answer.pieces))
        return answer.masked(), recorded.masked()


def exchanges(name: str) -> list[Exchange]:
    """The requests of `http/NAME.txt` and their responses, in order."""
    data = (FOLDER / "http" / f"{name}.txt").read_bytes()
    starts = list(_TITLE.finditer(data))
    ends = [start.start() for start in starts[1:]] + [len(data)]
    found = []
    for start, end in zip(starts, ends, strict=True):
        request, _, rest = data[start.end() : end].partition(b"\n<<< RESPONSE")
        found.append(Exchange(start.group(1).decode(), request, Answer.read(_blocks(rest))))
    return found


def _blocks(text: bytes) -> bytes:
    """The bytes of a recording: blocks of `[+seconds LENGTHB]` and the bytes received then; the last block marks the
    end.

    The lengths are not used: in some recordings a folder's name was shortened later.
    """
    return b"".join(_BLOCK.split(text)[1:-1])


def _chunks(body: bytes) -> list[bytes]:
    pieces = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if length:
            pieces.append(body[:length])
        body = body[length + 2 :]
    return pieces


def _other(data: bytes, renamed: dict[str, str]) -> bytes:
    for old, new in renamed.items():
        recorded = "127.0.0.1:5005" if old == "registry" else old.replace("_", "-")
        data = data.replace(recorded.encode(), new.encode())
    return data


_ROW = re.compile(
    r"pulling [0-9a-f]{12}: (?:  \d| \d\d|100)% ▕█* *▏ "
    r"(?P<sizes>[ \d.]{2,4}\d? ?[KMG]?B/[ \d.]{2,4}\d? ?[KMG]?B|[ \d.]{2,4}\d? ?[KMG]?B {7})"
    r"(?P<speed> {18}|  [ \d.]{3} [KMG]B/s  [ \dmhs]{6})$"
)


def frames(drawn: bytes) -> list[str]:
    """The frames drawn by `ollama pull`, with numbers masked and spinners fixed; repeated frames are left out."""
    found: list[str] = []
    for frame in drawn.decode().split("\x1b[?2026h")[1:]:
        rows = "\n".join(_masked_row(row) for row in re.sub("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", "⠋", frame).split("\n"))
        if not found or rows != found[-1]:
            found.append(rows)
    return found


def _masked_row(row: str) -> str:
    text, code, rest = row.partition("\x1b[K")
    match = _ROW.match(text)
    if match is None:
        return row
    assert len(text) == 79, "a bar's row fills 80 columns but one"
    sizes = "DONE" if match["sizes"].endswith(" " * 7) else "SOME/ALL"
    speed = "" if match["speed"].isspace() else " SPEED ETA"
    return f"pulling HEX: BAR {sizes}{speed}{code}{rest}"
