"""One image with many questions: what was worked out for the image is kept from query to query."""

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from medreasoner.engine import Engine
from medreasoner.errors import MedReasonerError, QueryError
from medreasoner.geometry import Box, Placement, Point
from medreasoner.image.record import Image
from medreasoner.readings import Reading
from medreasoner.reasoner import Cancellation, Decoded, Ticket
from medreasoner.result import Answer, Grounding, Thought
from medreasoner.segmenter import Embedded, Segmenter
from medreasoner.timing import Stopwatch

__all__ = ["Ask", "Study", "answer_all", "open_studies"]

_CLOSED = "this Study is closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """How a question is to be answered, and when to give up: `deadline` by `time.monotonic`, seconds."""

    think: bool = False
    unconstrained: bool = False
    deadline: float | None = None
    cancellation: Cancellation | None = None

    @classmethod
    def within(
        cls,
        timeout_s: float | None,
        *,
        think: bool = False,
        unconstrained: bool = False,
        cancellation: Cancellation | None = None,
    ) -> "Ask":
        """With a deadline so many seconds from now.

        Raises
        ------
        QueryError
            If it is no positive number.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise QueryError(f"timeout_s: expected a positive number of seconds, got {timeout_s!r:.40}")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return cls(think=think, unconstrained=unconstrained, deadline=deadline, cancellation=cancellation)


class Study:
    """An image that has been read by both models; made by `Grounder.open`.

    A context manager; safe to use from several threads. Each query costs only its own tokens and a mask.
    """

    def __init__(self, engine: Engine, image: Image, reading: Reading, timings_ms: Mapping[str, float]) -> None:
        self._engine, self._reading = engine, reading
        self._closed = False
        self.image = image
        self.timings_ms = timings_ms
        """Milliseconds that opening took, by stage; the results of the study's queries do not hold them."""

    def __enter__(self) -> "Study":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up what was kept for the image; queries are refused from now on."""
        self._closed = True

    def ground(
        self, query: str, *, think: bool = False, unconstrained: bool = False, timeout_s: float | None = None
    ) -> Grounding:
        """Answer a question about the image.

        Parameters
        ----------
        query
            The question, free text.
        think
            Whether the reasoner reasons in words first.
        unconstrained
            Whether it answers as free text that is then parsed, instead of following the grammar of answers: only to
            compare.
        timeout_s
            Seconds after which to give up, between two steps of the decoder; None: never.

        Raises
        ------
        QueryError
            If the query is empty, no text, or longer than the model accepts.
        GenerationError
            If the reasoner gave no usable answer.
        QueueFullError
            If too many questions wait already.
        DeadlineError
            If the time was over.
        MedReasonerError
            If the study or its Grounder is closed.
        """
        return self.ask(query, Ask.within(timeout_s, think=think, unconstrained=unconstrained)).result()

    def stream(
        self, query: str, *, think: bool = True, unconstrained: bool = False, timeout_s: float | None = None
    ) -> Iterator[Thought | Answer | Grounding]:
        """Answer a question, and tell on the way: pieces of the thought, the answer, and the result at the end.

        Parameters and errors are those of `ground`; they arise when the first event is asked for.
        """
        yield from self.ask(query, Ask.within(timeout_s, think=think, unconstrained=unconstrained)).events()

    def ask(self, query: str, ask: Ask, *, is_first: bool = False) -> "Asked":
        """Begin to answer; `is_first` if the study was opened for this query: opening counts in the result's timings.

        Raises
        ------
        QueryError, QueueFullError, MedReasonerError
            As `ground`.
        """
        watch = Stopwatch()
        self._check()
        ticket = self._engine.reasoner.answer(
            self._reading.prefix,
            query,
            think=ask.think,
            unconstrained=ask.unconstrained,
            deadline=ask.deadline,
            cancellation=ask.cancellation,
        )
        return Asked(self, query, ticket, self.timings_ms if is_first else {}, watch)

    def finish(self, query: str, decoded: Decoded, timings_ms: Mapping[str, float], watch: Stopwatch) -> Grounding:
        """The mask of what was decoded, and all that is known with it."""
        timings = dict(timings_ms)
        for stage, spent in decoded.timings_ms.items():
            timings[stage] = timings.get(stage, 0.0) + spent
        mask, score = self._segment(decoded, timings)
        timings["total"] = timings.get("total", 0.0) + watch.lap()
        return self._result(query, decoded, mask, score, timings)

    def segment(self, *, box: Box, points: tuple[Point, Point]) -> tuple[NDArray[np.bool_], float]:
        """Mask for a box and two points of your own: the segmenter without the reasoner.

        Parameters
        ----------
        box
            Half-open (x1, y1, x2, y2), pixels of the image.
        points
            Two (x, y) inside the target.

        Returns
        -------
        mask : (H, W) bool
            In the image's own grid.
        score : float
            Predicted intersection over union, in [0, 1].

        Raises
        ------
        MedReasonerError
            If the study or its Grounder is closed.
        """
        self._check()
        segmenter = self._engine.segmenter
        embedded, _ = self._embedding()
        corners, inside = np.array(box, np.float64).reshape(2, 2), np.array(points, np.float64).reshape(2, 2)
        logits, score = segmenter.decode(embedded, corners=corners, points=inside)
        return segmenter.mask(logits, embedded), score

    def _check(self) -> None:
        self._engine.check()
        if self._closed:
            raise MedReasonerError(_CLOSED)

    def _embedding(self) -> tuple[Embedded, float]:
        """The segmenter's reading of the image and the milliseconds that it took; waits for it."""
        if self._closed:  # by another thread, or between two events of a stream
            raise MedReasonerError(_CLOSED)
        try:
            return self._reading.embedded.result()
        except CancelledError:  # with the Grounder
            raise MedReasonerError(_CLOSED) from None

    def _segment(self, decoded: Decoded, timings: dict[str, float]) -> tuple[NDArray[np.bool_], float]:
        if decoded.corners is None or decoded.points is None:
            return np.zeros((self.image.height, self.image.width), np.bool_), 0.0
        segmenter = self._engine.segmenter
        embedded, spent = self._embedding()
        if "vision" in timings:  # the image's own stages count too: it was opened for this query
            timings["segment_encode"] = spent
        watch = Stopwatch()
        logits, score = segmenter.decode(embedded, corners=decoded.corners, points=decoded.points)
        timings["segment_decode"] = watch.lap()
        mask = segmenter.mask(logits, embedded)
        timings["postprocess"] = watch.lap()
        return mask, score

    def _result(
        self, query: str, decoded: Decoded, mask: NDArray[np.bool_], score: float, timings: dict[str, float]
    ) -> Grounding:
        engine, spacing = self._engine, self.image.pixel_spacing_mm
        found = decoded.corners is not None
        empty = ("the segmenter returned an empty mask",) if found and not mask.any() else ()
        return Grounding(
            found=found,
            box=_flat(decoded.corners),
            points=_pair(decoded.points),
            mask=mask,
            score=score,
            reasoning=decoded.thought,
            answer=decoded.text,
            absent_probability=decoded.absent_probability,
            timings_ms=timings,
            tokens=decoded.tokens,
            pixel_spacing_mm=spacing,
            area_mm2=None if spacing is None else float(np.count_nonzero(mask)) * spacing[0] * spacing[1],
            warnings=(*self.image.warnings, *engine.warnings, *decoded.warnings, *empty),
            image=self.image,
            query=query,
            model_name=engine.model_name,
            model_version=engine.model_version,
            model_digest=engine.model_digest,
        )


