"""What the language model is asked, how its list is read, and the wording by rules if it gives none. Pure.

The model gets short requests: a small local one has little context, and follows short ones better.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from services.providers.ports import ChatMessage
from services.studio.request import Wording
from services.text import fix_surrogates

LONGEST_WHAT = 2000
"""Characters, as in a typed prompt. With LONGEST_HOW a whole prompt stays below the 4,000 of the image server."""
LONGEST_HOW = 600
LONGEST_ANSWER = 50_000
"""Characters of an answer that are read."""
TOKENS_EACH = 160
"""What a candidate may take in an answer."""
TOKENS_AROUND = 200

SYSTEM = (
    "You write prompts for an image generator. Answer with a JSON list and nothing else. Each item is an object with "
    'two texts: "what" says what is shown (subject, action, place), "how" says how it looks (medium, light, colours, '
    "composition). At most 40 words each. Items differ clearly from one another."
)
AGAIN = "Your last answer could not be read. Answer with the JSON list alone, such as "
EXAMPLE = '[{"what": "…", "how": "…"}]'

LOOKS = (
    "A photograph in soft morning light, shallow depth of field",
    "A watercolour with loose brushwork and pale colours",
    "An oil painting with strong light and shadow",
    "A detailed ink drawing, black on white",
    "A wide shot at golden hour, warm colours",
    "A close-up in cool, diffuse light",
    "A flat illustration with few, bold colours",
    "A night scene lit by lamps, high contrast",
    "A pastel drawing on textured paper",
    "A view from above, clear geometric composition",
    "A black-and-white photograph with fine grain",
    "A misty scene in muted colours",
    "A woodcut with two colours",
    "A bright, high-key studio photograph",
    "A low viewpoint against a dramatic sky",
    "A paper collage with visible edges",
    "A long exposure with soft motion",
    "A pencil sketch with light shading",
    "A poster with a limited palette and strong shapes",
    "A rainy scene with reflections and neon colours",
)
"""How a picture can look, for candidates that no model has written."""

_WHAT_KEYS = ("what", "subject", "content")
_HOW_KEYS = ("how", "style", "look")
_WHAT_LABEL = re.compile(r"\bwhat\b\W{0,6}[:=]", re.I)
_HOW_LABEL = re.compile(r"\bhow\b\W{0,6}[:=]", re.I)
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.I | re.S)
_MOST_STARTS = 200
"""Brackets at which a JSON value is looked for, which bounds the time for an answer full of them."""


def ask_for_first(prompt: str, count: int) -> list[ChatMessage]:
    """Return the request for the candidates of the first iteration."""
    return _asking(f"Write {_items(count)} for this wish: {prompt}")


def ask_for_better(prompt: str, wording: Wording, told: str, count: int) -> list[ChatMessage]:
    """Return the request for refined candidates; `told` is what the score of the one to refine said."""
    item = json.dumps({"what": wording.what, "how": wording.how}, ensure_ascii=False)
    said = f" {told}" if told else ""
    return _asking(
        f"Wish: {prompt}\nThis item was drawn: {item}\n{said.strip()}\nWrite {_items(count)} improved on it."
    )


def ask_again(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the same request, after an answer that could not be read."""
    *before, last = messages
    return [*before, {"role": "user", "content": f"{last['content']}\n{AGAIN}{EXAMPLE}."}]


def longest_answer(count: int) -> int:
    """Return how many tokens an answer with so many candidates may have."""
    return TOKENS_AROUND + TOKENS_EACH * count


def told_by(alignment: float, aesthetic: float, comment: str) -> str:
    """Say in words what a score says, and which axis to work on."""
    weaker = "Improve what is shown first." if alignment < aesthetic else "Improve how it looks first."
    said = " ".join(comment.split())[:300]
    return f"It shows the wish at {alignment:.2f} of 1 and looks good at {aesthetic:.2f} of 1. {said} {weaker}".replace(
        "  ", " "
    )


