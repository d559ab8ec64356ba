"""The numbers of an answer: written in one go where a kernel runs the decoder, or choice by choice."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.reasoner.generate import Sampler, Sequencer, choose
from medreasoner.reasoner.weights import WeightMatrix

if TYPE_CHECKING:
    from medreasoner.reasoner.decoder import Step

__all__ = ["Choosing", "write_together"]

_SHARES = 32  # draws that are made ahead: more than an answer has choices


class Choosing:
    """An answer under way at its choices, which nothing but the grammar and the language head takes part in.

    Parameters
    ----------
    sequencer
        Its sequence.
    state
        Its place in the grammar, past the choice of absent.
    lm_head
        The language head.
    hidden
        (hidden_dim,) float32 of the last token, where a choice comes next; else None.
    pending
        Tokens to feed first, where there is no `hidden`.
    sampler
        Draws the tokens; None: the likeliest.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        state: ops.AnswerState,
        lm_head: WeightMatrix,
        *,
        hidden: NDArray[np.float32] | None,
        pending: list[int],
        sampler: Sampler | None,
    ) -> None:
        self._sequencer, self._state, self._lm_head, self._sampler = sequencer, state, lm_head, sampler
        self._hidden, self._pending = hidden, pending
        self.ids: list[int] = []
        """What was written."""
        self.n_chosen = 0
        """Of them those that had an alternative."""
        self.is_stuck = False
        """The kernel could not go on: the next choice must be made by hand, which says why."""

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self._state.done

    @property
    def goes_whole(self) -> bool:
        """Whether the kernel can write it."""
        return self._sequencer.sequence is not None and not self.is_stuck

    def by_hand(self) -> "Generator[Step, NDArray[np.float32], None]":
        """Feed what is pending and make one choice.

        Raises
        ------
        GenerationError
            If the logits are not finite.
        """
        self.is_stuck = False
        if self._hidden is None:
            self._hidden = (yield from self._sequencer.feed(self._pending))[-1]
        token, _ = choose(self._state, self._hidden, self._lm_head, None, self._sampler)
        self._state.accept(token)
        self._pending, self._hidden = [token, *self._state.forced()], None  # those behind it ride along in one run
        self.ids += self._pending
        self.n_chosen += 1

    def writing(self) -> ops.AnswerWriting:
        """The same for the kernel."""
        sequence, sampler = self._sequencer.sequence, self._sampler
        assert sequence is not None
        return ops.AnswerWriting(
            self._state,
            sequence,
            self._sequencer.n_tokens,
            self._sequencer.next_position,
            self._hidden,
            [] if self._hidden is not None else self._pending,
            0.0 if sampler is None else sampler.temperature,
            [] if sampler is None else sampler.ahead(_SHARES),
        )

    def settle(self, writing: ops.AnswerWriting) -> None:
        """Take over what the kernel wrote."""
        self.ids += writing.written
        self.n_chosen += writing.n_chosen
        self._hidden, self._pending = writing.hidden, writing.pending
        self._sequencer.advance(writing.past, writing.position, writing.n_runs)
        if self._sampler is not None:
            self._sampler.skip(writing.n_chosen)
        self.is_stuck = writing.is_stuck

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
