"""One image with many questions: what was worked out for the image is kept from query to query."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from itertools import groupby
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from medreasoner.engine import Engine
from medreasoner.errors import MedReasonerError
from medreasoner.geometry import Box, Placement, Point
from medreasoner.image.record import Image
from medreasoner.reasoner import Decoded, Prefix
from medreasoner.result import Answer, Grounding, Thought
from medreasoner.segmenter import Embedded, Segmenter
from medreasoner.timing import Stopwatch

__all__ = ["Study", "open_studies"]

_CLOSED = "this Study is closed"


class Study:
    """An image that has been read by both models; made by `Grounder.open`.

    A context manager; safe to use from several threads. Each query costs only its own tokens and a mask.
    """

    def __init__(
        self,
        engine: Engine,
        image: Image,
        *,
        prefix: Prefix,
        embedded: "Future[tuple[Embedded, float]]",
        timings_ms: Mapping[str, float],
    ) -> None:
        self._engine, self._prefix, self._embedded = engine, prefix, embedded
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
        self._embedded.cancel()

    def ground(self, query: str, *, think: bool = False, unconstrained: bool = False) -> Grounding:
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

        Raises
        ------
        QueryError
            If the query is empty, no text, or longer than the model accepts.
        GenerationError
            If the reasoner gave no usable answer.
        MedReasonerError
            If the study or its Grounder is closed.
        """
        for event in self.stream(query, think=think, unconstrained=unconstrained):
            if isinstance(event, Grounding):
                return event
        raise AssertionError("a stream ends with its result")

    def stream(
        self, query: str, *, think: bool = True, unconstrained: bool = False
    ) -> Iterator[Thought | Answer | Grounding]:
        """Answer a question, and tell on the way: pieces of the thought, the answer, and the result at the end.

        Parameters and errors are those of `ground`; they arise when the first event is asked for.
        """
        return self._stream(query, think=think, unconstrained=unconstrained, timings_ms={})

    def stream_first(
        self, query: str, *, think: bool, unconstrained: bool = False
    ) -> Iterator[Thought | Answer | Grounding]:
        """As `stream`, for the query that the study was opened for: opening counts in the result's timings."""
        return self._stream(query, think=think, unconstrained=unconstrained, timings_ms=self.timings_ms)

    def _stream(
        self, query: str, *, think: bool, unconstrained: bool, timings_ms: Mapping[str, float]
    ) -> Generator[Thought | Answer | Grounding, None, None]:
        watch = Stopwatch()
        self._check()
        decoded = yield from self._engine.reasoner.answer(self._prefix, query, think=think, unconstrained=unconstrained)
        timings = dict(timings_ms)
        for stage, spent in decoded.timings_ms.items():
            timings[stage] = timings.get(stage, 0.0) + spent
        mask, score = self._segment(decoded, timings)
        timings["total"] = timings.get("total", 0.0) + watch.lap()
        yield self._result(query, decoded, mask, score, timings)

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
        try:
            return self._embedded.result()
        except CancelledError:  # closed by another thread, or between two events of a stream
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


def open_studies(engine: Engine, images: Sequence[tuple[Image, float]]) -> list[Study]:
    """Studies of images, each given with the milliseconds that reading it took, in the same order.

    Images of one grid share a run of the vision tower. The segmenter reads them meanwhile, in threads.

    Raises
    ------
    ImageReadError
        If a model cannot take an image of this shape.
    GenerationError
        If an image has more tokens than the reasoner holds.
    """
    engine.check()
    placements = [engine.reasoner.place(image) for image, _ in images]
    embedded = [engine.submit(_encode, engine.segmenter, image) for image, _ in images]
    try:
        return _studies(engine, images, placements, embedded)
    except BaseException:
        for future in embedded:  # nobody will ask for them
            future.cancel()
        raise


def _studies(
    engine: Engine,
    images: Sequence[tuple[Image, float]],
    placements: Sequence[Placement],
    embedded: "Sequence[Future[tuple[Embedded, float]]]",
) -> list[Study]:
    reasoner = engine.reasoner
    grids = [(placement.grid_height, placement.grid_width) for placement in placements]
    studies: dict[int, Study] = {}
    for _, group in groupby(sorted(range(len(images)), key=grids.__getitem__), key=grids.__getitem__):
        members = list(group)
        watch = Stopwatch()
        patches = np.stack([reasoner.preprocess(images[i][0], placements[i]) for i in members])
        preprocess = watch.lap() / len(members)
        embeds = reasoner.encode(patches, placements[members[0]])
        vision = watch.lap() / len(members)
        for i, image_embeds in zip(members, embeds, strict=True):
            image, read = images[i]
            prefix = reasoner.read_prefix(image_embeds, placements[i])
            timings = {"read": read, "preprocess": preprocess, "vision": vision, "prefill": watch.lap()}
            timings["total"] = sum(timings.values())
            studies[i] = Study(engine, image, prefix=prefix, embedded=embedded[i], timings_ms=timings)
    return [studies[i] for i in range(len(images))]


def _encode(segmenter: Segmenter, image: Image) -> tuple[Embedded, float]:
    watch = Stopwatch()
    return segmenter.encode(image), watch.lap()
