"""The numbers of an answer: written in one go where a kernel runs the decoder, or choice by choice."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.reasoner.generate import Choices, Sampler, Sequencer, choose
from medreasoner.reasoner.weights import WeightMatrix

if TYPE_CHECKING:
    from medreasoner.reasoner.decoder import Step

__all__ = ["Choosing", "write_together"]

_SHARES = 32  # draws that are made ahead: more than an answer has choices


class Choosing:
    """An answer under way, which nothing but the grammar and the language head takes part in.

    Parameters
    ----------
    sequencer
        Its sequence.
    state
        Its place in the grammar: at a choice, or at one once `pending` have been fed.
    lm_head
        The language head.
    hidden
        (hidden_dim,) float32 of the last token, where a choice comes next; else None.
    pending
        Tokens to feed first, where there is no `hidden`.
    sampler
        Draws the tokens; None: the likeliest.
    first
        What is known of the first choice; None: that it has been made.
    absent_threshold
        See `Choices.choose`.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        state: ops.AnswerState,
        lm_head: WeightMatrix,
        *,
        hidden: NDArray[np.float32] | None = None,
        pending: list[int],
        sampler: Sampler | None,
        first: Choices | None = None,
        absent_threshold: float | None = None,
    ) -> None:
        self._sequencer, self._lm_head, self._sampler = sequencer, lm_head, sampler
        self._ahead = [] if first is None else first.if_present
        self._first = first if first is not None and first.decides_absent else None
        self._threshold = absent_threshold
        self.state = state
        self.hidden = hidden
        self.pending = [*pending, *self._ahead]
        self.ids: list[int] = []
        """What was written."""
        self.n_chosen = 0
        """Of them those that had an alternative, but for the choice of absent."""
        self.absent_probability: float | None = None
        self.is_stuck = False
        """The kernel could not go on: the next choice must be made by hand, which says why."""

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self.state.done

    def goes_whole(self, limit: int) -> bool:
        """Whether the kernel can write it, without running more than `limit` tokens of it at once."""
        if self._sequencer.sequence is None or self.is_stuck or len(self.pending) > limit:
            return False
        return self._first is None or self._sampler is None or not self._sampler.draws_absent

    def begin(self) -> "Generator[Step, NDArray[np.float32], None]":
        """Feed what is pending, and decide about absent if that comes next.

        Raises
        ------
        GenerationError
            If the logits are not finite.
        """
        ahead, first = self._ahead, self._first
        self._ahead, self._first = [], None
        if self.hidden is None:
            states = yield from self._sequencer.feed(self.pending, len(ahead) + 1)
            if self._sequencer.n_runs == 1:
                self._sequencer.lap("prefill")
            self.hidden, self.pending = states[0], []
        if first is None:
            return
        token, self.absent_probability = first.choose(self.hidden, self._lm_head, self._threshold, self._sampler)
        self._accept(token)
        if self.pending == ahead:  # fed already
            self.hidden, self.pending = states[-1], []

    def by_hand(self) -> "Generator[Step, NDArray[np.float32], None]":
        """Feed what is pending and make one choice.

        Raises
        ------
        GenerationError
            If the logits are not finite.
        """
        self.is_stuck = False
        was_first = self._first is not None
        if was_first or self.hidden is None:
            yield from self.begin()
        if was_first or self.hidden is None:
            return
        token, _ = choose(self.state, self.hidden, self._lm_head, None, self._sampler)
        self._accept(token)
        self.n_chosen += 1

    def _accept(self, token: int) -> None:
        self.state.accept(token)
        self.pending, self.hidden = [token, *self.state.forced()], None  # those behind it ride along in one run
        self.ids += self.pending

    def writing(self) -> ops.AnswerWriting:
        """The same for the kernel."""
        sequence, sampler = self._sequencer.sequence, self._sampler
        assert sequence is not None
        if self._sequencer.n_runs == 0:
            self._sequencer.lap("prefill")
        return ops.AnswerWriting(
            self.state,
            sequence,
            self._sequencer.n_tokens,
            self._sequencer.next_position,
            self.hidden,
            [] if self.hidden is not None else self.pending,
            0.0 if sampler is None else sampler.temperature,
            [] if sampler is None else sampler.ahead(_SHARES),
            self._first is not None,
            self._threshold,
            self._ahead,
        )

    def settle(self, writing: ops.AnswerWriting) -> None:
        """Take over what the kernel wrote."""
        is_opened = self._sequencer.n_runs == 0 and writing.n_runs > 0
        self.ids += writing.written
        self.n_chosen += writing.n_chosen
        self.hidden, self.pending, self._ahead = writing.hidden, writing.pending, writing.ahead
        if writing.absent_share is not None:
            self.absent_probability, self._first = writing.absent_share, None
        self._sequencer.advance(writing.past, writing.position, writing.n_runs)
        if self._sampler is not None:
            self._sampler.skip(writing.n_chosen)
        self.is_stuck = writing.is_stuck
        if is_opened:
            self._sequencer.lap("answer")
            self._sequencer.move("answer", "prefill", 1e3 * writing.seconds_to_hidden)

    def write(
        self, others: "Sequence[Choosing]", interrupt: ops.Interrupt, seconds: float | None, n_threads: int
    ) -> None:
        """See `write_together`."""
        writings = [each.writing() for each in (self, *others)]
        embedding, head = self._sequencer.embedding, self._lm_head
        cos, sin = self._sequencer.tables
        ops.write_answers(
            writings,
            (embedding.values, embedding.dtype),
            (head.values, head.dtype),
            cos,
            sin,
            interrupt,
            seconds,
            n_threads=n_threads,
        )
        for each, writing in zip((self, *others), writings, strict=True):
            each.settle(writing)


def write_together(
    answers: Sequence[Choosing], interrupt: ops.Interrupt, seconds: float | None, *, n_threads: int = 1
) -> None:
    """Write answers of one model until one is done, or what is set or over makes it stop between two steps.

    Parameters
    ----------
    answers
        At least one, all of which `goes_whole`.
    interrupt
        Set where something else waits.
    seconds
        How long to go on at most; None: to the end.
    n_threads
        That may share the answers.
    """
    first, *others = answers
    first.write(others, interrupt, seconds, n_threads)
