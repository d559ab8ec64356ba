import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreasoner import ops

many = settings(deadline=None, max_examples=25)
LIMIT = 3

# One token a number, as nano; and binary digits, where "1" is a number and the start of others, as Qwen's digits are.
SINGLE = [[100 + value] for value in range(LIMIT + 1)]
DIGITS = [[200 + int(digit) for digit in f"{value:b}"] for value in range(LIMIT + 1)]
LITERALS = [[1, 2, 3], [10], [10], [10], [4, 5], [10], [4, 6], [10], [7, 8]]
ABSENT_FORKS = {
    "none": None,
    "in the literal": [1, 2, 9, 9],
    "at the number": [1, 2, 3, 9],
    "at the start": [9],
}


@functools.cache
def all_values(width, height):
    xs, ys = range(width + 1), range(height + 1)
    every = itertools.product(xs, ys, xs, ys, xs, ys, xs, ys)
    return [values for values in every if values[0] < values[2] and values[1] < values[3]]


def all_answers(literals, numbers, absent, width, height):
    """Every valid answer as (tokens, values): the language itself, without an automaton."""
    answers = [(tuple(absent), ())] if absent else []
    for values in all_values(width, height):
        tokens = list(literals[0])
        for value, literal in zip(values, literals[1:], strict=True):
            tokens += numbers[value] + literal
        answers.append((tuple(tokens), values))
    return answers


class BruteForce:
    """The answers that still fit what was accepted."""

    def __init__(self, answers):
        self.answers, self.at = answers, 0

    @property
    def allowed(self):
        return sorted({tokens[self.at] for tokens, _ in self.answers if len(tokens) > self.at})

    def accept(self, token):
        self.answers = [answer for answer in self.answers if answer[0][self.at : self.at + 1] == (token,)]
        self.at += 1


@pytest.mark.parametrize("absent", ABSENT_FORKS.values(), ids=ABSENT_FORKS)
@pytest.mark.parametrize("numbers", [SINGLE, DIGITS], ids=["one token", "digits"])
@pytest.mark.parametrize("literals", [LITERALS, [[], *LITERALS[1:]]], ids=["opening", "no opening"])
@many
@given(size=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]), data=st.data())
def test_every_walk_allows_and_forces_what_the_whole_language_does(literals, numbers, absent, size, data):
    if not literals[0] and absent:
        absent = [9, 9]
    oracle = BruteForce(all_answers(literals, numbers, absent, *size))
    state = ops.AnswerGrammar(literals, numbers, absent).start(*size)
    while not state.done:
        assert state.allowed().tolist() == oracle.allowed
        before = state.copy()
        forced = state.forced()
        for token in forced:
            assert oracle.allowed == [token]
            oracle.accept(token)
            before.accept(token)
        assert before.allowed().tolist() == state.allowed().tolist()
        if state.done:
            break
        assert len(oracle.allowed) > 1
        assert state.at_absent_choice == (absent is not None and oracle.at == fork(literals[0], absent))
        token = data.draw(st.sampled_from(oracle.allowed))
        state.accept(token)
        oracle.accept(token)
    assert oracle.allowed == []
    [(_, values)] = oracle.answers
    assert tuple(state.values) == values
    assert state.absent == (values == ())
    assert state.allowed().size == 0
    assert state.forced() == []


def fork(literal, absent):
    return next((i for i, (a, b) in enumerate(zip(literal, absent, strict=False)) if a != b), len(literal))


# A tokenizer of characters and the answer's real text, so that walks can be read back by the parser.
TEXT = ['<answer>{"bbox": [', ", ", ", ", ", ", '], "points_1": [', ", ", '], "points_2": [', ", ", "]}</answer>"]
NULLS = '<answer>{"bbox": null, "points_1": null, "points_2": null}</answer>'


def characters(text):
    return [ord(character) for character in text]


