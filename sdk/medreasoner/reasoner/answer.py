"""Writes answers: an optional thought in free text, then the answer by the grammar, or freely to compare."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import BundleError, GenerationError
from medreasoner.ops import AnswerParser, AnswerState, ParsedAnswer
from medreasoner.reasoner.choosing import Choosing
from medreasoner.reasoner.decoder import Step
from medreasoner.reasoner.generate import NOT_FINITE, Choices, Sampler, Sequencer, free_text
from medreasoner.reasoner.grammar import GrammarBook
from medreasoner.reasoner.weights import WeightMatrix
from medreasoner.result import Answer, Thought
from medreasoner.spec import ReasonerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["AnswerWriter", "Opening", "Written"]

_MOST_BEGINNINGS = 64
_FREE_ANSWER_TOKENS = 128  # room for an answer in digits, where no grammar bounds it

States: TypeAlias = NDArray[np.float32]
Writing: TypeAlias = Generator[Thought | Answer | Step | Choosing, States, "Written"]
"""Yields events, steps whose hidden states it is sent, and an answer's choices, which may be made meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the reasoner wrote.

    `values` are x1, y1, x2, y2 and two points x, y in its own numbers, None if absent. Of the tokens of the
    answer `n_forced` had no alternative. `ids` are all tokens after the prompt, those of the thought and of its tags
    too, and `free` says which of them were chosen, where they were drawn; else it is empty.
    """

    values: tuple[float, ...] | None
    thought: str | None
    text: str
    n_thought: int
    n_answer: int
    n_forced: int = 0
    absent_probability: float | None = None
    warnings: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    free: tuple[bool, ...] = ()


class AnswerWriter:
    """The answer format of a bundle, ready to be written on any sequence.

    Raises
    ------
    BundleError
        If the vocabulary lacks the end token, or splits answers in a way that no grammar can follow.
    """

    def __init__(self, spec: ReasonerSpec, tokenizer: "Tokenizer", lm_head: WeightMatrix) -> None:
        self._spec, self._texts = spec, spec.answer
        self._tokenizer, self._lm_head = tokenizer, lm_head
        self._grammars = GrammarBook(tokenizer, spec.answer)
        self._beginnings: dict[tuple[tuple[int, int], str], tuple[AnswerState, list[int], Choices]] = {}
        self._think_open, self._think_close = self._ids(spec.answer.think_open), self._ids(spec.answer.think_close)
        end = tokenizer.token_to_id(spec.answer.end)
        if end is None:
            raise BundleError(f"reasoner.answer.end: {spec.answer.end!r} is not in the vocabulary")
        self.end: int = end

    def prepare(self, limits: tuple[int, int]) -> None:
        """Build the grammar for answers up to these limits now, not at the first query."""
        self._beginning(limits, "")

    def write(
        self, sequencer: Sequencer, pending: list[int], *, limits: tuple[int, int], think: bool, sampler: Sampler | None
    ) -> Writing:
        """Write an answer that is valid by construction.

        Parameters
        ----------
        sequencer
            The sequence, which holds the prompt's prefix.
        pending
            Tokens of the prompt that have not been fed yet.
        limits
            Largest x and y.
        think
            Whether to write a thought first.
        sampler
            Draws the tokens; None: the likeliest.
        """
        thought = yield from self._think(sequencer, pending, sampler, think=think)
        opening, choosing = self._start(sequencer, thought, limits, sampler)
        return (yield from self._finish(sequencer, opening, choosing, sampler))

    def open(
        self, sequencer: Sequencer, pending: list[int], *, limits: tuple[int, int], think: bool, sampler: Sampler | None
    ) -> Generator[Thought | Step, States, "Opening"]:
        """The first part of `write`: up to the first number, or to the answer that there is none."""
        thought = yield from self._think(sequencer, pending, sampler, think=think)
        opening, choosing = self._start(sequencer, thought, limits, sampler)
        yield from choosing.begin()
        return replace(
            opening,
            state=choosing.state,
            ids=opening.ids + choosing.ids,
            free=[*opening.free, *_one_chosen(choosing.ids)],
            hidden=choosing.hidden,
            pending=choosing.pending,
            absent_probability=choosing.absent_probability,
        )

    def _start(
        self, sequencer: Sequencer, thought: "_Thought", limits: tuple[int, int], sampler: Sampler | None
    ) -> "tuple[Opening, Choosing]":
        """An answer of which nothing has been chosen yet."""
        state, ids, choices = self._beginning(limits, thought.rest)
        opening = Opening(thought=thought, state=state, ids=ids, free=[False] * len(ids))
        choosing = Choosing(
            sequencer,
            state.copy(),
            self._lm_head,
            pending=[*thought.pending, *ids],
            sampler=sampler,
            first=choices,
            absent_threshold=self._spec.absent_threshold,
        )
        return opening, choosing

    def _beginning(self, limits: tuple[int, int], written: str) -> tuple[AnswerState, list[int], Choices]:
        """An answer at its first choice, the tokens that led there, and what it may go on with."""
        known = self._beginnings.get((limits, written))
        if known is None:
            state = self._grammars.grammar(max(limits), written=written).start(*limits)
            known = state, state.forced(), Choices(state)
            if len(self._beginnings) >= _MOST_BEGINNINGS:  # images of many sizes
                self._beginnings.clear()
            self._beginnings[limits, written] = known
        return known

    def go_on(self, sequencer: Sequencer, opening: "Opening", sampler: Sampler | None) -> Writing:
        """The rest of `write`; an opening may be gone on with several times."""
        choosing = Choosing(
            sequencer,
            opening.state.copy(),
            self._lm_head,
            hidden=opening.hidden,
            pending=opening.pending,
            sampler=sampler,
        )
        return (yield from self._finish(sequencer, opening, choosing, sampler))

    def _finish(self, sequencer: Sequencer, opening: "Opening", choosing: Choosing, sampler: Sampler | None) -> Writing:
        """Write to the end what began with `opening`."""
        thought, state = opening.thought, choosing.state
        while not choosing.done:
            yield choosing  # whoever runs the decoder may write as far as it can, or leaves it as it is
            if choosing.is_stuck:
                yield from choosing.by_hand()
        sequencer.lap("answer")
        ids = opening.ids + choosing.ids
        probability = choosing.absent_probability if opening.absent_probability is None else opening.absent_probability
        n_chosen = choosing.n_chosen + (probability is not None)
        text = thought.rest + self._text(ids)
        yield Answer(text)
        return Written(
            values=None if state.absent else tuple(map(float, state.values)),
            thought=thought.text,
            text=text,
            n_thought=thought.n_tokens,
            n_answer=len(ids),
            n_forced=len(ids) - n_chosen,
            absent_probability=probability,
            warnings=thought.warnings,
            ids=(*thought.ids, *ids),
            free=() if sampler is None else (*thought.free, *opening.free, *_chosen(opening.state, choosing.ids)),
        )

    def _think(
        self, sequencer: Sequencer, pending: list[int], sampler: Sampler | None, *, think: bool
    ) -> Generator[Thought | Step, States, "_Thought"]:
        if not think:
            return _Thought(text=None, rest="", n_tokens=0, pending=pending)
        limit = self._spec.max_think_tokens
        if limit == 0:
            warning = "this model was not trained to reason in words"
            return _Thought(text=None, rest="", n_tokens=0, pending=pending, warnings=(warning,))
        pieces: list[str] = []

        def tell(piece: str) -> tuple[Thought, ...]:
            pieces.append(piece)
            return (Thought(piece),)

        ids, following, rest = yield from self._free(
            sequencer,
            [*pending, *self._think_open],
            stop=self._texts.think_close,
            limit=limit,
            tell=tell,
            sampler=sampler,
        )
        sequencer.lap("think")
        closing = self._think_close if rest is None else []  # the end token or the limit came first
        cut = len(ids) == limit and rest is None
        return _Thought(
            text="".join(pieces),
            # What came along with the tag's last token is kept if the answer may begin so.
            rest=rest if rest and self._texts.present.startswith(rest) else "",
            n_tokens=len(ids),
            pending=[*following, *closing],
            warnings=(f"the reasoning was cut off after {limit} tokens",) if cut else (),
            ids=(*self._think_open, *ids, *closing),
            free=(*[False] * len(self._think_open), *[True] * len(ids), *[False] * len(closing)),
        )

    def write_raw(
        self, sequencer: Sequencer, pending: list[int], *, think: bool, limit: int, sampler: Sampler
    ) -> Generator[Thought | Answer | Step, States, tuple[list[int], int]]:
        """Draw tokens until the end token or the limit, whatever they say: what training without a grammar needs.

        Returns
        -------
        ids : list of int
            What follows the prompt, the end token too.
        n_opening : int
            How many of them, at the beginning, were not drawn: the tag that the thought or the answer begins with.
        """
        opening = list(self._think_open) if think else self._grammars.opening()
        ids, unfed = opening[:limit], [*pending, *opening]
        while len(ids) < limit:
            states = yield from sequencer.feed(unfed)
            logits = self._lm_head.logits(states[-1])
            if not np.isfinite(logits).all():
                raise GenerationError(NOT_FINITE)
            unfed = [sampler.draw(logits)]
            ids += unfed
            if unfed == [self.end]:
                break
        return ids, min(len(opening), limit)

    def write_freely(
        self, sequencer: Sequencer, pending: list[int], *, limits: tuple[int, int], think: bool, sampler: Sampler | None
    ) -> Writing:
        """Write thought and answer as one free text and read that: what the model does without a grammar.

        Raises
        ------
        GenerationError
            If the text holds no usable answer.
        """
        opening = list(self._think_open) if think else self._grammars.opening()
        stop = self._texts.present.rpartition("}")[2].strip()  # "</answer>"
        parser, told = AnswerParser(), ""
        parser.feed(self._text(opening))

        def tell(piece: str) -> tuple[Thought, ...]:
            nonlocal told
            parser.feed(piece)
            thought = parser.result().thought or ""
            new, told = thought[len(told) :], max(thought, told, key=len)
            return (Thought(new),) if new else ()

        limit = self._spec.max_think_tokens * think + _FREE_ANSWER_TOKENS
        ids, *_ = yield from self._free(
            sequencer, [*pending, *opening], stop=stop, limit=limit, tell=tell, sampler=sampler
        )
        sequencer.lap("answer")
        text = self._text([*opening, *ids])
        whole = AnswerParser()
        whole.feed(text)
        parsed = whole.result()
        values = None if parsed.status == "absent" else _values(parsed, limits)
        if parsed.thought and len(parsed.thought) > len(told):
            yield Thought(parsed.thought[len(told) :])
        yield Answer(text)
        return Written(
            values=values,
            thought=parsed.thought,
            text=text,
            n_thought=0,
            n_answer=len(ids),
            ids=(*opening, *ids),
            free=(*[False] * len(opening), *[True] * len(ids)),
        )

    def _free(
        self,
        sequencer: Sequencer,
        pending: list[int],
        *,
        stop: str,
        limit: int,
        tell: Callable[[str], tuple[Thought, ...]],
        sampler: Sampler | None,
    ) -> Generator[Thought | Step, States, tuple[list[int], list[int], str | None]]:
        return free_text(
            sequencer,
            pending,
            lm_head=self._lm_head,
            tokenizer=self._tokenizer,
            stop=stop,
            end=self.end,
            limit=limit,
            tell=tell,
            sampler=sampler,
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Thought:
    """A thought, what of the answer came along with its end, what to feed next, and its tokens as in `Written`."""

    text: str | None
    rest: str
    n_tokens: int
    pending: list[int]
    warnings: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    free: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """An answer up to its first number: what comes next follows from `hidden`, or once `pending` have been fed."""

    thought: _Thought
    state: AnswerState
    ids: list[int]
    free: list[bool]
    hidden: NDArray[np.float32] | None = None
    pending: list[int] = field(default_factory=list)
    absent_probability: float | None = None

    @property
    def is_absent(self) -> bool:
        """Whether there will be no number."""
        return bool(self.state.absent)


def _chosen(state: AnswerState, ids: list[int]) -> list[bool]:
    """Which tokens of an answer that went on from `state` had an alternative: the grammar is followed once more."""
    state, free = state.copy(), list[bool]()
    while len(free) < len(ids):
        state.accept(ids[len(free)])
        free += [True, *[False] * len(state.forced())]
    return free


def _one_chosen(ids: list[int]) -> list[bool]:
    """A choice with the tokens that it forces; or nothing."""
    return [True, *[False] * (len(ids) - 1)] if ids else []


def _values(parsed: ParsedAnswer, limits: tuple[int, int]) -> tuple[float, ...]:
    """Numbers of a parsed answer, which must be a box of some area on the image and two points."""
    if parsed.status != "ok" or parsed.bbox is None or parsed.points_1 is None or parsed.points_2 is None:
        missing = f" (missing: {', '.join(parsed.missing)})" if parsed.missing else ""
        raise GenerationError(f"the reasoner's text holds no usable answer: {parsed.status}{missing}")
    x1, y1, x2, y2 = parsed.bbox
    if min(x2, limits[0]) <= max(x1, 0) or min(y2, limits[1]) <= max(y1, 0):
        raise GenerationError(f"the reasoner's box {parsed.bbox} has no area on an image of {limits[0]} x {limits[1]}")
    return (*parsed.bbox, *parsed.points_1, *parsed.points_2)
