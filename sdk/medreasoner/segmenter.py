"""The promptable segmenter: an image once, then masks for boxes and points."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.errors import ArrayError, GenerationError
from medreasoner.geometry import Placement, place
from medreasoner.image.record import Image
from medreasoner.session import Session
from medreasoner.spec import SegmenterSpec

__all__ = ["Embedded", "Segmenter", "encoder_input"]

T = TypeVar("T")

_SMALLEST_RANGE = 1e-8  # of an image of one grey, as MedSAM has it
_PROMPTS_AT_ONCE = 4  # more gain nothing on a CPU
_PAD, _POSITIVE, _TOP_LEFT, _BOTTOM_RIGHT = -1, 1, 2, 3  # labels of SAM's own ONNX decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """An image as the segmenter has read it, and where it lies in the grid.

    `features` are the encoder's outputs by their names, (1, ...) float32; the decoder's inputs have the same names.
    """

    features: Mapping[str, NDArray[np.float32]] = field(repr=False)
    placement: Placement


def encoder_input(spec: SegmenterSpec, image: Image) -> tuple[NDArray[np.float32], Placement]:
    """What a segmenter's encoder sees of an image, (3, grid height, grid width), and where the image lies in it."""
    placement = place(spec.resize, height=image.height, width=image.width)
    fixed = spec.rescale == "fixed"
    planes = ops.preprocess_planes(
        image.pixels,
        placement.grid_height,
        placement.grid_width,
        content=(placement.content_height, placement.content_width),
        mean=spec.image_mean if fixed else (0.0, 0.0, 0.0),
        std=spec.image_std if fixed else (1.0, 1.0, 1.0),
    )
    if not fixed:  # padding stays 0
        content = planes[:, : placement.content_height, : placement.content_width]
        low, high = float(content.min()), float(content.max())
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (spec.image_mean, spec.image_std))
        content[:] = ((content - low) / max(high - low, _SMALLEST_RANGE) - mean) / std
    return planes, placement


class Segmenter:
    """A loaded segmenter of the SAM family.

    Parameters
    ----------
    spec
        Of the bundle.
    encoder, decoder
        Sessions of its graphs.
    n_threads
        That share the votes of several masks.
    """

    def __init__(self, spec: SegmenterSpec, *, encoder: Session, decoder: Session, n_threads: int = 1) -> None:
        self._spec, self._encoder, self._decoder, self._n_threads = spec, encoder, decoder, n_threads

    def encode(self, image: Image, encoder: Session | None = None) -> Embedded:
        """Read an image, with another session of the encoder's graph if one is given."""
        planes, placement = encoder_input(self._spec, image)
        outputs = (encoder or self._encoder).bind({}, {}).run({"pixel_values": planes[None]})
        return Embedded(features=outputs, placement=placement)

    def decode(
        self, image: Embedded, *, corners: NDArray[np.float64] | None, points: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float32], float]:
        """Mask for a box, two points, or both; of both, only what the bundle's prompt mode names is used.

        Parameters
        ----------
        image
            As `encode` made it.
        corners, points
            (2, 2) float64 of x, y in the image: top left and bottom right; two points inside the target. Either may be
            None.

        Returns
        -------
        logits : (mask_size, mask_size) float32
            Of the mask with the highest predicted intersection over union, over the whole grid.
        score : float
            That prediction, clipped to [0, 1].

        Raises
        ------
        ArrayError
            If there is no prompt, or none that this segmenter takes.
        GenerationError
            If the graph returned numbers that are not finite.
        """
        logits, scores = self.decode_batch(
            image,
            corners=None if corners is None else corners[None],
            points=None if points is None else points[None],
        )
        return logits[0], float(scores[0])

    def decode_batch(
        self, image: Embedded, *, corners: NDArray[np.float64] | None, points: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same for several boxes (batch, 2, 2), each with its points (batch, 2, 2), in one image."""
        places, labels = self._prompts(image.placement, corners, points)
        at_once = min(self._decoder.max_rows or _PROMPTS_AT_ONCE, _PROMPTS_AT_ONCE)
        parts = [
            self._decode(image, places[start : start + at_once], labels) for start in range(0, len(places), at_once)
        ]
        logits, scores = zip(*parts, strict=True)
        return (logits[0], scores[0]) if len(parts) == 1 else (np.concatenate(logits), np.concatenate(scores))

    def _decode(
        self, image: Embedded, places: NDArray[np.float64], labels: list[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Masks for prompts (batch, n_points, 2) in the grid."""
        given: dict[str, NDArray[Any]] = {
            **image.features,
            "points": places.astype(np.float32),
            "labels": np.array([labels] * len(places), np.int64),
        }
        outputs = self._decoder.bind({}, {}).run(given)
        scores, logits = outputs["predicted_iou"], outputs["mask_logits"]
        if scores.shape[1] == 1:
            best, logits = scores[:, 0], logits[:, 0]
        else:
            every, chosen = np.arange(len(places)), scores.argmax(axis=1)
            best, logits = scores[every, chosen], logits[every, chosen]
        if not (np.isfinite(scores).all() and np.isfinite(logits).all()):
            raise GenerationError("the segmenter's numbers are not finite; the model or its precision is at fault")
        return np.ascontiguousarray(logits), np.minimum(np.maximum(best, 0.0), 1.0)

    def _prompts(
        self, placement: Placement, corners: NDArray[np.float64] | None, points: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], list[int]]:
        """Places (batch, n_points, 2) in the grid, and what each of the points is."""
        places: list[NDArray[np.float64]] = []
        labels: list[int] = []
        takes, boxed = self._spec.prompts, False
        if points is not None and takes != "box":
            places, labels = [placement.to_grid(points)], [_POSITIVE, _POSITIVE]
        if corners is not None and takes != "points":
            places, labels, boxed = [*places, placement.to_grid(corners)], [*labels, _TOP_LEFT, _BOTTOM_RIGHT], True
        if not places:
            wanted = {"box": "a box", "points": "two points"}.get(takes, "a box, two points or both")
            raise ArrayError(f"nothing to segment by: this bundle's segmenter takes {wanted}")
        if not boxed or self._spec.architecture == "sam2":  # SAM expects a padding point where there is no box
            places, labels = [*places, np.zeros((len(places[0]), 1, 2))], [*labels, _PAD]
        return np.concatenate(places, axis=1), labels

    def mask(self, logits: NDArray[np.float32], image: Embedded) -> NDArray[np.bool_]:
        """(height, width) mask in the image's own grid."""
        return self._enlarged(ops.mask_from_logits, logits, image)

    def votes(self, logits: NDArray[np.float32], image: Embedded) -> NDArray[np.uint8]:
        """(height, width) uint8: in how many masks of `decode_batch` each pixel of the image is."""
        return self._enlarged(partial(ops.count_masks, n_threads=self._n_threads), logits, image)

    def _enlarged(self, enlarge: Callable[..., T], logits: NDArray[np.float32], image: Embedded) -> T:
        placement = image.placement
        return enlarge(
            logits,
            crop=placement.mask_crop(self._spec.mask_size),
            height=placement.image_height,
            width=placement.image_width,
        )

    def small(self, logits: NDArray[np.float32], image: Embedded) -> NDArray[np.bool_]:
        """The masks in the segmenter's own grid, as far as the image reaches in it."""
        rows, columns = (math.ceil(each) for each in image.placement.mask_crop(self._spec.mask_size))
        return logits[:, :rows, :columns] > 0
