"""What a run is asked to do, its bounds, and how many calls it makes at most. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.text import fix_surrogates

Phase = Literal["texts", "images", "scores"]
PHASES: tuple[Phase, ...] = ("texts", "images", "scores")

LONGEST_PROMPT = 2000
"""Characters."""
MOST_CANDIDATES = 16
MOST_KEPT = 8
MOST_ITERATIONS = 8
LARGEST_SEED = 2**31 - 1
TRIES_PER_LIST = 2
"""Calls for one list of candidates: a garbled list is asked for once more."""
TRIES_PER_SCORE = 2
"""Calls for one score: a language model that judges a picture is asked once more for a score that can't be read."""


class InvalidRequest(Exception):
    """A run can't be asked for like this. `field` is the name of the value; the text is for people."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class Wording:
    """A prompt on two axes: what is shown, and how it looks."""

    what: str
    how: str

    @property
    def prompt(self) -> str:
        """The prompt for a picture."""
        return f"{self.what}. {self.how}"


@dataclass(frozen=True, slots=True)
class Origin:
    """The kept candidate of an earlier run that a run goes on from; `told` is what its score said."""

    run: str
    number: int
    wording: Wording
    told: str = ""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A prompt and the shape of the search.

    In each of `iterations` there are `candidates` new pictures; the best `beam_width` of all so far are refined in the
    next one. The same `seed` with providers that repeat themselves gives the same ranking.
    """

    prompt: str
    beam_width: int
    iterations: int
    candidates: int
    seed: int
    origin: Origin | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Calls:
    """A number of calls to each kind of provider."""

    texts: int = 0
    images: int = 0
    scores: int = 0

    @property
    def total(self) -> int:
        return self.texts + self.images + self.scores


def clean_prompt(prompt: str) -> str:
    """Return a typed prompt in the form that is stored. Raises InvalidRequest if it is empty or too long."""
    prompt = fix_surrogates(prompt).replace("\r\n", "\n").replace("\0", "").strip()
    if not prompt:
        raise InvalidRequest("prompt", "Write what the pictures are to show.")
    if len(prompt) > LONGEST_PROMPT:
        raise InvalidRequest(
            "prompt", f"This prompt has {len(prompt):,} characters; {LONGEST_PROMPT:,} is the limit. Shorten it."
        )
    return prompt


def check_shape(beam_width: int, iterations: int, candidates: int, seed: int) -> None:
    """Raise InvalidRequest for the first value that is out of bounds."""
    for name, words, value, lowest, highest in (
        ("candidates", "Candidates", candidates, 1, MOST_CANDIDATES),
        ("beam_width", "The number of pictures kept", beam_width, 1, MOST_KEPT),
        ("iterations", "Iterations", iterations, 1, MOST_ITERATIONS),
        ("seed", "The seed", seed, 0, LARGEST_SEED),
    ):
        if not lowest <= value <= highest:
            raise InvalidRequest(name, f"{words} can be {lowest} to {highest:,}; this is {value:,}.")
    if beam_width > candidates:
        raise InvalidRequest("beam_width", f"Keep at most as many pictures as there are candidates ({candidates}).")


def most_calls(request: RunRequest) -> Calls:
    """Return an upper bound of the calls that a run makes. A call repeated after a rate limit counts once."""
    later = min(request.beam_width, request.candidates) * (request.iterations - 1)
    pictures = request.candidates * request.iterations
    return Calls(TRIES_PER_LIST * (1 + later), pictures, TRIES_PER_SCORE * pictures)


def shares(candidates: int, parents: int) -> Sequence[int]:
    """Return how many of the candidates each parent gets, the best parent first; parents that get none are left out."""
    each, more = divmod(candidates, parents)
    return [count for count in (each + (index < more) for index in range(parents)) if count]


def derived_seed(seed: int, *place: object) -> int:
    """Return the seed of one call of a run, from the run's and the call's place in it."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return int.from_bytes(digest[:4], "big") & LARGEST_SEED