@many
@given(width=st.integers(1, 120), height=st.integers(1, 120), data=st.data())
def test_every_walk_reads_back_as_a_valid_answer(width, height, data):
    grammar = ops.AnswerGrammar(
        [characters(text) for text in TEXT], [characters(str(v)) for v in range(121)], characters(NULLS)
    )
    state, tokens = grammar.start(width, height), []
    while not state.done:
        tokens += state.forced()
        if not state.done:
            tokens.append(data.draw(st.sampled_from(state.allowed().tolist())))
            state.accept(tokens[-1])
    parser = ops.AnswerParser()
    parser.feed("".join(map(chr, tokens)))
    parsed = parser.result()
    assert parsed.absent == state.absent
    if not parsed.absent:
        assert parsed.status == "ok"
        x1, y1, x2, y2 = parsed.bbox
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        for x, y in (parsed.points_1, parsed.points_2):
            assert 0 <= x <= width
            assert 0 <= y <= height
        assert [*parsed.bbox, *parsed.points_1, *parsed.points_2] == state.values


def test_a_choice_without_alternative_is_forced_across_numbers():
    state = ops.AnswerGrammar(LITERALS, SINGLE, None).start(1, 1)
    # On an image of one pixel the box is known before any token.
    assert state.forced() == [1, 2, 3, 100, 10, 100, 10, 101, 10, 101, 4, 5]
    assert state.values == [0, 0, 1, 1]
    assert state.allowed().tolist() == [100, 101]


def test_a_copy_goes_its_own_way():
    state = ops.AnswerGrammar(LITERALS, SINGLE, None).start(3, 3)
    state.forced()
    other = state.copy()
    state.accept(101)
    assert state.forced() == [10]
    assert other.values == []
    assert other.allowed().tolist() == [100, 101, 102]


def test_a_state_outlives_its_grammar():
    grammar = ops.AnswerGrammar(LITERALS, SINGLE, None)
    state = grammar.start(3, 3)
    del grammar
    assert state.forced() == [1, 2, 3]


@pytest.mark.parametrize("token", [-1, 0, 2, 100, 2**31 - 1])
def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(token):
    state = ops.AnswerGrammar(LITERALS, SINGLE, None).start(3, 3)
    with pytest.raises(ValueError, match="does not allow token"):
        state.accept(token)
    assert state.allowed().tolist() == [1]


def test_nothing_is_accepted_after_the_end():
    state = ops.AnswerGrammar(LITERALS, SINGLE, [9]).start(3, 3)
    state.accept(9)
    assert state.done
    with pytest.raises(ValueError, match="does not allow"):
        state.accept(9)


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (-1, 1), (LIMIT + 1, 1), (1, LIMIT + 1)])
def test_a_size_without_an_answer_is_refused(size):
    with pytest.raises(ValueError, match="width and height"):
        ops.AnswerGrammar(LITERALS, SINGLE, None).start(*size)


@pytest.mark.parametrize(
    ("literals", "numbers", "absent"),
    [
        pytest.param(LITERALS[:-1], SINGLE, None, id="eight literals"),
        pytest.param([*LITERALS[:4], [], *LITERALS[5:]], SINGLE, None, id="empty literal"),
        pytest.param([*LITERALS[:8], []], SINGLE, None, id="empty end"),
        pytest.param(LITERALS, [], None, id="no numbers"),
        pytest.param(LITERALS, [[100], []], None, id="number without tokens"),
        pytest.param(LITERALS, [[100], [100]], None, id="equal numbers"),
        pytest.param([[1], [201], *LITERALS[2:]], DIGITS, None, id="literal goes on like a number"),
        pytest.param(LITERALS, SINGLE, [1, 2, 3], id="absent starts every answer"),
        pytest.param(LITERALS, SINGLE, [], id="absent without tokens"),
        pytest.param(LITERALS, SINGLE, [1, 2, 3, 100], id="absent goes on like a number"),
    ],
)
def test_an_ambiguous_grammar_is_refused(literals, numbers, absent):
    with pytest.raises(ValueError, match=r"\w"):
        ops.AnswerGrammar(literals, numbers, absent)
