"""Spatial and comparative questions, against masks drawn here; what is true of them is worked out pixel by pixel."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from tokenizers import Tokenizer

from medreasoner_train.augment import NO_CHANGE
from medreasoner_train.data import load_index
from medreasoner_train.language import ABSENT, TEMPLATE, load_phrasings
from medreasoner_train.nearness import near_copies
from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.spatial import (
    NOUNS,
    Part,
    Relation,
    RelationKind,
    ask,
    choose,
    load_templates,
    relations,
    template_texts,
)
from medreasoner_train.store import Stored
from medreasoner_train.vocabulary import Vocabulary

Mask = NDArray[np.bool_]
PARTS: tuple[Part, ...] = ("train", "heldout")
AFTER = TEMPLATE.split("{query}")[1]


def block(x1: int, y1: int, x2: int, y2: int, *, height: int = 50, width: int = 40) -> Mask:
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def told(masks: dict[str, Mask]) -> set[tuple[str, str, str | None, str | None]]:
    return {(own.kind, own.category, own.other, own.third) for own in relations(masks)}


def pixels_of(mask: Mask) -> NDArray[np.float64]:
    """(N, 2) centres (x, y) of a mask's pixels, relative to the picture."""
    height, width = mask.shape
    return np.array(
        [((x + 0.5) / width, (y + 0.5) / height) for y in range(height) for x in range(width) if mask[y, x]]
    )


def holds(kind: RelationKind, one: Mask, other: Mask, third: Mask | None) -> bool:
    """Whether a relation is true at all, margins aside."""
    a, b = pixels_of(one), pixels_of(other)
    if kind == "nearer":
        assert third is not None
        return bool(cdist(a, pixels_of(third)).min() < cdist(b, pixels_of(third)).min())
    (ax, ay), (bx, by) = a.mean(axis=0), b.mean(axis=0)
    return bool(
        {
            "left": ax < bx,
            "right": ax > bx,
            "upper": ay < by,
            "lower": ay > by,
            "larger": len(a) > len(b),
            "smaller": len(a) < len(b),
            "central": np.hypot(ax - 0.5, ay - 0.5) < np.hypot(bx - 0.5, by - 0.5),
        }[kind]
    )


boxes = st.tuples(st.integers(0, 34), st.integers(0, 44), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=50)
@given(st.lists(boxes, min_size=2, max_size=4))
def test_whatever_is_said_of_structures_is_true_of_their_masks(drawn: list[tuple[int, int, int, int]]) -> None:
    masks = {f"s{k}": block(x, y, x + w, y + h) for k, (x, y, w, h) in enumerate(drawn)}
    found = relations(masks)
    for own in found:
        assert own.other is not None
        assert own.mask is masks[own.category]
        third = None if own.third is None else masks[own.third]
        assert holds(own.kind, own.mask, masks[own.other], third)
        assert len({own.category, own.other, own.third}) == 3  # None among them
    # Of any two, one question has one answer.
    answers = [(own.kind, frozenset({own.category, own.other}), own.third) for own in found]
    assert len(set(answers)) == len(answers)


