"""The Studio's pure rules: bounds and calls of a request, reading a model's list, ranking."""

from __future__ import annotations

import itertools
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.providers.ports import Score
from services.store.records import StudioCandidate
from services.studio import wording
from services.studio.ranking import flaw, ranked
from services.studio.request import (
    LONGEST_PROMPT,
    InvalidRequest,
    RunRequest,
    Wording,
    check_shape,
    clean_prompt,
    derived_seed,
    most_calls,
    shares,
)

WORDS = st.text(st.characters(categories=["L", "N"]), min_size=2, max_size=12)
WORDINGS = st.builds(Wording, WORDS, WORDS)
ITEM = {"what": "a red fox", "how": "in ink"}
FOX = Wording("a red fox", "in ink")


def test_a_prompt_is_trimmed_and_never_empty_or_huge():
    assert clean_prompt(" a\r\nb \n") == "a\nb"
    for bad in ("", " \n", "x" * (LONGEST_PROMPT + 1)):
        with pytest.raises(InvalidRequest):
            clean_prompt(bad)


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ((0, 1, 1, 0), "beam_width"),
        ((1, 0, 1, 0), "iterations"),
        ((1, 1, 17, 0), "candidates"),
        ((1, 1, 1, -1), "seed"),
        ((3, 1, 2, 0), "beam_width"),
    ],
)
def test_a_shape_out_of_bounds_names_the_value(shape, field):
    with pytest.raises(InvalidRequest) as refused:
        check_shape(*shape)
    assert refused.value.field == field


def test_the_number_of_calls_follows_from_the_shape():
    """Four pictures in each of three iterations; a list, then one per kept picture. Lists and scores count twice."""
    calls = most_calls(RunRequest("p", 2, 3, 4, 0))
    assert (calls.texts, calls.images, calls.scores, calls.total) == (2 * (1 + 2 * 2), 12, 2 * 12, 46)


@given(st.integers(1, 16), st.integers(1, 16))
def test_shares_give_out_every_candidate_the_best_parents_first(candidates, parents):
    given_out = shares(candidates, parents)
    assert sum(given_out) == candidates
    assert list(given_out) == sorted(given_out, reverse=True)
    assert len(given_out) == min(candidates, parents)


def test_derived_seeds_repeat_and_differ_by_place():
    assert derived_seed(1, "picture", 2) == derived_seed(1, "picture", 2)
    assert len({derived_seed(seed, "picture", place) for seed in range(9) for place in range(9)}) == 81


@given(st.lists(WORDINGS, min_size=1, max_size=6, unique_by=lambda w: (w.what.lower(), w.how.lower())), st.data())
def test_a_list_is_read_back_from_around_it(wordings, data):
    """As JSON alone, in a code fence, inside an object, broken off at the end, or as labelled lines."""
    items = [{"what": w.what, "how": w.how} for w in wordings]
    answer = data.draw(
        st.sampled_from(
            [
                json.dumps(items),
                f"Here you are:\n```json\n{json.dumps(items, indent=2)}\n```\nEnjoy.",
                json.dumps({"candidates": items}),
                f"<think>what: no, how: no</think>{json.dumps(items)}",
                json.dumps(items)[:-1] + ', {"what": "broken o',
                "\n".join(f"{n}. **What**: {w.what}; **How**: {w.how}" for n, w in enumerate(wordings, 1)),
                "\n".join(f"WHAT: {w.what}\nHOW: {w.how}" for w in wordings),
            ]
        )
    )
    assert wording.parse_candidates(answer, 6) == wordings


@pytest.mark.parametrize(
    "garbled",
    [
        "",
        "Once upon a time",
        "[]",
        "[1, 2, null]",
        '[{"what": "a fox"}]',
        '[{"what": "…", "how": "…"}]',
        '[{"what": ["a"], "how": 7}]',
        "what: a fox",
        "{" * 1000,
        "\ud83d",
    ],
)
def test_a_garbled_list_holds_no_candidates(garbled):
    assert wording.parse_candidates(garbled, 4) == []


