"""From a prompt to an answer: free text under greedy decoding, then the grammar's choices."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.errors import ArrayError, GenerationError
from medreasoner.ops import AnswerState, DecoderSequence
from medreasoner.reasoner.decoder import Decoder, KvCache, Step
from medreasoner.reasoner.weights import LanguageHead, WeightMatrix
from medreasoner.timing import Stopwatch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Choices", "Feeding", "Sampler", "Sequencer", "choose", "free_text", "held_back"]

States: TypeAlias = NDArray[np.float32]
E = TypeVar("E")
Feeding: TypeAlias = Generator[Step, States, States]

NOT_FINITE = "the decoder returned logits that are not finite; the model or its precision is at fault"


class Sequencer:
    """One sequence under way: makes steps for the decoder, and counts what they took.

    Parameters
    ----------
    decoder, embedding, cache
        What it runs on; the cache already holds the prefix.
    next_position
        Position of the first token that is fed.
    """

    def __init__(self, decoder: Decoder, embedding: WeightMatrix, cache: KvCache, next_position: int) -> None:
        self._decoder, self._cache = decoder, cache
        self.embedding = embedding
        self.next_position = next_position
        self.n_runs = 0
        self.timings_ms: dict[str, float] = {}
        self._watch = Stopwatch()

    def feed(self, ids: Sequence[int], n_out: int = 1) -> Feeding:
        """Yields the step of text tokens, is sent the last hidden states (n_out, hidden_dim), and returns them."""
        embeds = self.embedding.embed(np.array(ids, np.int64))
        states = yield self._decoder.text_step(self._cache, embeds, self.next_position, n_out)
        self.next_position += len(ids)
        self.n_runs += 1
        return states

    @property
    def sequence(self) -> DecoderSequence | None:
        """What a kernel runs, if there is one."""
        return self._cache.sequence

    @property
    def n_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self._cache.length

    @property
    def tables(self) -> tuple[States, States]:
        """Cosines and sines of text by position."""
        return self._decoder.text_tables

    def advance(self, n_tokens: int, next_position: int, n_runs: int) -> None:
        """Take note of runs that were made without `feed`."""
        self._cache.length, self.next_position = n_tokens, next_position
        self.n_runs += n_runs

    def lap(self, stage: str) -> None:
        """Book the time since the last lap to a stage."""
        self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + self._watch.lap()

    def move(self, source: str, stage: str, milliseconds: float) -> None:
        """Book some of a stage's time to another one."""
        self.timings_ms[source] -= milliseconds
        self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + milliseconds


class Sampler:
    """Draws tokens from what the model gives them, reproducibly: each sequence has numbers of its own.

    Parameters
    ----------
    temperature
        Logits are divided by it; above 0.
    seed, index
        Of the draws, and of the sequence among those of one question.
    draws_absent
        Whether it also draws if the target is there at all; else the threshold decides that.
    """

    def __init__(self, temperature: float, seed: int, index: int, *, draws_absent: bool = False) -> None:
        self.temperature, self.draws_absent = temperature, draws_absent
        self._random = np.random.Generator(np.random.PCG64([seed, index]))
        self._shares: list[float] = []

    def draw(self, logits: NDArray[np.float32]) -> int:
        """Index into finite logits (n,)."""
        (share,) = self.ahead(1)
        self.skip(1)
        return ops.draw_token(logits, self.temperature, share)

    def ahead(self, n: int) -> list[float]:
        """What the next n draws will go by, in [0, 1)."""
        missing = n - len(self._shares)
        if missing > 0:
            self._shares += self._random.random(missing).tolist()
        return self._shares[:n]

    def skip(self, n: int) -> None:
        """So many of them were used."""
        del self._shares[:n]


