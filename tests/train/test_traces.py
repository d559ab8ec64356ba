"""Words for place and size in a reasoning trace, and the mask that they are held against."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from medreasoner_train.language import place_of
from medreasoner_train.traces import Claims, TraceCheck, check_trace, claims_of


@pytest.mark.parametrize(
    ("trace", "claims"),
    [
        (
            "Seen here as a dark field; medium-sized, upper left of the picture.",
            Claims("medium-sized", "upper", "left"),
        ),
        ("Seen as a large shadow in the right upper lobe; small, lower of the picture.", Claims("small", "lower", "")),
        ("A small bright spot; large, right of the picture.", Claims("large", "", "right")),
        ("small, in the middle of the picture", Claims("small", "", "")),
        ("upper left of the picture. No: small, lower right of the picture.", Claims("small", "lower", "right")),
        ("left of the picture", Claims(None, "", "left")),
        ("The left kidney, a large one. Nothing in this picture shows it.", Claims(None, None, None)),
        ("", Claims(None, None, None)),
    ],
)
def test_the_words_are_those_of_the_last_clause_about_the_picture(trace: str, claims: Claims) -> None:
    assert claims_of(trace) == claims


sides = strategies.integers(0, 19)


@hypothesis.given(sides, sides, sides, sides)
@hypothesis.settings(max_examples=60, deadline=None)
def test_what_the_mask_itself_says_is_right(a: int, b: int, c: int, d: int) -> None:
    mask = np.zeros((20, 20), bool)
    mask[min(a, b) : max(a, b) + 1, min(c, d) : max(c, d) + 1] = True
    assert check_trace(f"Seen as a small left upper thing; {place_of(mask)}.", mask) == TraceCheck(*[True] * 4)


def test_each_word_is_judged_alone_and_a_missing_one_is_wrong() -> None:
    mask = np.zeros((20, 20), bool)
    mask[1:4, 14:18] = True  # small, upper right
    assert check_trace("large, upper right of the picture", mask) == TraceCheck(True, False, True, True)
    assert check_trace("small, right of the picture", mask) == TraceCheck(True, True, False, True)
    assert check_trace("small, upper left of the picture", mask) == TraceCheck(True, True, True, False)
    assert check_trace("upper right of the picture", mask) == TraceCheck(True, False, True, True)
    assert check_trace("Nothing in this picture shows it.", mask) == TraceCheck(False, False, False, False)