def parse_candidates(answer: str, most: int) -> list[Wording]:
    """Return the candidates in a model's answer, at most so many, each once; empty if it holds none.

    Reads a JSON list, also inside other text or broken off at its end, and lines that label both axes. An item needs
    both axes.
    """
    text = _THOUGHTS.sub(" ", fix_surrogates(answer[:LONGEST_ANSWER]))
    found = list(_distinct(_from_json(text))) or list(_distinct(_from_labels(text)))
    return found[:most]


def merged(first: Sequence[Wording], second: Sequence[Wording], most: int) -> list[Wording]:
    """Return the candidates of two answers, each once, at most so many."""
    return list(_distinct((w.what, w.how) for w in (*first, *second)))[:most]


def by_rules(what: str, count: int, start: int) -> list[Wording]:
    """Return candidates without a model: the same content in different looks, the ones of LOOKS from `start` on."""
    content = " ".join(what.split())[:LONGEST_WHAT].rstrip(" .")
    return [Wording(content, LOOKS[(start + index) % len(LOOKS)]) for index in range(count)]


def _asking(request: str) -> list[ChatMessage]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _from_json(text: str) -> Iterator[tuple[object, object]]:
    """Yield both axes of each object in the text that has them."""
    decoder = json.JSONDecoder()
    position, starts = 0, 0
    while starts < _MOST_STARTS:
        opened = text.find("{", position)
        if opened < 0:
            return
        starts += 1
        try:
            value, position = decoder.raw_decode(text, opened)
        except (ValueError, RecursionError):
            position = opened + 1
            continue
        yield from _axes(value)


def _axes(value: object) -> Iterator[tuple[object, object]]:
    """Yield both axes of an object, or of the objects in a list that it holds."""
    if not isinstance(value, dict):
        return
    keys = {str(key).strip().lower(): held for key, held in value.items()}
    what = next((keys[key] for key in _WHAT_KEYS if key in keys), None)
    how = next((keys[key] for key in _HOW_KEYS if key in keys), None)
    if what is not None and how is not None:
        yield what, how
        return
    for held in value.values():
        for item in held if isinstance(held, list) else ():
            if isinstance(item, dict):
                yield from _axes({k: v for k, v in item.items() if not isinstance(v, list)})


def _from_labels(text: str) -> Iterator[tuple[object, object]]:
    """Yield both axes wherever the text labels them: "What: …" and "How: …", on one line or two."""
    labels = list(_WHAT_LABEL.finditer(text))
    ends = [*(label.start() for label in labels[1:]), len(text)]
    for label, end in zip(labels, ends, strict=False):
        part = text[label.end() : end]
        how = _HOW_LABEL.search(part)
        if how is not None:
            yield part[: how.start()], part[how.end() :].strip().partition("\n")[0]


def _distinct(pairs: Iterable[tuple[object, object]]) -> Iterator[Wording]:
    """Yield the usable ones as wordings, each once."""
    seen = set()
    for what, how in pairs:
        if not isinstance(what, str) or not isinstance(how, str):
            continue
        wording = Wording(_cleaned(what, LONGEST_WHAT), _cleaned(how, LONGEST_HOW))
        key = (wording.what.lower(), wording.how.lower())
        if _says_something(wording.what) and _says_something(wording.how) and key not in seen:
            seen.add(key)
            yield wording


def _cleaned(text: str, longest: int) -> str:
    """Return a text on one line without control characters and signs around it, cut between words if possible."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split()).strip(" .,;:|*`\"'[]{}")
    if len(line) <= longest:
        return line
    beginning, _, _ = line[: longest + 1].rpartition(" ")
    return beginning or line[:longest]


def _says_something(text: str) -> bool:
    """Return whether there is a word: a model may repeat the dots of the example."""
    return sum(c.isalnum() for c in text) > 1
