"""What counts as a near-copy of a question. The oracle: pairs judged by reading, and set arithmetic in plain loops."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medreasoner_train.nearness import FILLER, near_copies, nearness


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("the left lung", "Where is the left lung?"),
        ("lung field, right", "Right lung field"),
        ("Optic disk", "optic disc, please"),
        ("What is lost in multiple sclerosis?", "Lost in multiple sclerosis"),
        ("intraperiod line and major dense line", "Major dense lines and intraperiod lines"),
        ("Which cell would be counted in a differential?", "Which cell is counted in a differential count?"),
    ],
)
def test_the_same_question_in_other_clothes_is_a_near_copy(one: str, other: str) -> None:
    assert near_copies([one, "Something of no relation at all", other]) == [(0, 2)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("the left lung", "the right lung"),
        ("Which chamber pumps blood to the body?", "cavity that ejects into the aorta"),
        ("Which lung owns a middle lobe?", "Which lung lies over the liver?"),
        ("the symphysis", "front joint of the pelvis"),
    ],
)
def test_another_question_about_the_same_is_none(one: str, other: str) -> None:
    assert near_copies([one, other]) == []


@given(st.lists(st.text("abcs w?", min_size=1, max_size=12), min_size=1, max_size=6))
def test_nearness_is_what_loops_over_sets_give(queries: list[str]) -> None:
    def content(query: str) -> list[str]:
        words = re.findall("[a-z]+", query)
        kept = [word for word in words if word not in FILLER] or words or [query]
        return [re.sub(r"(?<=..[^s])s$", "", word) for word in kept]

    def share(a: set[str], b: set[str]) -> int:
        return sum(1 for member in a if member in b)

    found = nearness(queries)
    for i, one in enumerate(queries):
        for j, other in enumerate(queries):
            a, b = content(one), content(other)
            jaccard = share(set(a), set(b)) / len(set(a) | set(b))
            x, y = ({" ".join(["", *own, ""])[k : k + 3] for k in range(len(" ".join(own)))} for own in (a, b))
            dice = 2 * share(x, y) / (len(x) + len(y))
            assert np.isclose(found[i, j], max(jaccard / 0.75, dice / 0.8))