def _flat(corners: NDArray[np.float64] | None) -> tuple[float, float, float, float] | None:
    if corners is None:
        return None
    (x1, y1), (x2, y2) = corners.tolist()
    return x1, y1, x2, y2


def _pair(points: NDArray[np.float64] | None) -> tuple[tuple[float, float], tuple[float, float]] | None:
    if points is None:
        return None
    (ax, ay), (bx, by) = points.tolist()
    return (ax, ay), (bx, by)


class Asked:
    """A question under way."""

    def __init__(
        self, study: Study, query: str, ticket: "Ticket[Decoded]", timings_ms: Mapping[str, float], watch: Stopwatch
    ) -> None:
        self._study, self._query, self._ticket = study, query, ticket
        self._timings_ms, self._watch = timings_ms, watch

    def events(self) -> Generator[Thought | Answer | Grounding, None, None]:
        """Pieces of the thought, the answer, and the result."""
        decoded = yield from self._ticket.run()
        yield self._study.finish(self._query, decoded, self._timings_ms, self._watch)

    def result(self) -> Grounding:
        """The result alone."""
        return self.draw(self._ticket.result())

    def decoded(self) -> Decoded:
        """What the reasoner wrote; `draw` makes the result of it, in any thread."""
        return self._ticket.result()

    def draw(self, decoded: Decoded) -> Grounding:
        """The result."""
        return self._study.finish(self._query, decoded, self._timings_ms, self._watch)

    def drop(self) -> None:
        """Nobody will ask for it."""
        self._ticket.cancel()


