"""One image with many questions: what was worked out for the image is kept from query to query."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from medreasoner import telemetry
from medreasoner.ask import Ask
from medreasoner.consensus import concord, expected_dice
from medreasoner.engine import Engine
from medreasoner.errors import MedReasonerError
from medreasoner.geometry import Box, Point
from medreasoner.image.record import Image
from medreasoner.readings import Reading
from medreasoner.reasoner import Decoded, Ticket
from medreasoner.reasoner.generate import Sampler
from medreasoner.reasoner.scheduler import gather
from medreasoner.result import Answer, Grounding, Thought
from medreasoner.segmenter import Embedded
from medreasoner.timing import Stopwatch

__all__ = ["Study", "answer_all"]

_CLOSED = "this Study is closed"
_TEMPERATURE = 1.0  # where a bundle was not calibrated at another one


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
        self,
        query: str,
        *,
        think: bool = False,
        unconstrained: bool = False,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        timeout_s: float | None = None,
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
        samples
            How many answers to draw; with more than one the result is what they agree on, with its `agreement`,
            `concord` and `confidence`.
        temperature
            At which they are drawn; None: that at which the bundle was calibrated, or 1.
        seed
            Of the draws: the same seed gives the same answers, whatever else the model answers meanwhile.
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
        ask = Ask.within(
            timeout_s, think=think, unconstrained=unconstrained, samples=samples, temperature=temperature, seed=seed
        )
        return self.answer(query, ask)

    def answer(self, query: str, ask: Ask, *, is_first: bool = False) -> Grounding:
        """As `ground`; `is_first` as in `ask`."""
        if ask.samples == 1:
            return self.ask(query, ask, is_first=is_first).result()
        watch = Stopwatch()
        self._check()
        drawn = self._draw(query, ask)
        timings = {**(self.timings_ms if is_first else {})}
        timings["draw"] = watch.lap()
        return self._agreed(query, ask, drawn, timings, watch)

    def _draw(self, query: str, ask: Ask) -> list[Decoded]:
        """The drawn answers."""
        reasoner, prefix, calibrated = self._engine.reasoner, self._reading.prefix, self._engine.confidence
        temperature = ask.temperature or (calibrated.temperature if calibrated else _TEMPERATURE)
        samplers = [Sampler(temperature, ask.seed, index) for index in range(ask.samples)]
        if not ask.think:
            return reasoner.sample(prefix, query, samplers, deadline=ask.deadline, cancellation=ask.cancellation)
        answer = partial(
            reasoner.answer, prefix, query, think=True, deadline=ask.deadline, cancellation=ask.cancellation
        )
        drawn: list[Decoded] = []
        for start in range(0, len(samplers), reasoner.n_slots):
            some = samplers[start : start + reasoner.n_slots]
            drawn += gather([answer(sampler=each) for each in some])
        return drawn

    def _agreed(
        self, query: str, ask: Ask, drawn: list[Decoded], timings: dict[str, float], watch: Stopwatch
    ) -> Grounding:
        """What drawn answers come to."""
        found = [each for each in drawn if each.corners is not None and each.points is not None]
        n, segmenter = len(drawn), self._engine.segmenter
        score, nearest, value = 0.0, drawn[0], 1.0
        if found:
            embedded, spent = self._embedding()
            if "vision" in timings:
                timings["segment_encode"] = spent
            logits, scores = self._decode_found(found, embedded)
            timings["segment_decode"] = watch.lap()
            votes = segmenter.votes(logits, embedded)
            small = segmenter.small(logits, embedded)
            value, _ = concord(np.concatenate([small, np.zeros((n - len(found), *small.shape[1:]), np.bool_)]))
            _, index = concord(small)
            if 2 * len(found) > n:
                nearest, score = found[index], float(scores[index])
            else:
                nearest = next(each for each in drawn if each.corners is None)
        else:
            votes = np.zeros((self.image.height, self.image.width), np.uint8)
        timings["postprocess"] = watch.lap()
        timings["total"] = timings.get("total", 0.0) + sum(
            timings.get(stage, 0.0) for stage in ("draw", "segment_decode", "postprocess")
        )
        result = self._result(query, nearest, votes > n // 2, score, timings)
        calibrated, warnings = self._engine.confidence, result.warnings
        confidence = None
        if calibrated is None or ask.temperature not in (None, calibrated.temperature):
            warnings = (*warnings, "no confidence: this bundle was not calibrated for answers drawn like this")
        elif nearest.corners is not None:  # it says what a mask is worth
            confidence = expected_dice(value, calibrated.knots)
        agreed = replace(
            result, n_samples=ask.samples, votes=votes, concord=value, confidence=confidence, warnings=warnings
        )
        telemetry.tell(agreed)
        return agreed

    def _decode_found(
        self, found: list[Decoded], embedded: Embedded
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Masks of all answers, half of them in another thread."""
        segmenter = self._engine.segmenter
        corners = np.stack([each.corners for each in found if each.corners is not None])
        points = np.stack([each.points for each in found if each.points is not None])
        half = (len(found) + 1) // 2
        other = None
        if half < len(found):
            other = self._engine.submit(segmenter.decode_batch, embedded, corners=corners[half:], points=points[half:])
        logits, scores = segmenter.decode_batch(embedded, corners=corners[:half], points=points[:half])
        if other is None:
            return logits, scores
        more, more_scores = other.result()
        return np.concatenate([logits, more]), np.concatenate([scores, more_scores])

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
        result = self._result(query, decoded, mask, score, timings)
        telemetry.tell(result)
        return result

    def segment(
        self, *, box: Box | None = None, points: tuple[Point, Point] | None = None
    ) -> tuple[NDArray[np.bool_], float]:
        """Mask for a box, two points or both, of your own: the segmenter without the reasoner.

        Parameters
        ----------
        box
            Half-open (x1, y1, x2, y2), pixels of the image; None: by the points alone.
        points
            Two (x, y) inside the target; None: by the box alone.

        Returns
        -------
        mask : (H, W) bool
            In the image's own grid.
        score : float
            Predicted intersection over union, in [0, 1].

        Raises
        ------
        ArrayError
            If neither is given, or only what this bundle's segmenter does not take.
        MedReasonerError
            If the study or its Grounder is closed.
        """
        self._check()
        segmenter = self._engine.segmenter
        embedded, _ = self._embedding()
        corners, inside = (
            None if given is None else np.array(given, np.float64).reshape(2, 2) for given in (box, points)
        )
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
        empty = ("the segmenter returned an empty mask",) if found and _is_empty(mask, decoded.points) else ()
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
            tokens=decoded.tokens | {"cached": 0 if "vision" in timings else len(self._reading.prefix.ids)},
            pixel_spacing_mm=spacing,
            area_mm2=None if spacing is None else float(np.count_nonzero(mask)) * spacing[0] * spacing[1],
            warnings=(*self.image.warnings, *engine.warnings, *decoded.warnings, *empty),
            image=self.image,
            query=query,
            model_name=engine.model_name,
            model_version=engine.model_version,
            model_digest=engine.model_digest,
        )


def _is_empty(mask: NDArray[np.bool_], points: NDArray[np.float64] | None) -> bool:
    """Whether nothing is set; looks at the places first that should be, since a mask is as large as its image."""
    height, width = mask.shape
    for x, y in [] if points is None else points.tolist():
        if mask[min(int(y), height - 1), min(int(x), width - 1)]:
            return False
    return not mask.any()


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
        self._ticket.drop()


def answer_all(engine: Engine, questions: "Sequence[tuple[Study, str, bool]]", ask: Ask) -> list[Grounding]:
    """Answers to questions about studies, each with whether its study was opened for it.

    As many are decoded at once as the decoder has slots; masks are drawn meanwhile, in threads.
    """
    if ask.samples > 1:  # each question fills the slots by itself
        return [study.answer(query, ask, is_first=is_first) for study, query, is_first in questions]
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
