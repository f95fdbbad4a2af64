"""What a language model is asked to judge a picture by, and how strictly its answer is read. Pure."""

from __future__ import annotations

import json
import re
from typing import NoReturn

from services.providers.ports import Score
from services.text import fix_surrogates

ALIGNMENT_SHARE = 0.7
"""Of the total: whether a picture shows what was asked for counts more than whether it is pretty. The local vision
server has the same share."""
MAX_COMMENT = 500
_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)

QUESTION = (
    "You judge how well a picture fulfils a wish. Answer with one JSON object and nothing else: "
    '{"alignment": 0.0 to 1.0, how completely and precisely the picture shows the wish, '
    '"aesthetic": 0.0 to 1.0, how good it looks (composition, light, detail, no artefacts), '
    '"comment": "one sentence: what to improve first"}. Use the whole range.'
)


class UnreadableScore(ValueError):
    """An answer is not the JSON object that was asked for. The text says what is wrong."""


def parse_score(answer: str) -> Score:
    """Return the score in a model's answer: a JSON object, alone or in a code block.

    Both figures have to be numbers from 0 to 1. Raises UnreadableScore.
    """
    fenced = _FENCED.fullmatch(answer)
    try:
        document = json.loads(fenced[1] if fenced else answer, parse_constant=_refuse)
    except RecursionError:
        raise UnreadableScore("it is nested too deeply") from None
    except UnreadableScore:
        raise
    except ValueError:
        raise UnreadableScore("it is no JSON object") from None
    if not isinstance(document, dict):
        raise UnreadableScore("it is no JSON object")
    alignment, aesthetic = (
        figure(document.get("alignment"), "alignment"),
        figure(document.get("aesthetic"), "aesthetic"),
    )
    comment = document.get("comment")
    said = fix_surrogates(comment)[:MAX_COMMENT].strip() if isinstance(comment, str) else ""
    return Score(alignment, aesthetic, total_of(alignment, aesthetic), said)


def figure(value: object, name: str, most: float = 1.0) -> float:
    """Return a number from 0 to `most`. Raises UnreadableScore."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise UnreadableScore(f"{name} is no number from 0 to {most:g}")
    return float(value)


def total_of(alignment: float, aesthetic: float) -> float:
    return ALIGNMENT_SHARE * alignment + (1 - ALIGNMENT_SHARE) * aesthetic


def _refuse(name: str) -> NoReturn:
    raise UnreadableScore(f"{name} is no number")