def test_repeated_and_superfluous_candidates_are_left_out():
    answer = json.dumps([ITEM, {"what": "A RED FOX", "how": "In ink"}, {"What": "a hare", "style": "in oil"}, ITEM])
    assert wording.parse_candidates(answer, 4) == [FOX, Wording("a hare", "in oil")]
    assert wording.parse_candidates(answer, 1) == [FOX]
    assert wording.merged([FOX], [FOX, Wording("a hare", "in oil")], 4) == [FOX, Wording("a hare", "in oil")]


@given(st.text(max_size=300))
def test_any_answer_gives_usable_candidates_or_none(answer):
    for found in wording.parse_candidates(answer, 4):
        assert found.what.strip()
        assert found.how.strip()
        assert "\n" not in found.prompt


@pytest.mark.parametrize(
    "hostile", ["{" * 50_000, "what: " * 8_000, "what:" + " " * 50_000, "[[" * 20_000, "<think>" * 7_000]
)
def test_a_hostile_answer_is_read_in_no_time(hostile):
    """Quadratic work would take minutes of processor time."""
    before = time.process_time()
    wording.parse_candidates(hostile, 4)
    assert time.process_time() - before < 2


def test_long_axes_are_cut_so_that_the_prompt_fits():
    [found] = wording.parse_candidates(json.dumps([{"what": "fox " * 900, "how": "ink " * 900}]), 1)
    assert len(found.prompt) < 2700
    assert found.what.endswith("fox")


def test_candidates_by_rules_show_the_same_in_different_looks():
    found = wording.by_rules("a fox.\n", 4, 2)
    assert {w.what for w in found} == {"a fox"}
    assert len({w.how for w in found}) == 4
    assert wording.by_rules("x", 1, 5) == wording.by_rules("x", 1, 5 + len(wording.LOOKS))


def test_a_refinement_says_what_the_score_said():
    [_, asked] = wording.ask_for_better("a fox", FOX, wording.told_by(0.2, 0.8, "No fox  to be seen."), 2)
    assert "a fox" in asked["content"]
    assert "in ink" in asked["content"]
    assert "No fox to be seen. Improve what is shown first." in asked["content"]
    assert "Write 2 items" in asked["content"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1, 1.1])
@pytest.mark.parametrize("place", range(3))
def test_a_score_that_is_no_number_or_out_of_range_is_unusable(bad, place):
    values = [0.5, 0.5, 0.5]
    values[place] = bad
    assert flaw(Score(*values))
    assert flaw(Score(0.0, 1.0, 0.5)) is None


def candidate(number: int, total: float, alignment: float = 0.5, aesthetic: float = 0.5) -> StudioCandidate:
    return StudioCandidate(
        "r", number, 1, None, "w", "h", False, 0, "scored", "", alignment=alignment, aesthetic=aesthetic, total=total
    )


def test_ties_are_broken_by_alignment_then_aesthetic_then_the_earlier_one():
    best, aligned, pretty, first, second = (
        candidate(9, 0.9),
        candidate(8, 0.5, 0.9, 0.1),
        candidate(7, 0.5, 0.5, 0.9),
        candidate(1, 0.5),
        candidate(2, 0.5),
    )
    assert ranked([second, first, pretty, aligned, best]) == [best, aligned, pretty, first, second]


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3), max_size=5), st.randoms())
def test_the_ranking_does_not_depend_on_the_order_of_arrival(scores, random):
    candidates = [candidate(n, *score) for n, score in enumerate(scores, 1)]
    shuffled = [*candidates]
    random.shuffle(shuffled)
    assert ranked(shuffled) == ranked(candidates)
    assert all((a.total or 0) >= (b.total or 0) for a, b in itertools.pairwise(ranked(candidates)))


def test_wording_by_rules_holds_the_longest_prompt():
    prompt = "fox " * (LONGEST_PROMPT // 4 - 1) + "end"
    assert wording.by_rules(prompt, 1, 0)[0].what == prompt
