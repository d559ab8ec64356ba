"""What is asked, thought and answered."""

import json
from importlib import resources
from typing import Any

import numpy as np
import pytest

from medreasoner_train.language import (
    ABSENT,
    Phrasings,
    answer_text,
    keys_by_category,
    load_phrasings,
    place_of,
    texts,
    thought_text,
    vary,
)
from medreasoner_train.nearness import near_copies


def table(part: str) -> dict[str, Any]:
    path = resources.files("medreasoner_train").joinpath("queries", f"{part}.json")
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def plain(query: str) -> str:
    """A question without what `vary` may change: case and the mark at its end."""
    return " ".join(query.lower().rstrip("?.").split())


PARTS = {part: load_phrasings(part) for part in ("train", "heldout")}
FREQUENT = sorted(key for key, own in PARTS["train"].items() if len(own.queries) >= 250)  # the others have 90 at most


def test_there_are_37_frequent_pairs() -> None:
    """The 34 that have 20 samples or more in the grounding set; CT lesion, pituitary tumour and optic cup."""
    assert len(FREQUENT) == 37


def test_both_parts_hold_the_same_pairs() -> None:
    assert PARTS["train"].keys() == PARTS["heldout"].keys()


@pytest.mark.parametrize("key", FREQUENT)
def test_a_frequent_pair_has_120_phrasings_a_fifth_of_them_held_out(key: str) -> None:
    trained, held = ({plain(q) for q in PARTS[part][key].queries} for part in ("train", "heldout"))
    assert len(trained | held) >= 120
    assert 0.2 * len(trained | held) <= len(held) <= 0.25 * len(trained | held)


def test_any_other_pair_has_8_phrasings_and_some_held_out() -> None:
    for key in PARTS["train"].keys() - set(FREQUENT):
        trained, held = ({plain(q) for q in PARTS[part][key].queries} for part in ("train", "heldout"))
        assert len(trained) >= 8, key
        assert 0.15 * len(trained | held) <= len(held) <= 0.3 * len(trained | held), key


def test_no_two_phrasings_are_near_copies_neither_of_a_pair_nor_trained_and_held_out() -> None:
    """Nor is a question held out for MRI a near-copy of one trained on for the same organ in CT."""
    for category, keys in keys_by_category(PARTS["train"]).items():
        asked = [(part, key, query) for part, own in PARTS.items() for key in keys for query in own[key].queries]
        for i, j in near_copies([query for _, _, query in asked]):
            (part, key, one), (other_part, other_key, other) = asked[i], asked[j]
            assert key != other_key, f"{category}: {one!r} and {other!r}"
            assert part == other_part, f"{category}: {one!r} and {other!r}"


def test_no_question_is_both_trained_on_and_held_out() -> None:
    trained, held = (
        {plain(query) for own in load_phrasings(part).values() for query in (*own.queries, *own.named)}
        for part in ("train", "heldout")
    )
    assert not trained & held
    assert not trained & {plain(query) for own in load_phrasings("named").values() for query in own.queries}


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_no_question_is_repeated_for_its_pair(part: str) -> None:
    for key, own in load_phrasings(part).items():
        assert own.queries, key
        assert len({plain(query) for query in own.queries}) == len(own.queries), key


def test_every_pair_has_the_parts_of_a_thought() -> None:
    for key, own in load_phrasings("train").items():
        assert own.identify, key
        assert own.evidence, key


def test_questions_come_from_every_cluster_of_the_file() -> None:
    for key, entry in table("train").items():
        assert len(PARTS["train"][key].queries) == sum(len(cluster) for cluster in entry["queries"].values())


def test_a_varied_question_keeps_its_words_in_order_and_at_least_four() -> None:
    rng = np.random.default_rng(0)
    query = "Which of the organs in this picture pumps blood?"
    seen = {vary(query, rng) for _ in range(300)}
    words = plain(query).split()
    for own in seen:
        kept = plain(own).split()
        assert len(kept) >= 4
        position = iter(words)
        assert all(word in position for word in kept), own  # the words that stay, in their order
    assert {query, query.lower(), query.rstrip("?")} <= seen


def test_short_questions_lose_no_word() -> None:
    rng = np.random.default_rng(0)
    assert {plain(vary("Where is the heart?", rng)) for _ in range(100)} == {"where is the heart"}