@given(st.lists(st.tuples(st.integers(3, 12), st.integers(3, 12)), min_size=1, max_size=6))
def test_whatever_is_said_of_things_of_a_kind_sets_one_apart_from_all_others(sizes: list[tuple[int, int]]) -> None:
    things = [
        block(2 + k % 3 * 16, 2 + k // 3 * 20, 2 + k % 3 * 16 + w, 2 + k // 3 * 20 + h, width=50)
        for k, (w, h) in enumerate(sizes)
    ]
    found = relations({"polyp": np.logical_or.reduce(things)})
    assert found or len(things) == 1 or min(w * h for w, h in sizes) < 0.15 * max(w * h for w, h in sizes)
    for own in found:
        (mine,) = [k for k, thing in enumerate(things) if np.array_equal(thing, own.mask)]
        assert own.category == "polyp"
        assert own.other is None
        assert all(holds(own.kind, own.mask, thing, None) for k, thing in enumerate(things) if k != mine)
    assert len({own.kind for own in found}) == len(found)


def test_two_structures_side_by_side() -> None:
    masks = {"nerve": block(2, 10, 6, 20), "vessel": block(20, 10, 32, 20)}
    assert told(masks) == {
        ("left", "nerve", "vessel", None),
        ("right", "vessel", "nerve", None),
        ("larger", "vessel", "nerve", None),
        ("smaller", "nerve", "vessel", None),
        ("central", "vessel", "nerve", None),
    }


def test_a_third_structure_tells_which_of_two_is_nearer() -> None:
    masks = {"a": block(0, 0, 5, 50), "b": block(8, 0, 13, 50), "c": block(30, 0, 35, 50)}
    near = {own for own in told(masks) if own[0] == "nearer"}
    assert near == {("nearer", "b", "c", "a"), ("nearer", "b", "a", "c"), ("nearer", "a", "c", "b")}


@given(boxes, boxes)
def test_a_mirrored_picture_changes_sides_and_nothing_else(
    one: tuple[int, int, int, int], other: tuple[int, int, int, int]
) -> None:
    masks = {
        name: block(x, y, min(x + w, 40), min(y + h, 50)) for name, (x, y, w, h) in (("one", one), ("other", other))
    }
    swap = {"left": "right", "right": "left"}
    mirrored = told({name: mask[:, ::-1] for name, mask in masks.items()})
    assert mirrored == {(swap.get(kind, kind), *rest) for kind, *rest in told(masks)}


@pytest.mark.parametrize(
    "masks",
    [
        {"cell": block(5, 5, 30, 30), "nucleus": block(8, 8, 14, 14)},  # a part of the other
        {"a": block(10, 10, 20, 20), "b": block(11, 21, 20, 22)[::-1] & False},  # nothing of it is seen
        {"polyp": block(5, 5, 20, 20) | block(30, 40, 32, 43)},  # the second is too large for noise, too small to count
        {"polyp": block(0, 0, 30, 4) | block(0, 0, 4, 30) | block(36, 44, 40, 50)},  # an L: two things that touch?
        {"retinal vessel": block(2, 2, 10, 10) | block(20, 20, 34, 34)},  # parts of one thing
        {"polyp": np.logical_or.reduce([block(5 * k, 5, 5 * k + 3, 8) for k in range(7)])},  # too many
        {"polyp": block(2, 2, 17, 17) | block(22, 25, 37, 45) | block(39, 49, 40, 50)},  # cut off by the border
        {},
    ],
)
def test_nothing_is_asked_where_the_answer_is_not_clear(masks: dict[str, Mask]) -> None:
    assert relations(masks) == []


def test_a_speck_is_no_polyp() -> None:
    polyps = block(2, 2, 17, 17) | block(22, 25, 37, 45)
    found = relations({"polyp": polyps | block(30, 10, 31, 11)})
    assert {own.kind for own in found} == {"left", "right", "upper", "lower", "central"}
    assert all(int(own.mask.sum()) in {225, 300} for own in found)


def test_kinds_are_chosen_alike_however_many_relations_are_of_each() -> None:
    mask = block(0, 0, 2, 2)
    many = [Relation(kind="nearer", category=f"s{k}", mask=mask, other="o", third="t") for k in range(20)]
    left = Relation(kind="left", category="a", mask=mask, other="o")
    rng = np.random.default_rng(0)
    drawn = [choose([*many, left], rng) for _ in range(300)]
    assert 110 < sum(own is left for own in drawn) < 190
    assert len({own.category for own in drawn}) == 21


def every_template() -> list[tuple[str, str, Part, str]]:
    return [
        (number, kind, part, template)
        for part in PARTS
        for number, kinds in load_templates(part).items()
        for kind, templates in kinds.items()
        for template in templates
    ]


def test_there_are_templates_for_every_kind_a_fifth_of_them_held_out_and_no_near_copies() -> None:
    assert {kind for number, kind, _, _ in every_template() if number == "pair"} == set(get_args(RelationKind))
    assert {kind for number, kind, _, _ in every_template() if number == "several"} == {*get_args(RelationKind)} - {
        "nearer"
    }
    for number, kind in {own[:2] for own in every_template()}:
        trained, held = (load_templates(part)[number][kind] for part in PARTS)
        assert len(held) == 0.2 * (len(trained) + len(held))
        assert near_copies([re.sub(r"\{\w+\}", "", template) for template in (*trained, *held)]) == []


def test_a_template_names_all_that_it_compares() -> None:
    for number, kind, _, template in every_template():
        names = re.findall(r"\{(\w+)\}", template)
        if number == "several":
            assert set(names) == {"noun"}, template
        else:
            assert sorted(names) == ["one", "third", "two"] if kind == "nearer" else ["one", "two"], template


@pytest.mark.parametrize("part", PARTS)
def test_a_question_names_what_it_compares_in_either_order(part: Part) -> None:
    rng = np.random.default_rng(0)
    own = Relation(kind="nearer", category="nerve", mask=block(0, 0, 2, 2), other="vessel", third="bone")
    asked = {ask(own, part, rng) for _ in range(200)}
    assert len(asked) == 2 * len(load_templates(part)["pair"]["nearer"])
    assert all(name in text.lower() for text in asked for name in ("nerve", "vessel", "bone"))
    thing = Relation(kind="larger", category="cell nucleus", mask=block(0, 0, 2, 2))
    assert all("nucleus" in ask(thing, part, rng).lower() for _ in range(20))


def test_things_that_are_counted_have_phrasings() -> None:
    assert NOUNS.keys() <= {key.partition("/")[2] for key in load_phrasings("train")}


def test_the_tokenizer_knows_the_words_of_the_templates(tokenizer: Tokenizer) -> None:
    assert " carious spot" in " " + "\n ".join(template_texts())
    assert len(tokenizer.encode(" rightmost").ids) <= 3


@pytest.fixture
def data(asking: Callable[[SftOptions], SftData]) -> SftData:
    return asking(SftOptions(images=4, branches=3, size=84, spatial=1.0))


def test_a_branch_asks_what_its_masks_make_true_and_answers_with_the_target(
    data: SftData, vocabulary: Vocabulary
) -> None:
    rng = np.random.default_rng(0)
    seen = 0
    for index, item in enumerate(data.stored):
        _, targets, masks = data.image(index, 84, rng, NO_CHANGE)
        true = relations(masks)
        written = {
            (ask(own, "train", rng), own.category): own.mask for own in true for _ in range(150)
        }  # all wordings of all that is true, nearly
        ids, mark = data.branch(item, targets, masks, rng, think=True)
        if not true:
            assert mark.query in {q for own in load_phrasings("train").values() for q in (*own.queries, *own.named)}
            continue
        mask = written[mark.query, data.categories[mark.category]]
        text = vocabulary.tokenizer.decode(ids, skip_special_tokens=False)
        assert text.partition(AFTER)[0] == mark.query
        assert ABSENT not in text
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        assert mark.geometry is not None
        expected = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 84
        assert mark.geometry[:4] == pytest.approx(expected)
        assert all(mask[int(y * 84), int(x * 84)] for x, y in mark.geometry[4:].reshape(2, 2))
        seen += 1
    assert seen >= 10


def test_the_share_of_spatial_questions_is_what_was_asked_for(data: SftData) -> None:
    usual = {q for own in load_phrasings("train").values() for q in (*own.queries, *own.named)}
    rng = np.random.default_rng(0)
    index = next(i for i, item in enumerate(data.stored) if item.record.source == "shenzhen_cxr")
    _, targets, masks = data.image(index, 84, rng, NO_CHANGE)
    for share in (0.0, 0.3):
        data._options = replace(data._options, spatial=share)
        queries = [data.branch(data.stored[index], targets, masks, rng, think=False)[1].query for _ in range(300)]
        assert np.mean([query not in usual for query in queries]) == pytest.approx(share, abs=0.08 * (share > 0))


def test_a_question_that_the_teacher_was_not_shown_has_no_part_in_the_loss_of_meaning(
    grounding_set: Path, stored: list[Stored], vocabulary: Vocabulary
) -> None:
    from medreasoner_train.sft import SftHeads, _meaning_loss

    queries = {q for own in load_phrasings("train").values() for q in (*own.queries, *own.named)}
    meanings = {query: torch.ones(8) for query in queries}
    data = SftData(
        load_index(grounding_set),
        stored,
        vocabulary=vocabulary,
        phrasings=load_phrasings("train"),
        options=SftOptions(images=8, branches=4, size=84, spatial=0.5),
        meanings=meanings,
    )
    meaning: Any = data.make(0, 0).meaning
    known = meaning.any(-1)
    assert 0 < known.sum() < len(known)
    heads, last = SftHeads(16, 3, 8), torch.randn(len(known), 16)
    assert _meaning_loss(heads, last, meaning).item() == pytest.approx(
        _meaning_loss(heads, last[known], meaning[known]).item(), rel=1e-5
    )
    assert _meaning_loss(heads, last, torch.zeros_like(meaning)).item() == 0
