"""The reasoner as a whole: images to a reusable prefix, a query on that prefix to an answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from medreasoner.geometry import Placement, place
from medreasoner.image.record import Image
from medreasoner.reasoner.answer import AnswerWriter, Opening, Written
from medreasoner.reasoner.decoder import Decoder, KvCache, SavedPrefix
from medreasoner.reasoner.generate import Sampler, Sequencer
from medreasoner.reasoner.prompt import Prompt, common_length
from medreasoner.reasoner.rotary import prompt_positions
from medreasoner.reasoner.scheduler import Cancellation, Scheduler, Stream, Ticket, gather
from medreasoner.reasoner.step import StepKernel
from medreasoner.reasoner.vision import VisionGrid, image_patches, placed_grid
from medreasoner.reasoner.weights import WeightMatrix
from medreasoner.session import Session
from medreasoner.spec import ReasonerSpec, StretchResize

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MAX_WAITING", "Decoded", "Limits", "Prefix", "Reasoner"]

MAX_WAITING = 64
"""Sequences that may wait for a slot, if nobody says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """An image as the decoder has read it: what all queries on it share."""

    placement: Placement
    grid: VisionGrid
    ids: list[int] = field(repr=False)
    saved: SavedPrefix = field(repr=False)
    next_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """An answer in the image's coordinates: `corners` and `points` are (2, 2) of x, y; None if absent."""

    corners: NDArray[np.float64] | None
    points: NDArray[np.float64] | None
    thought: str | None
    text: str
    absent_probability: float | None
    tokens: dict[str, int]
    timings_ms: dict[str, float]
    warnings: tuple[str, ...]
    ids: tuple[int, ...] = ()
    """Tokens after the prompt, of the thought too; the end token is not among them."""
    free: tuple[bool, ...] = ()
    """Of each token of a drawn answer, whether it was chosen; the others were all that the grammar allowed."""


class Limits(Protocol):
    """When to give up: at a time by `time.monotonic`, in seconds, or when another thread says so."""

    @property
    def deadline(self) -> float | None:
        """None: never."""
        ...

    @property
    def cancellation(self) -> Cancellation | None:
        """None: nobody will."""
        ...


