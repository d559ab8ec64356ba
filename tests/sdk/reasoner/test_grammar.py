"""The grammar follows the tokenizer: whatever it writes is the canonical tokenisation of a valid answer."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from medreasoner.errors import BundleError
from medreasoner.reasoner.grammar import GrammarBook, answer_text
from medreasoner.spec import BundleSpec

MERGES = [('"', ":"), ("]", ","), ("Ġ", "["), ("}", "<"), ("Ġ", '"'), ("],", 'Ġ"'), ("n", "u"), ("nu", "l")]
KINDS: dict[str, dict[str, Any]] = {
    "a token for each integer": {"integers": 253, "merges": MERGES},
    "digits": {"merges": MERGES},
    "digits, and tags of several tokens": {"merges": MERGES, "think": False},
}


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def tokenizer(request: pytest.FixtureRequest, toy_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return toy_tokenizer(**request.param)


def walk(book: GrammarBook, width: int, height: int, pick: Callable[[list[int]], int]) -> tuple[list[int], list[int]]:
    state = book.grammar(max(width, height)).start(width, height)
    ids = list(state.forced())
    while not state.done:
        token = pick(state.allowed().tolist())
        state.accept(token)
        ids += [token, *state.forced()]
    return ids, state.values


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.integers(1, 252), st.integers(1, 252), st.randoms(use_true_random=False))
def test_a_random_walk_is_the_canonical_form_of_a_valid_answer(
    spec: BundleSpec, tokenizer: Tokenizer, width: int, height: int, random: random.Random
) -> None:
    ids, values = walk(GrammarBook(tokenizer, spec.reasoner.answer), width, height, random.choice)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    answer = json.loads(text.removeprefix("<answer>").removesuffix("</answer>"))
    if answer["bbox"] is None:
        assert text == spec.reasoner.answer.absent
        return
    assert [*answer["bbox"], *answer["points_1"], *answer["points_2"]] == values
    x1, y1, x2, y2, *points = values
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    assert all(0 <= x <= width for x in points[::2])
    assert all(0 <= y <= height for y in points[1::2])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.data())
def test_every_valid_answer_can_be_written(spec: BundleSpec, tokenizer: Tokenizer, data: st.DataObject) -> None:
    x1, y1 = data.draw(st.integers(0, 251)), data.draw(st.integers(0, 199))
    x2, y2 = data.draw(st.integers(x1 + 1, 252)), data.draw(st.integers(y1 + 1, 200))
    points = [data.draw(st.integers(0, limit)) for limit in (252, 200, 252, 200)]
    values = [x1, y1, x2, y2, *points]
    text = answer_text(spec.reasoner.answer.present, values)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    state = GrammarBook(tokenizer, spec.reasoner.answer).grammar(252).start(252, 200)
    at = 0
    while not state.done:
        forced = state.forced()
        assert ids[at : at + len(forced)] == forced
        at += len(forced)
        if not state.done:
            state.accept(ids[at])
            at += 1
    assert at == len(ids)
    assert state.values == values


def test_with_a_token_for_each_integer_an_answer_is_nine_choices(
    spec: BundleSpec, toy_tokenizer: Callable[..., Tokenizer]
) -> None:
    n_choices = 0

    def middle(allowed: list[int]) -> int:
        nonlocal n_choices
        n_choices += 1
        return allowed[0] if len(allowed) == 2 else allowed[len(allowed) // 2]

    book = GrammarBook(toy_tokenizer(**KINDS["a token for each integer"]), spec.reasoner.answer)
    walk(book, 252, 252, middle)
    assert n_choices <= 9


def test_without_an_absent_text_absence_cannot_be_written(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    answer = replace(spec.reasoner.answer, absent=None)
    ids, values = walk(GrammarBook(tokenizer, answer), 100, 100, lambda allowed: allowed[-1])
    assert len(values) == 8
    assert "null" not in tokenizer.decode(ids, skip_special_tokens=False)


def test_what_was_written_already_is_not_written_again(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    book = GrammarBook(tokenizer, spec.reasoner.answer)
    state = book.grammar(100, written="<").start(100, 100)
    text = tokenizer.decode(state.forced(), skip_special_tokens=False)
    assert text.startswith("answer>")


def test_the_opening_is_the_first_tag(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    opening = GrammarBook(tokenizer, spec.reasoner.answer).opening()
    assert tokenizer.decode(opening, skip_special_tokens=False) == "<answer>"


def test_the_opening_is_one_token_where_that_reaches_beyond_the_tag(
    spec: BundleSpec, toy_tokenizer: Callable[..., Tokenizer]
) -> None:
    tokenizer = toy_tokenizer()
    whole = '<answer>{"bbox": '
    tokenizer.add_tokens([AddedToken(whole, normalized=False)])
    assert GrammarBook(tokenizer, spec.reasoner.answer).opening() == [tokenizer.token_to_id(whole)]


def test_a_larger_limit_makes_a_larger_grammar(spec: BundleSpec, toy_tokenizer: Callable[..., Tokenizer]) -> None:
    book = GrammarBook(toy_tokenizer(), spec.reasoner.answer)
    small = book.grammar(10)
    assert book.grammar(200) is small
    large = book.grammar(1000)
    assert large is not small
    assert book.grammar(10) is large
    large.start(1000, 1000)


def test_a_tokenizer_that_glues_numbers_to_text_is_refused(
    spec: BundleSpec, toy_tokenizer: Callable[..., Tokenizer]
) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["[7"])
    with pytest.raises(BundleError, match="a token holds both a number and text"):
        GrammarBook(tokenizer, spec.reasoner.answer).grammar(100)


def test_a_tokenizer_that_splits_a_number_by_its_place_is_refused(
    spec: BundleSpec, toy_tokenizer: Callable[..., Tokenizer]
) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([AddedToken("88", single_word=False, rstrip=True, normalized=False)])
    answer = replace(spec.reasoner.answer, present=spec.reasoner.answer.present.replace("{y1},", "{y1} ,"))
    book = GrammarBook(tokenizer, answer)
    with pytest.raises(BundleError, match=r"reasoner\.answer"):
        book.grammar(100)
