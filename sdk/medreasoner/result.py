"""What a question about an image is answered with, and the events on the way there."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.geometry import Box, Point
from medreasoner.image.record import Image

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Answer", "Grounding", "Thought"]


@dataclass(frozen=True, slots=True)
class Thought:
    """The next piece of the reasoning; the pieces join to the whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The reasoner's answer, complete, before the mask is known."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grounding:
    """Where the answer to a question lies in an image. Coordinates are the image's own pixels, (x, y) order.

    The representation holds no pixels and neither query nor reasoning, so that it may be logged.

    Parameters
    ----------
    found
        False if the reasoner answered that the target is not in the image; then there is no box, point or score.
    box
        Half-open (x1, y1, x2, y2), in pixel edges.
    points
        Two points inside the target.
    mask
        (H, W) bool in the image's grid, C-contiguous; all False if not found.
    score
        Intersection over union that the segmenter predicts for its mask, clipped to [0, 1]; not a probability.
    reasoning
        Thought before the answer; None without `think`.
    answer
        The reasoner's answer as it wrote it, in its own grid.
    absent_probability
        What the reasoner gives to "not in this image", in [0, 1]; None if it cannot say so. Absent is answered above
        the bundle's threshold.
    timings_ms
        Milliseconds by stage; stages overlap, so that they may sum to more than ``total``.
    tokens
        Counts by kind: ``prompt``, ``image``, ``thought``, ``answer``, of which ``forced`` had no alternative and cost
        no run of their own; ``cached``, those of the prompt that had been read before; and ``decoder_runs``.
    pixel_spacing_mm
        (row, column) distance between pixel centres in the patient; None if unknown.
    area_mm2
        Area of the mask; None without a spacing.
    warnings
        What had to be assumed, and fall-backs, one sentence each.
    n_samples
        How many answers were drawn for this one.
    votes
        (H, W) uint8: in how many of their masks a pixel is; None for a single answer. `mask` is where more than half
        agree; box, points, score and answer are of the one that agrees the most with the others.
    concord
        Mean Dice coefficient of two of those masks, in [0, 1]; None for a single answer.
    confidence
        Dice coefficient that answers of such a concord had on held-out data, in [0, 1]; None for a single answer, or if
        the bundle was not calibrated for it.
    image, query
        What was asked about.
    model_name, model_version, model_digest
        The bundle, and the SHA-256 of its manifest.
    """

    found: bool
    box: Box | None
    points: tuple[Point, Point] | None
    mask: NDArray[np.bool_] = field(repr=False)
    score: float
    reasoning: str | None = field(repr=False)
    answer: str
    absent_probability: float | None
    timings_ms: Mapping[str, float] = field(repr=False)
    tokens: Mapping[str, int] = field(repr=False)
    pixel_spacing_mm: tuple[float, float] | None
    area_mm2: float | None
    warnings: tuple[str, ...]
    image: Image = field(repr=False)
    query: str = field(repr=False)
    model_name: str
    model_version: str
    model_digest: str = field(repr=False)
    n_samples: int = 1
    votes: NDArray[np.uint8] | None = field(default=None, repr=False)
    concord: float | None = None
    confidence: float | None = None

    @property
    def agreement(self) -> NDArray[np.float32] | None:
        """(H, W) share of the drawn masks that a pixel is in, in [0, 1]; None for a single answer."""
        return None if self.votes is None else self.votes.astype(np.float32) / np.float32(self.n_samples)

    def to_dict(self, *, include_query: bool = False) -> dict[str, Any]:
        """Everything but the image as plain data for JSON; the mask as COCO's compressed run lengths.

        Parameters
        ----------
        include_query
            Whether the query goes with it; it may hold what identifies a patient.
        """
        query = {"query": self.query} if include_query else {}
        return {
            **query,
            "found": self.found,
            "box": None if self.box is None else list(self.box),
            "points": None if self.points is None else [list(point) for point in self.points],
            "mask": ops.rle_encode(self.mask),
            "score": self.score,
            "reasoning": self.reasoning,
            "answer": self.answer,
            "absent_probability": self.absent_probability,
            "samples": self.n_samples,
            "concord": self.concord,
            "confidence": self.confidence,
            "pixel_spacing_mm": None if self.pixel_spacing_mm is None else list(self.pixel_spacing_mm),
            "area_mm2": self.area_mm2,
            "warnings": list(self.warnings),
            "timings_ms": {stage: round(value, 3) for stage, value in self.timings_ms.items()},
            "tokens": dict(self.tokens),
            "model": {"name": self.model_name, "version": self.model_version, "digest": self.model_digest},
        }

    def overlay(self, *, max_side: int | None = None) -> "PIL.Image.Image":
        """Picture of the image with mask, box and points drawn on it.

        Parameters
        ----------
        max_side
            Longest side of the picture, pixels; None: the image's own size.
        """
        from medreasoner.render import overlay

        return overlay(self, max_side=max_side)

    def save(self, path: str | os.PathLike[str], *, format: str | None = None, include_query: bool = False) -> None:
        """Write the result in the form that the path's ending names.

        Raises
        ------
        OutputError
            If the form is unknown, does not suit the image, or the file cannot be written.
        MissingExtraError
            If the form needs an optional package.
        """
        from medreasoner.outputs import save

        save(self, path, format=format, include_query=include_query)