class Reasoner:
    """A loaded vision-language model.

    Parameters
    ----------
    spec
        Of the bundle.
    vision, decoder
        Sessions of its graphs.
    tokenizer, embedding, lm_head
        What stays outside the graphs.
    step
        What takes a few tokens in the decoder graph's place, on the CPU.
    n_slots, max_waiting
        How many sequences run at once, None: as many as `slots_that_fit`; and how many may wait.
    n_threads
        That may share the answers of a batch.

    Raises
    ------
    BundleError
        If tokenizer, texts and sizes do not fit together.
    """

    def __init__(
        self,
        spec: ReasonerSpec,
        *,
        vision: Session,
        decoder: Session,
        tokenizer: "Tokenizer",
        embedding: WeightMatrix,
        lm_head: WeightMatrix,
        step: StepKernel | None = None,
        n_slots: int | None = None,
        max_waiting: int = MAX_WAITING,
        n_threads: int = 1,
    ) -> None:
        self.spec = spec
        self.prompt = Prompt(tokenizer, spec)
        self._vision = vision
        self._decoder = Decoder(decoder, spec, step, n_slots=n_slots)
        self._scheduler = Scheduler(self._decoder, max_waiting=max_waiting, n_threads=n_threads)
        self._embedding, self._lm_head = embedding, lm_head
        self._writer = AnswerWriter(spec, tokenizer, lm_head)
        if isinstance(spec.vision.resize, StretchResize):  # one grid only: its grammar is known now
            self._writer.prepare(place(spec.vision.resize, height=1, width=1).answer_limits(spec.coordinates))

    @property
    def n_slots(self) -> int:
        """Sequences that are decoded at once."""
        return self._scheduler.n_slots

    @property
    def room(self) -> int:
        """Sequences that run at once or wait, all callers together."""
        return self._scheduler.room

    def place(self, image: Image) -> Placement:
        """Where the image lies in the grid that the vision tower sees."""
        return place(self.spec.vision.resize, height=image.height, width=image.width)

    def preprocess(self, image: Image, placement: Placement) -> NDArray[np.float32]:
        """(n_patches, 3 * patch_size**2) float32 patches in merge order."""
        return image_patches(self.spec.vision, image.pixels, placement)

    def encode(
        self, patches: NDArray[np.float32], placement: Placement, vision: Session | None = None
    ) -> NDArray[np.float32]:
        """(batch, n_patches, ...) patches of images of one grid as (batch, n_tokens, hidden_dim) embeddings.

        `vision` is another session of the vision tower's graph; None: the model's own.
        """
        vision = vision or self._vision
        grid, at_once = placed_grid(self.spec.vision, placement).inputs(), vision.max_rows or len(patches)
        parts = [
            vision.bind({}, {}).run({"patches": patches[start : start + at_once], **grid})["image_embeds"]
            for start in range(0, len(patches), at_once)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_prefix(self, embeds: NDArray[np.float32], placement: Placement) -> Prefix:
        """Prefix of all prompts on an image, from its (n_tokens, hidden_dim) embeddings.

        Raises
        ------
        GenerationError
            If the image has more tokens than the model's length holds.
        """
        return self.read_prefixes(embeds[None], [placement])[0]

    def read_prefixes(
        self, embeds: NDArray[np.float32], placements: Sequence[Placement], limits: Limits | None = None
    ) -> list[Prefix]:
        """The same of several images of one grid, (batch, n_tokens, hidden_dim).

        Raises
        ------
        GenerationError
            If an image has more tokens than the model's length holds.
        QueueFullError, DeadlineError, CancelledError
            If too many wait, or it was given up.
        """
        grid = placed_grid(self.spec.vision, placements[0])
        ids = self.prompt.prefix(grid.n_tokens)
        positions, next_position = prompt_positions(ids, self.prompt.image_token, grid.rows, grid.columns)
        words = self._embedding.embed(np.array(ids, np.int64))
        start = ids.index(self.prompt.image_token)

        def reading(cache: KvCache, own: NDArray[np.float32]) -> Stream[SavedPrefix]:
            inputs = words.copy()
            inputs[start : start + grid.n_tokens] = own
            cache.length, cache.holds = 0, None
            yield self._decoder.step(cache, inputs, positions, 0)
            return cache.save()

        deadline, cancellation = (None, None) if limits is None else (limits.deadline, limits.cancellation)
        saved: list[SavedPrefix] = []
        for first in range(0, len(embeds), self.n_slots):
            tickets = [
                self._scheduler.start(partial(reading, own=own), deadline=deadline, cancellation=cancellation)
                for own in embeds[first : first + self.n_slots]
            ]
            saved += gather(tickets)
        return [
            Prefix(placement=placement, grid=grid, ids=ids, saved=each, next_position=next_position)
            for placement, each in zip(placements, saved, strict=True)
        ]

    def answer(
        self,
        prefix: Prefix,
        query: str,
        *,
        think: bool,
        unconstrained: bool = False,
        sampler: Sampler | None = None,
        deadline: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> Ticket[Decoded]:
        """Begin to answer a query on an image: whoever takes the ticket's events or result drives the decoder.

        Parameters
        ----------
        prefix
            The image, as `read_prefix` made it.
        query
            The question.
        think
            Whether to reason in free text first.
        unconstrained
            Whether to decode the answer as free text too and parse it, instead of following the grammar: to compare.
        sampler
            Draws the tokens; None: the likeliest.
        deadline, cancellation
            When to give up, by `time.monotonic`, and who may say so.

        Raises
        ------
        QueryError
            If the model does not accept the query.
        QueueFullError
            If too many wait already.
        GenerationError
            From the ticket, if no usable answer came out.
        """
        whole = self.prompt.whole(query, prefix.grid.n_tokens)
        write = self._writer.write_freely if unconstrained else self._writer.write

        def answering(cache: KvCache) -> Stream[Decoded]:
            sequencer, rest = self._resumed(prefix, whole, cache)
            answer_limits = prefix.placement.answer_limits(self.spec.coordinates)
            written = yield from write(sequencer, rest, limits=answer_limits, think=think, sampler=sampler)
            return self._decoded(written, prefix, len(whole), sequencer)

        return self._scheduler.start(answering, prefix=prefix.saved, deadline=deadline, cancellation=cancellation)

    def sample(
        self,
        prefix: Prefix,
        query: str,
        samplers: Sequence[Sampler],
        *,
        deadline: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> list[Decoded]:
        """Answers to one query that are drawn, one for each sampler; the question is read once for all of them.

        One answer only if that is that the target is absent, which is not drawn.

        Parameters
        ----------
        prefix, query
            As for `answer`.
        samplers
            At least one.
        deadline, cancellation
            When to give up, by `time.monotonic`, and who may say so.

        Raises
        ------
        MedReasonerError
            As `answer` and its ticket.
        """
        whole = self.prompt.whole(query, prefix.grid.n_tokens)
        limits = prefix.placement.answer_limits(self.spec.coordinates)

        def opening(cache: KvCache) -> Stream[tuple[Opening, SavedPrefix, Sequencer]]:
            sequencer, rest = self._resumed(prefix, whole, cache)
            opened = yield from self._writer.open(sequencer, rest, limits=limits, think=False, sampler=None)
            return opened, cache.save(), sequencer

        def answering(cache: KvCache, sampler: Sampler | None) -> Stream[Decoded]:
            cache.restore(saved, saved.length)
            sequencer = Sequencer(self._decoder, self._embedding, cache, first.next_position)
            written = yield from self._writer.go_on(sequencer, opened, sampler)
            sequencer.n_runs += first.n_runs
            sequencer.timings_ms |= {"prefill": first.timings_ms["prefill"]}
            return self._decoded(written, prefix, len(whole), sequencer)

        start = partial(self._scheduler.start, deadline=deadline, cancellation=cancellation)
        opened, saved, first = start(opening, prefix=prefix.saved).result()
        drawn: list[Decoded] = []
        kinds: Sequence[Sampler | None] = (None,) if opened.is_absent else samplers
        for begin in range(0, len(kinds), self.n_slots):
            some = kinds[begin : begin + self.n_slots]
            tickets = [start(partial(answering, sampler=sampler), prefix=saved) for sampler in some]
            drawn += gather(tickets)
        return drawn

    def read_question(self, prefix: Prefix, query: str) -> Ticket[Prefix]:
        """Begin to read a question about an image: what comes of it takes the image's place for answers to this query.

        Many answers to one query are drawn in this way without reading it again for each.

        Raises
        ------
        QueryError, QueueFullError
            As `answer`.
        """
        ids = self.prompt.whole(query, prefix.grid.n_tokens)[:-1]  # what follows the last token is for the answers

        def reading(cache: KvCache) -> Stream[Prefix]:
            sequencer, rest = self._resumed(prefix, ids, cache)
            if rest:
                yield from sequencer.feed(rest)
            return replace(prefix, ids=ids, saved=cache.save(), next_position=sequencer.next_position)

        return self._scheduler.start(reading, prefix=prefix.saved)

    def complete(
        self, prefix: Prefix, query: str, *, think: bool, limit: int, sampler: Sampler
    ) -> Ticket[tuple[list[int], int]]:
        """Begin to draw up to `limit` tokens without a grammar, and without asking whether they are an answer.

        The ticket's result is what `AnswerWriter.write_raw` returns.

        Raises
        ------
        QueryError, QueueFullError
            As `answer`.
        """
        whole = self.prompt.whole(query, prefix.grid.n_tokens)
        limit = min(limit, self.spec.max_length - len(whole))

        def completing(cache: KvCache) -> Stream[tuple[list[int], int]]:
            sequencer, rest = self._resumed(prefix, whole, cache)
            return (yield from self._writer.write_raw(sequencer, rest, think=think, limit=limit, sampler=sampler))

        return self._scheduler.start(completing, prefix=prefix.saved)

    @property
    def end_token(self) -> int:
        """The token that ends an answer."""
        return self._writer.end

    def _resumed(self, prefix: Prefix, whole: list[int], cache: KvCache) -> tuple[Sequencer, list[int]]:
        """A prompt in a slot that holds as much of it as the prefix has, and the tokens that are left."""
        shared = common_length(prefix.ids, whole)  # the whole prefix, but for a query that changes its last token
        cache.restore(prefix.saved, shared)
        # After the image positions grow by one a token, so they can be counted back from the prefix's end.
        position = prefix.next_position - (len(prefix.ids) - shared)
        return Sequencer(self._decoder, self._embedding, cache, position), whole[shared:]

    def logits(self, prefix: Prefix, query: str, ids: list[int]) -> NDArray[np.float32]:
        """Logits (n, vocab_size) float32 of each token of a text, given those before it: to compare with a reference.

        Parameters
        ----------
        prefix, query
            Image and question, as for `answer`.
        ids
            The n tokens of an answer.
        """
        whole = self.prompt.whole(query, prefix.grid.n_tokens)

        def reading(cache: KvCache) -> Stream[NDArray[np.float32]]:
            sequencer, rest = self._resumed(prefix, whole, cache)
            return (yield from sequencer.feed([*rest, *ids[:-1]], len(ids)))

        states = self._scheduler.start(reading, prefix=prefix.saved).result()
        return np.stack([self._lm_head.logits(state) for state in np.ascontiguousarray(states)])

    def _decoded(self, written: Written, prefix: Prefix, n_prompt: int, sequencer: Sequencer) -> Decoded:
        corners = points = None
        if written.values is not None:
            pairs = np.array(written.values, np.float64).reshape(4, 2)  # two corners, two points
            places = prefix.placement.from_answer(pairs, self.spec.coordinates)
            corners, points = places[:2], places[2:]
        return Decoded(
            corners=corners,
            points=points,
            thought=written.thought,
            text=written.text,
            absent_probability=written.absent_probability,
            tokens={
                "prompt": n_prompt,
                "image": prefix.grid.n_tokens,
                "thought": written.n_thought,
                "answer": written.n_answer,
                "forced": written.n_forced,
                "decoder_runs": sequencer.n_runs,
            },
            timings_ms=sequencer.timings_ms,
            warnings=written.warnings,
            ids=written.ids,
            free=written.free,
        )