class Choices:
    """What the grammar allows at a choice, worked out once for all answers that come to it.

    Parameters
    ----------
    state
        At a choice.

    Attributes
    ----------
    rows
        (K,) int32 tokens.
    if_present
        Tokens that come next if the target is in the image, up to the first number; none but at that very choice. Fed
        along with what comes before, they save the first number a run of its own: a choice between two words reads as
        many weights as twenty tokens do.
    """

    def __init__(self, state: AnswerState) -> None:
        self.rows = state.allowed()
        self.decides_absent = state.at_absent_choice
        self.if_present: list[int] = []
        if not self.decides_absent:
            return
        self._is_absent = [_leads_to_absent(state, token) for token in self.rows.tolist()]
        self._absent_rows = np.array(self._is_absent, np.bool_)
        ways = [int(token) for token in self.rows[~self._absent_rows]]
        if len(ways) == 1:
            ahead = state.copy()
            ahead.accept(ways[0])
            self.if_present = [ways[0], *ahead.forced()]

    def choose(
        self,
        hidden: NDArray[np.float32],
        lm_head: LanguageHead,
        absent_threshold: float | None,
        sampler: Sampler | None = None,
    ) -> tuple[int, float | None]:
        """Token to go on with.

        Parameters
        ----------
        hidden
            (hidden_dim,) float32 last hidden state.
        lm_head
            The language head.
        absent_threshold
            Probability of the absent answer, among the tokens allowed, above which it is given; None: if it is the
            likeliest.
        sampler
            Draws the token where the choice is another one, or it draws that too; None: the likeliest.

        Returns
        -------
        token : int
        absent_probability : float or None
            Where absent is among the choices, its probability.

        Raises
        ------
        GenerationError
            If the logits are not finite.
        """
        if not self.decides_absent and sampler is None:
            try:
                return lm_head.likeliest(hidden, self.rows), None
            except ArrayError as err:
                raise GenerationError(NOT_FINITE) from err
        logits = lm_head.logits(hidden, self.rows)
        if not np.isfinite(logits).all():
            raise GenerationError(NOT_FINITE)
        if not self.decides_absent:
            assert sampler is not None
            return int(self.rows[sampler.draw(logits)]), None
        probability = ops.absent_share(logits, self._absent_rows)
        if sampler is not None and sampler.draws_absent:
            return int(self.rows[sampler.draw(logits)]), probability
        values = logits.tolist()
        wanted = (False, True) if absent_threshold is None else (probability > absent_threshold,)
        best = max((k for k, is_absent in enumerate(self._is_absent) if is_absent in wanted), key=values.__getitem__)
        return int(self.rows[best]), probability


def choose(
    state: AnswerState,
    hidden: NDArray[np.float32],
    lm_head: LanguageHead,
    absent_threshold: float | None,
    sampler: Sampler | None = None,
) -> tuple[int, float | None]:
    """Token to go on with at a choice of the grammar: see `Choices.choose`."""
    return Choices(state).choose(hidden, lm_head, absent_threshold, sampler)


def _leads_to_absent(state: AnswerState, token: int) -> bool:
    ahead = state.copy()
    ahead.accept(token)
    return bool(ahead.absent)


def held_back(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of `stop`, or of a character not yet whole.

    >>> held_back("the left lung</thi", "</think>")
    5
    """
    broken = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    if broken:
        return broken
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def free_text(
    sequencer: Sequencer,
    pending: Sequence[int],
    *,
    lm_head: WeightMatrix,
    tokenizer: "Tokenizer",
    stop: str,
    end: int,
    limit: int,
    tell: Callable[[str], Iterable[E]],
    sampler: Sampler | None = None,
) -> Generator[E | Step, States, tuple[list[int], list[int], str | None]]:
    """Generate greedily until a text, the end token or a number of tokens.

    Parameters
    ----------
    sequencer
        The sequence to go on with.
    pending
        Tokens to feed first.
    lm_head, tokenizer
        The language head, and what turns its tokens into text.
    stop
        Text that ends the generation.
    end
        Token that ends it.
    limit
        Most tokens to generate.
    tell
        Makes events of each piece of the text before `stop`.
    sampler
        Draws the tokens; None: the likeliest.

    Yields
    ------
    E, Step
        Those events; and steps, whose hidden states it is sent.

    Returns
    -------
    ids : list of int
        What was generated, without the end token.
    unfed : list of int
        Those of them that have not been fed yet: the last one, but for none after the end token.
    rest : str or None
        Text that came along after `stop`; None if `stop` was not reached.
    """
    ids: list[int] = []
    unfed: list[int] = []
    given = 0
    text = ""
    while len(ids) < limit:
        states = yield from sequencer.feed(unfed or pending)
        if len(ids) == 0:
            sequencer.lap("prefill")
        logits = lm_head.logits(states[-1])
        token = int(np.argmax(logits))
        if not np.isfinite(logits[token]):
            raise GenerationError(NOT_FINITE)
        if sampler is not None:
            token = sampler.draw(logits)
        if token == end:
            unfed = []
            break
        ids.append(token)
        unfed = [token]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        before, found, rest = text.partition(stop)
        if found:
            if len(before) > given:
                yield from tell(before[given:])
            return ids, unfed, rest
        safe = len(text) - held_back(text, stop)
        if safe > given:
            yield from tell(text[given:safe])
            given = safe
    if len(text) > given:
        yield from tell(text[given:])
    return ids, unfed, None
