"""From the chunks of an OpenAI-style stream to pieces of an answer: what the model thinks and what it says. No I/O.

Engines that know a model's way of thinking give its thoughts in a field of their own: llama.cpp and older vLLM as
`reasoning_content`, newer vLLM and Ollama as `reasoning`, and vLLM in between as both. Those that don't leave them in
the text, between `<think>` and `</think>`; a chat template that opens the tag itself leaves the closing one alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from services.answers import Piece
from services.text import is_first_half, whole_characters

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
OPEN, CLOSE = "<think>", "</think>"
FENCE = "```"
LINE_BEGINNING = 16
"""Characters of a line that are remembered: enough for a fence of code."""


def pieces_of(chunk: Mapping[str, Any]) -> Iterator[Piece]:
    """What one chunk adds to the answer, as the engine gives it."""
    for delta in (_mapping(_mapping(choice).get("delta")) for choice in _list(chunk.get("choices"))):
        thought = next((t for name in THOUGHT_FIELDS if (t := delta.get(name)) and isinstance(t, str)), "")
        if thought:
            yield Piece(thought, thought=True)
        text = delta.get("content")
        if isinstance(text, str) and text:
            yield Piece(text)


def finish_reason(chunk: Mapping[str, Any]) -> str | None:
    """Why the engine ended the answer, where this chunk says it: "stop", "length", or a word of its own."""
    reasons = (_mapping(choice).get("finish_reason") for choice in _list(chunk.get("choices")))
    return next((reason for reason in reasons if isinstance(reason, str)), None)


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, each text by itself: a character that was cut in two comes whole, with the later piece."""
    half = Piece("")
    for piece in pieces:
        if half.text and half.thought != piece.thought:
            yield Piece(whole_characters(half.text), half.thought)
            half = Piece("")
        text = half.text + piece.text
        half = Piece(text[-1] if is_first_half(text[-1]) else "", piece.thought)
        if whole := whole_characters(text.removesuffix(half.text)):
            yield Piece(whole, piece.thought)
    if half.text:
        yield Piece(whole_characters(half.text), half.thought)


def told_apart(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, with the thoughts that stand between tags in the text marked as such, and the tags left out."""
    tags = _Tags()
    for piece in pieces:
        if piece.thought:
            yield from tags.thought(piece.text)
        else:
            yield from tags.text(piece.text)
    yield from tags.end()


class _Tags:
    """Reads text piece by piece, and keeps back what may turn out to be a tag.

    Tags count where models write them: the opening one before the first word, the closing one after it; and a closing
    one without an opening one on a line of its own, outside of code. Elsewhere they are what the answer is about.
    """

    def __init__(self) -> None:
        self._read = self._beginning
        self._held = ""
        self._thought = False
        self._line = ""
        """The beginning of the line that is being read."""
        self._in_code = False

    def thought(self, text: str) -> Iterator[Piece]:
        """Thoughts; what comes before the first word of them is dropped."""
        if not self._thought:
            text = text.lstrip()
        if text:
            self._thought = True
            yield Piece(text, thought=True)

    def text(self, text: str) -> Iterator[Piece]:
        held, self._held = self._held, ""
        yield from self._read(held + text)

    def end(self) -> Iterator[Piece]:
        """What was kept back: the answer is over, so that it is no tag, unless it is a whole one."""
        held, self._held = self._held, ""
        if self._read == self._untold and held.strip() == CLOSE:
            yield Piece("", thought=True, so_far=True)
        elif held:
            yield Piece(held, thought=self._read == self._thinking)

    def _beginning(self, text: str) -> Iterator[Piece]:
        begun = text.lstrip()
        if begun.startswith(OPEN):
            self._read = self._thinking
            yield from self._thinking(begun.removeprefix(OPEN))
        elif OPEN.startswith(begun):
            self._held = text
        else:
            self._read = self._before_answer if self._thought else self._untold
            yield from self._read(text)

    def _thinking(self, text: str) -> Iterator[Piece]:
        thought, tag, answer = text.partition(CLOSE)
        if tag:
            self._read = self._before_answer
            yield from self.thought(thought)
            yield from self._before_answer(answer)
            return
        tail = max((n for n in range(1, len(CLOSE)) if thought.endswith(CLOSE[:n])), default=0)
        self._held = thought[len(thought) - tail :]
        yield from self.thought(thought[: len(thought) - tail])

    def _before_answer(self, text: str) -> Iterator[Piece]:
        """The line breaks between thoughts and answer belong to neither."""
        if begun := text.lstrip():
            self._read = self._answer
            yield Piece(begun)

    def _answer(self, text: str) -> Iterator[Piece]:
        if text:
            yield Piece(text)

    def _untold(self, text: str) -> Iterator[Piece]:
        """Text of which it isn't known yet whether it is a thought. What is kept back is the beginning of a line."""
        passed = ""
        while text:
            line, end, rest = text.partition("\n")
            word = line.strip()
            if not self._line.strip() and not self._in_code and word and CLOSE.startswith(word):
                if end and word == CLOSE:
                    if passed:
                        yield Piece(passed)
                    yield Piece("", thought=True, so_far=True)
                    self._read = self._before_answer
                    yield from self._before_answer(rest)
                    return
                if not end:
                    self._held = line
                    break
            passed += line + end
            self._line = (self._line + line)[:LINE_BEGINNING]
            if end:
                self._in_code ^= self._line.lstrip().startswith(FENCE)
                self._line = ""
            text = rest
        if passed:
            yield Piece(passed)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
