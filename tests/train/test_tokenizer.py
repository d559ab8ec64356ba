"""Every coordinate is one token, and no text is lost."""

import re
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies
from tokenizers import Tokenizer

from medreasoner.errors import BundleError
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_train.language import ABSENT, PRESENT, TEMPLATE, fixed_texts
from medreasoner_train.tokenizer import SPECIAL_TOKENS, add_wholes, token_id, train_tokenizer
from medreasoner_train.vocabulary import Vocabulary

TEXTS = ["Where is the heart? null [ ], ", ABSENT, PRESENT.replace("{{", "{")] * 3
NAMES = ("x1", "y1", "x2", "y2", "p1x", "p1y", "p2x", "p2y")

numbers = strategies.lists(strategies.integers(0, 252), min_size=8, max_size=8)


def test_every_integer_is_one_token_wherever_it_stands(tokenizer: Tokenizer) -> None:
    for value in range(253):
        own = token_id(tokenizer, str(value))
        assert tokenizer.encode(str(value)).ids == [own]
        for context in (f"[{value}]", f", {value}, ", f'"bbox": [{value}, '):
            assert tokenizer.encode(context).ids.count(own) == 1, context
            assert tokenizer.decode(tokenizer.encode(context).ids, skip_special_tokens=False) == context


@hypothesis.given(values=numbers)
def test_an_answer_is_eight_coordinates_between_spans_that_never_change(
    values: list[int], tokenizer: Tokenizer
) -> None:
    text = PRESENT.format(**dict(zip(NAMES, values, strict=True)))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    spans = [tokenizer.encode(part).ids for part in PRESENT.format(**dict.fromkeys(NAMES, "#")).split("#")]
    joined = list(spans[0])
    for value, span in zip(values, spans[1:], strict=True):
        joined += [token_id(tokenizer, str(value)), *span]
    assert ids == joined


def test_the_two_answers_part_at_one_token(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    present = tokenizer.encode(PRESENT.format(**dict.fromkeys(NAMES, 1))).ids
    absent = tokenizer.encode(ABSENT).ids
    at = next(i for i, (a, b) in enumerate(zip(present, absent, strict=False)) if a != b)
    assert (present[at], absent[at]) == (vocabulary.bracket, vocabulary.null)
    assert tokenizer.decode(absent, skip_special_tokens=False) == ABSENT


def test_what_every_answer_has_is_one_token_each(tokenizer: Tokenizer) -> None:
    for text in fixed_texts():
        assert len(tokenizer.encode(text).ids) == 1, text
    assert (
        len(tokenizer.encode(PRESENT.format(**dict.fromkeys(NAMES, 7))).ids) == 18
    )  # eight numbers, the others between
    assert len(tokenizer.encode(ABSENT).ids) == 2
    assert tokenizer.encode(TEMPLATE).tokens[-1].endswith("assistant\n")


def test_wholes_come_behind_all_other_tokens_and_only_once() -> None:
    plain = train_tokenizer(iter(TEXTS), vocab_size=600, largest=252)
    before = plain.get_vocab()
    new = add_wholes(plain, fixed_texts())
    assert {ABSENT[ABSENT.index("null") :], '], "points_2": ['} <= set(new)
    assert sorted(token_id(plain, text) for text in new) == list(range(len(before), len(before) + len(new)))
    assert {name: plain.token_to_id(name) for name in before} == before
    assert add_wholes(plain, fixed_texts()) == []


def test_a_tokenizer_whose_answers_part_before_the_bracket_is_refused() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), vocab_size=600, largest=99)
    Vocabulary(tokenizer, 99)
    tokenizer.add_tokens(['bbox": n'])
    with pytest.raises(BundleError, match="does not tell an absent answer"):
        Vocabulary(tokenizer, 99)


@hypothesis.given(text=strategies.text(max_size=80))
def test_any_text_comes_back(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_and_the_prompt_holds_those_of_qwen(tokenizer: Tokenizer) -> None:
    for name in SPECIAL_TOKENS:
        assert tokenizer.encode(name).ids == [tokenizer.token_to_id(name)]
    text = TEMPLATE.format(image="<|image_pad|>", query="Where?")
    assert re.findall(r"<\|\w+\|>", "".join(tokenizer.encode(text).tokens)) == re.findall(r"<\|\w+\|>", text)


def test_the_same_text_gives_the_same_tokenizer() -> None:
    first, second = (train_tokenizer(iter(TEXTS), vocab_size=600, largest=99).to_str() for _ in range(2))
    assert first == second


def test_the_vocabulary_keeps_its_bound(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= 4096
    assert train_tokenizer(iter(TEXTS), vocab_size=600, largest=99).get_vocab_size() <= 600


def test_values_and_ids_of_numbers_undo_each_other(vocabulary: Vocabulary) -> None:
    assert vocabulary.value[vocabulary.numbers].tolist() == list(range(253))
    assert int((vocabulary.value >= 0).sum()) == 253


def test_a_word_that_the_vocabulary_lacks_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match="xyzzyplugh"):
        token_id(tokenizer, "xyzzyplugh")


def test_a_tokenizer_comes_back_from_its_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert load_tokenizer(str(path)).to_str() == tokenizer.to_str()


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=r"broken\.json"):
        load_tokenizer(str(path))
