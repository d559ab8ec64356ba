"""What counts as a near-copy of a question. The oracle: pairs judged by reading, and set arithmetic in plain loops."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medreasoner_train.nearness import FILLER, near_copies


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


@given(st.lists(st.text("abcs w?", min_size=1, max_size=12), min_size=1, max_size=8))
def test_near_copies_are_those_that_loops_over_sets_find(queries: list[str]) -> None:
    def content(query: str) -> list[str]:
        words = re.findall("[a-z]+", query)
        kept = [word for word in words if word not in FILLER] or words or [query]
        return [re.sub(r"(?<=..[^s])s$", "", word) for word in kept]

    def share(a: set[str], b: set[str]) -> int:
        return sum(1 for member in a if member in b)

    expected = []
    for i, one in enumerate(queries):
        for j, other in enumerate(queries[i + 1 :], start=i + 1):
            a, b = content(one), content(other)
            x, y = ({" ".join(["", *own, ""])[k : k + 3] for k in range(len(" ".join(own)))} for own in (a, b))
            # In whole numbers: shared / union >= 3 / 4, and 2 * shared / sum >= 4 / 5.
            if 4 * share(set(a), set(b)) >= 3 * len(set(a) | set(b)) or 10 * share(x, y) >= 4 * (len(x) + len(y)):
                expected.append((i, j))
    assert near_copies(queries) == expected
