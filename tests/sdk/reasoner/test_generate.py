"""Choices at the grammar's forks, and free text up to its end, on scripted models."""

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medreasoner.errors import GenerationError
from medreasoner.ops import AnswerGrammar
from medreasoner.reasoner.generate import Choices, choose, free_text, held_back
from medreasoner.reasoner.weights import WeightMatrix

GRAMMAR = AnswerGrammar(
    literals=[[1, 2], *[[3]] * 7, [4]], numbers=[[10 + value] for value in range(11)], absent=[1, 5, 6]
)


def head(logits: Mapping[int, float]) -> WeightMatrix:
    values = np.full((32, 1), -9.0, np.float32)
    for token, logit in logits.items():
        values[token] = logit
    return WeightMatrix(values=values, dtype="float32")


HIDDEN = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("present", "absent", "threshold", "expected"),
    [
        (0.0, 0.1, None, 5),
        (0.1, 0.0, None, 2),
        (0.0, 0.0, 0.5, 2),  # 0.5 is not above the threshold
        (0.0, 0.1, 0.5, 5),
        (0.0, 2.0, 0.9, 2),  # P = 0.88
        (0.0, 2.3, 0.9, 5),  # P = 0.909
        (2.0, 0.0, 0.1, 5),  # P = 0.119
        (90.0, 0.0, 0.0, 5),  # no probability is 0 in exact numbers; here it is e^-90
    ],
)
def test_absence_is_decided_by_its_probability(
    present: float, absent: float, threshold: float | None, expected: int
) -> None:
    state = GRAMMAR.start(10, 10)
    state.forced()
    assert state.at_absent_choice
    assert choose(state, HIDDEN, head({2: present, 5: absent}), threshold)[0] == expected


def test_the_threshold_holds_only_where_absence_can_be_chosen() -> None:
    state = GRAMMAR.start(10, 10)
    state.forced()
    state.accept(2)
    state.forced()
    assert choose(state, HIDDEN, head({13: 3.0, 5: 50.0}), 0.0)[0] == 13


def test_what_follows_a_present_target_is_known_at_the_choice_and_nowhere_else() -> None:
    state = GRAMMAR.start(10, 10)
    assert Choices(state).if_present == []
    state.forced()
    guess = Choices(state).if_present
    assert state.at_absent_choice  # asking moved nothing
    assert guess[0] == 2
    state.accept(guess[0])
    assert state.forced() == guess[1:]
    assert not state.absent
    assert Choices(state).if_present == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    state = GRAMMAR.start(10, 10)
    state.forced()
    with pytest.raises(GenerationError, match="not finite"):
        choose(state, HIDDEN, head({2: bad, 5: 0.0}), None)


@given(st.text("</think>ab", max_size=20))
def test_no_piece_of_a_stop_text_is_given_away(text: str) -> None:
    stop = "</think>"
    if stop in text:
        return
    safe = text[: len(text) - held_back(text, stop)]
    rest = text[len(safe) :]
    # Whatever comes next, a stop text that ends there begins after what was given.
    assert all((text + more).find(stop) in range(len(safe), len(text) + 9) for more in (stop[len(rest) :], stop))


def test_a_character_that_is_not_whole_is_held_back() -> None:
    assert held_back("caf\N{REPLACEMENT CHARACTER}", "</think>") == 1
    assert held_back("", "</think>") == 0


class Recorder:
    """A sequence whose model wants to write a script; keeps what it is fed."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.fed = script, list[int]()
        self.n_runs = 0

    def feed(self, ids: list[int]) -> Generator[None, None, NDArray[np.float32]]:
        yield  # for the decoder
        self.fed += ids
        self.n_runs += 1
        states = np.zeros((len(ids), 16), np.float32)
        states[-1, self.script[self.n_runs - 1]] = 1
        return states

    def lap(self, _: str) -> None: ...


class Letters:
    """Token 1 is "a", 2 is "b", and so on."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join("-abcdefghijklmno"[token] for token in ids)


@pytest.mark.parametrize(
    ("script", "limit", "expected"),
    [
        ([1, 2, 3], 9, ([1, 2, 3], [3], "")),  # "c" stops: generated, not fed
        ([1, 2, 15], 9, ([1, 2], [], None)),  # the end token comes of feeding "b"
        ([15], 9, ([], [], None)),
        ([1, 2, 4, 5], 3, ([1, 2, 4], [4], None)),  # the limit
    ],
)
def test_every_token_of_a_free_text_is_fed_once(
    script: list[int], limit: int, expected: tuple[list[int], list[int], str | None]
) -> None:
    sequence = Recorder(script)
    lm_head = WeightMatrix(values=np.eye(16, dtype=np.float32), dtype="float32")
    stream: Any = free_text(
        sequence,  # type: ignore[arg-type]
        [7, 8],
        lm_head=lm_head,
        tokenizer=Letters(),  # type: ignore[arg-type]
        stop="c",
        end=15,
        limit=limit,
        tell=lambda piece: (piece,),
    )
    text = ""
    while True:
        try:
            text += next(stream) or ""
        except StopIteration as stop:
            ids, unfed, rest = stop.value
            break
    assert (ids, unfed, rest) == expected
    assert sequence.fed == [7, 8, *ids[: len(ids) - len(unfed)]]
    assert text == Letters().decode(ids).partition("c")[0]