@pytest.mark.parametrize(
    "query",
    [
        "Please show the one that is not on the right, but on the other side",
        "It isn't the LEFT, (right) one; both others are without sign instead",
        "Not the spot for reading but the spot that cannot read, on the left-sided film of a patient",
    ],
)
def test_words_that_turn_a_question_are_never_missing(query: str) -> None:
    rng = np.random.default_rng(0)
    turning = {
        "not", "right", "but", "other", "isn't", "left", "(right)", "both", "without", "instead", "cannot", "left-sided"
    }  # fmt: skip
    seen = [vary(query, rng) for _ in range(200)]
    own = [word for word in query.lower().replace(",", "").split() if word in turning]
    assert own
    for varied in seen:
        assert [word for word in varied.lower().replace(",", "").split() if word in turning] == own
    assert any(len(varied.split()) < len(query.split()) for varied in seen)


def test_a_whole_question_loses_no_word() -> None:
    rng = np.random.default_rng(0)
    query = "Please outline the wall of the left ventricle"
    assert {plain(vary(query, rng, whole=True)) for _ in range(100)} == {plain(query)}


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_every_category_is_asked_for_by_name(part: str) -> None:
    names = table("named")["names"]
    assert names.keys() <= {key.partition("/")[2] for key in PARTS["train"]}
    for key, own in PARTS[part].items():
        known = names.get(key.partition("/")[2], {"one": [key.partition("/")[2]]})
        assert own.named
        for query in own.named:
            assert any(name in query for each in known.values() for name in each), query
            assert "{" not in query
    assert "Where is the right lung?" in PARTS["train"]["X-ray/right lung"].named
    assert "Where are the lungs?" in PARTS["train"]["X-ray/lung"].named
    assert {query.split()[-1] for query in load_phrasings("named")["CT/liver"].queries} >= {"liver", "liver."}


def disc(size: int, x: float, y: float, radius: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    rows, columns = np.mgrid[:size, :size] + 0.5
    inside: np.ndarray[Any, np.dtype[np.bool_]] = np.hypot(columns - x * size, rows - y * size) <= radius * size
    return inside


@pytest.mark.parametrize(
    ("x", "y", "radius", "words"),
    [
        (0.2, 0.2, 0.05, "small, upper left of the picture"),
        (0.8, 0.2, 0.05, "small, upper right of the picture"),
        (0.5, 0.8, 0.15, "medium-sized, lower of the picture"),
        (0.2, 0.5, 0.15, "medium-sized, left of the picture"),
        (0.5, 0.5, 0.4, "large, in the middle of the picture"),
    ],
)
def test_place_and_size_agree_with_the_mask(x: float, y: float, radius: float, words: str) -> None:
    assert place_of(disc(100, x, y, radius)) == words


def test_a_mirrored_mask_lies_on_the_other_side() -> None:
    mask = disc(100, 0.2, 0.2, 0.1)
    assert "upper left" in place_of(mask)
    assert "upper right" in place_of(mask[:, ::-1])
    assert "lower left" in place_of(mask[::-1])


def test_a_thought_says_what_is_asked_what_shows_it_and_where() -> None:
    own = Phrasings(queries=("?",), identify=("the heart",), evidence=("a bright pouch",))
    mask = disc(100, 0.8, 0.8, 0.05)
    rng = np.random.default_rng(0)
    assert thought_text(own, mask, rng) == (
        "<think>This asks for the heart. Seen here as a bright pouch; small, lower right of the picture.</think>"
    )
    absent = thought_text(own, None, rng)
    assert absent == "<think>This asks for the heart. Nothing in this picture shows it.</think>"


def test_an_answer_is_json_between_its_tags() -> None:
    text = answer_text(np.array([1.0, 2, 3, 4, 5, 6, 7, 8]))
    assert text.startswith("<answer>")
    assert text.endswith("</answer>")
    body = json.loads(text.removeprefix("<answer>").removesuffix("</answer>"))
    assert body == {"bbox": [1, 2, 3, 4], "points_1": [5, 6], "points_2": [7, 8]}
    assert answer_text(None) == ABSENT
    assert set(json.loads(ABSENT.removeprefix("<answer>").removesuffix("</answer>")).values()) == {None}


def test_the_tokenizer_reads_every_question_and_clause_of_training() -> None:
    own = Phrasings(queries=("Where Is It?",), identify=("the heart",), evidence=("a bright pouch",))
    everything = "\n".join(texts([own]))
    for wanted in ("Where Is It?", "where is it?", "the heart", "a bright pouch", "null", '"points_1": ['):
        assert wanted in everything
