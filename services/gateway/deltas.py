"""Parses an OpenAI-style stream into deltas of an answer, and separates thoughts from text. No I/O.

Engines that know a model's reasoning format send thoughts in a field of their own: llama.cpp and older vLLM as
`reasoning_content`, newer vLLM and Ollama as `reasoning`, vLLM versions in between as both. Other engines leave them in
the text, between `<think>` and `</think>`. Where the chat template itself opens the tag, only the closing one appears.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from services.answers import Delta
from services.text import fix_surrogates, is_high_surrogate

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
OPEN, CLOSE = "<think>", "</think>"
CODE_FENCE = "```"
LINE_PREFIX_LENGTH = 16
"""Characters kept of the current line, enough to recognise a code fence."""


def parse_chunk(chunk: Mapping[str, Any]) -> Iterator[Delta]:
    """Yield the deltas of one chunk."""
    for fields in (_mapping(_mapping(choice).get("delta")) for choice in _list(chunk.get("choices"))):
        thought = next((t for name in THOUGHT_FIELDS if (t := fields.get(name)) and isinstance(t, str)), "")
        if thought:
            yield Delta(thought, thought=True)
        text = fields.get("content")
        if isinstance(text, str) and text:
            yield Delta(text)


def finish_reason(chunk: Mapping[str, Any]) -> str | None:
    """Return why the engine ended the answer: "stop", "length" or a word of its own; None if the chunk doesn't say."""
    reasons = (_mapping(choice).get("finish_reason") for choice in _list(chunk.get("choices")))
    return next((reason for reason in reasons if isinstance(reason, str)), None)


def join_surrogates(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """Yield the deltas with split surrogate pairs joined, so that each text is valid by itself."""
    pending = Delta("")
    for delta in deltas:
        if pending.text and pending.thought != delta.thought:
            yield Delta(fix_surrogates(pending.text), pending.thought)
            pending = Delta("")
        text = pending.text + delta.text
        pending = Delta(text[-1] if is_high_surrogate(text[-1]) else "", delta.thought)
        if whole := fix_surrogates(text.removesuffix(pending.text)):
            yield Delta(whole, delta.thought)
    if pending.text:
        yield Delta(fix_surrogates(pending.text), pending.thought)


def split_thoughts(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """Yield the deltas with text between think tags marked as thought, and the tags removed."""
    tags = _ThinkTagParser()
    for delta in deltas:
        if delta.thought:
            yield from tags.thought(delta.text)
        else:
            yield from tags.text(delta.text)
    yield from tags.end()


class _ThinkTagParser:
    """Incremental parser of think tags. Holds back text that may turn out to be part of a tag.

    Tags count only where models write them: an opening tag before the first word, the closing tag after it, and a
    closing tag without an opening one on a line of its own outside code. Elsewhere a tag is text of the answer.
    """

    def __init__(self) -> None:
        self._read = self._start
        self._held = ""
        self._thought = False
        self._line = ""
        """Beginning of the current line."""
        self._in_code = False

    def thought(self, text: str) -> Iterator[Delta]:
        """Pass thoughts on, without the white space before the first word."""
        if not self._thought:
            text = text.lstrip()
        if text:
            self._thought = True
            yield Delta(text, thought=True)

    def text(self, text: str) -> Iterator[Delta]:
        held, self._held = self._held, ""
        yield from self._read(held + text)

    def end(self) -> Iterator[Delta]:
        """Yield the text held back: at the end of the answer it is no tag, unless it is a complete one."""
        held, self._held = self._held, ""
        if self._read == self._undecided and held.strip() == CLOSE:
            yield Delta("", thought=True, all_before=True)
        elif held:
            yield Delta(held, thought=self._read == self._thinking)

    def _start(self, text: str) -> Iterator[Delta]:
        begun = text.lstrip()
        if begun.startswith(OPEN):
            self._read = self._thinking
            yield from self._thinking(begun.removeprefix(OPEN))
        elif OPEN.startswith(begun):
            self._held = text
        else:
            self._read = self._before_answer if self._thought else self._undecided
            yield from self._read(text)

    def _thinking(self, text: str) -> Iterator[Delta]:
        thought, tag, answer = text.partition(CLOSE)
        if tag:
            self._read = self._before_answer
            yield from self.thought(thought)
            yield from self._before_answer(answer)
            return
        tail = max((n for n in range(1, len(CLOSE)) if thought.endswith(CLOSE[:n])), default=0)
        self._held = thought[len(thought) - tail :]
        yield from self.thought(thought[: len(thought) - tail])

    def _before_answer(self, text: str) -> Iterator[Delta]:
        """Drop the white space between thoughts and answer."""
        if begun := text.lstrip():
            self._read = self._answer
            yield Delta(begun)

    def _answer(self, text: str) -> Iterator[Delta]:
        if text:
            yield Delta(text)

    def _undecided(self, text: str) -> Iterator[Delta]:
        """Read text that may still turn out to be a thought. At most the beginning of a line is held back."""
        passed = ""
        while text:
            line, end, rest = text.partition("\n")
            word = line.strip()
            if not self._line.strip() and not self._in_code and word and CLOSE.startswith(word):
                if end and word == CLOSE:
                    if passed:
                        yield Delta(passed)
                    yield Delta("", thought=True, all_before=True)
                    self._read = self._before_answer
                    yield from self._before_answer(rest)
                    return
                if not end:
                    self._held = line
                    break
            passed += line + end
            self._line = (self._line + line)[:LINE_PREFIX_LENGTH]
            if end:
                self._in_code ^= self._line.lstrip().startswith(CODE_FENCE)
                self._line = ""
            text = rest
        if passed:
            yield Delta(passed)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