def answer_all(engine: Engine, questions: "Sequence[tuple[Study, str, bool]]", ask: Ask) -> list[Grounding]:
    """Answers to questions about studies, each with whether its study was opened for it.

    As many are decoded at once as the decoder has slots; masks are drawn meanwhile, in threads.
    """
    asked: deque[Asked] = deque()
    drawing: list[Future[Grounding]] = []
    try:
        for number in range(len(questions) + 1):
            while asked and (number == len(questions) or len(asked) >= engine.reasoner.n_slots):
                first = asked.popleft()
                drawing.append(engine.submit(first.draw, first.decoded()))
            if number < len(questions):
                study, query, is_first = questions[number]
                asked.append(study.ask(query, ask, is_first=is_first))
        return [each.result() for each in drawing]
    finally:  # after an error
        for each in asked:
            each.drop()


def open_studies(engine: Engine, images: Sequence[tuple[Image, float]], ask: Ask) -> list[Study]:
    """Studies of images, each given with the milliseconds that reading it took, in the same order.

    Images of one grid share a run of the vision tower. The segmenter reads them meanwhile, in threads. What both made
    of an image is kept for the next time.

    Raises
    ------
    ImageReadError
        If a model cannot take an image of this shape.
    GenerationError
        If an image has more tokens than the reasoner holds.
    QueueFullError, DeadlineError
        As `Study.ground`.
    """
    engine.check()
    if len(images) == 1:
        (image, read), watch = images[0], Stopwatch()
        reading, was_kept = engine.readings.find_or_read(image.pixels, lambda: _read(engine, [image], ask)[0])
        spent = {"cache": watch.lap()} if was_kept else reading.timings_ms
        return [_study(engine, image, reading, {"read": read, **spent})]
    watch, found = Stopwatch(), []
    for image, _ in images:
        found.append((engine.readings.find(image.pixels), watch.lap()))
    missing = [image for (image, _), (reading, _) in zip(images, found, strict=True) if reading is None]
    made = iter(_read(engine, missing, ask)) if missing else iter(())
    studies = []
    for (image, read), (known, spent_ms) in zip(images, found, strict=True):
        reading = known or next(made)
        if known is None:
            engine.readings.keep(image.pixels, reading)
        stages = {"cache": spent_ms} if known else reading.timings_ms
        studies.append(_study(engine, image, reading, {"read": read, **stages}))
    return studies


def _study(engine: Engine, image: Image, reading: Reading, timings_ms: dict[str, float]) -> Study:
    return Study(engine, image, reading, {**timings_ms, "total": sum(timings_ms.values())})


def _read(engine: Engine, images: Sequence[Image], ask: Ask) -> list[Reading]:
    """Let both models read images."""
    placements = [engine.reasoner.place(image) for image in images]
    embedded = [engine.submit(_encode, engine.segmenter, image) for image in images]
    try:
        return _readings(engine, images, placements, embedded, ask)
    except BaseException:
        for future in embedded:  # nobody will ask for them
            future.cancel()
        raise


def _readings(
    engine: Engine,
    images: Sequence[Image],
    placements: Sequence[Placement],
    embedded: "Sequence[Future[tuple[Embedded, float]]]",
    ask: Ask,
) -> list[Reading]:
    reasoner = engine.reasoner
    grids = [(placement.grid_height, placement.grid_width) for placement in placements]
    readings: dict[int, Reading] = {}
    for _, group in groupby(sorted(range(len(images)), key=grids.__getitem__), key=grids.__getitem__):
        members = list(group)
        watch = Stopwatch()
        patches = np.stack([reasoner.preprocess(images[i], placements[i]) for i in members])
        preprocess = watch.lap() / len(members)
        embeds = reasoner.encode(patches, placements[members[0]])
        vision = watch.lap() / len(members)
        prefixes = reasoner.read_prefixes(embeds, [placements[i] for i in members], ask)
        prefill = watch.lap() / len(members)
        for i, prefix in zip(members, prefixes, strict=True):
            timings = {"preprocess": preprocess, "vision": vision, "prefill": prefill}
            readings[i] = Reading(prefix=prefix, embedded=embedded[i], timings_ms=timings)
    return [readings[i] for i in range(len(images))]


def _encode(segmenter: Segmenter, image: Image) -> tuple[Embedded, float]:
    watch = Stopwatch()
    return segmenter.encode(image), watch.lap()
