"""One question, its answer, and the answer held against the truth."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner import Grounding, Study, ops
from medreasoner.errors import ArrayError
from medreasoner.geometry import Box, Point
from medreasoner_train.data import Sample
from medreasoner_train.evalset import Truth
from medreasoner_train.metrics import dice, disc_overlap, surface_dice
from medreasoner_train.prior import box_iou
from medreasoner_train.targets import GRID, box_of, inscribed_points
from medreasoner_train.traces import TraceCheck, check_trace

__all__ = ["Row", "answered", "measures", "overlaps", "prompt_dice", "true_prompt_dice"]

Mask = npt.NDArray[np.bool_]
NAN = float("nan")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question and what came of it.

    A failed answer, and "absent" where the target is there, score 0. What was not measured is NaN: all scores of absent
    targets, of controls all but `iou` and `dice`, and those of masks where the data have none.

    kind
        ``"present"``; ``"absent (same region)"``, ``"absent (elsewhere)"``, or ``"absent (given)"`` by a row of the
        data; or a control: ``"blank image"``, ``"swapped image"``, ``"other query"``.
    key, super_category
        What is asked for; a key is ``"modality/category"``.
    id
        Name of the data row; of an absent target, that of the image's first row.
    failed
        The reasoner gave no usable answer: neither found nor absent.
    box, points, mask
        The answer, in the image's own pixels; the mask as COCO's compressed run lengths. None if nothing was found.
    iou, dice
        Overlap of box and mask with the truth.
    dice_box, dice_points
        Dice of the mask by the answer's box alone, and by its points alone; NaN if the bundle's segmenter takes none.
    pdice_paper, pdice_corrected
        Overlap of the discs over the points (:func:`medreasoner_train.metrics.disc_overlap`).
    nsd
        Normalised surface distance of the mask (:func:`medreasoner_train.metrics.surface_dice`).
    prior_iou
        What the category's median box reaches.
    true_prompt_dice
        Dice of the segmenter given the true box and points.
    others
        Dice with each other structure that is labelled in the image.
    trace
        Of an answer with a thought before it, what of its place and size is right.
    """

    kind: str
    key: str
    group: str
    source: str
    found: bool
    absent_probability: float
    id: str = ""
    super_category: str = ""
    query: str = ""
    failed: bool = False
    box: Box | None = None
    points: tuple[Point, Point] | None = None
    mask: ops.Rle | None = dataclasses.field(default=None, repr=False)
    reasoning: str | None = None
    iou: float = NAN
    dice: float = NAN
    dice_box: float = NAN
    dice_points: float = NAN
    pdice_paper: float = NAN
    pdice_corrected: float = NAN
    nsd: float = NAN
    prior_iou: float = NAN
    true_prompt_dice: float = NAN
    others: tuple[float, ...] = ()
    trace: TraceCheck | None = None
    total_ms: float = NAN

    @property
    def modality(self) -> str:
        """First part of the key."""
        return self.key.partition("/")[0]

    @property
    def said_absent(self) -> bool:
        """Whether the answer was that the target is not in the image."""
        return not (self.found or self.failed)


def answered(kind: str, sample: Sample, query: str, result: Grounding | None) -> Row:
    """The row of an answer, without any score; no result: the reasoner failed."""
    about: dict[str, Any] = {
        "kind": kind,
        "key": sample.key,
        "group": sample.group,
        "source": sample.source,
        "id": sample.id,
        "super_category": sample.super_category,
        "query": query,
    }
    if result is None:
        return Row(**about, found=False, failed=True, absent_probability=NAN)
    return Row(
        **about,
        found=result.found,
        absent_probability=NAN if result.absent_probability is None else result.absent_probability,
        box=result.box,
        points=result.points,
        mask=ops.rle_encode(result.mask) if result.found else None,
        reasoning=result.reasoning,
        total_ms=result.timings_ms["total"],
    )


def overlaps(row: Row, result: Grounding | None, truth: Truth, usual: npt.NDArray[np.float64] | None) -> Row:
    """The row with the overlap of box and mask with the truth.

    `usual` is the category's median box (4,), relative to the image; None: it is not known, and overlaps nothing.
    """
    height, width = truth.shape
    box, sides = np.array([truth.box]), np.array([width, height, width, height])
    own = dataclasses.replace(
        row,
        iou=0.0 if row.box is None else float(box_iou(np.array([row.box], np.float64), box)[0]),
        prior_iou=0.0 if usual is None else float(box_iou(usual[None] * sides, box)[0]),
    )
    if truth.mask is None:
        return own
    return dataclasses.replace(own, dice=0.0 if result is None else dice(result.mask, truth.mask))


def measures(row: Row, result: Grounding | None, study: Study, truth: Truth, *, tolerance: float) -> Row:
    """The row with everything else that one asks of an answer; `tolerance` in pixels of the 840-px grid."""
    if truth.points is not None:
        row = _points_measured(row, truth.points, truth.shape)
    if truth.mask is None:
        return row
    row = dataclasses.replace(
        row,
        true_prompt_dice=prompt_dice(study, truth.mask, truth.box, _pair(truth.points)),
        trace=None if row.reasoning is None else check_trace(row.reasoning, truth.mask),
    )
    if result is None or row.box is None or row.points is None:
        return dataclasses.replace(row, dice_box=0.0, dice_points=0.0, nsd=0.0)
    return dataclasses.replace(
        row,
        dice_box=prompt_dice(study, truth.mask, row.box, None),
        dice_points=prompt_dice(study, truth.mask, None, row.points),
        nsd=surface_dice(result.mask, truth.mask, tolerance=tolerance),
    )


def _points_measured(row: Row, points: npt.NDArray[np.float64], shape: tuple[int, int]) -> Row:
    if row.points is None:
        return dataclasses.replace(row, pdice_paper=0.0, pdice_corrected=0.0)
    to_grid = np.array([GRID / shape[1], GRID / shape[0]])
    discs = disc_overlap(np.array(row.points) * to_grid, points * to_grid)
    return dataclasses.replace(row, pdice_paper=discs.paper, pdice_corrected=discs.corrected)


def prompt_dice(study: Study, mask: Mask, box: Box | None, points: tuple[Point, Point] | None) -> float:
    """Dice of the segmenter's mask for these prompts; NaN if the bundle's segmenter takes none of them."""
    try:
        segmented, _ = study.segment(box=box, points=points)
    except ArrayError:
        return NAN
    return dice(segmented, mask)


def true_prompt_dice(study: Study, mask: Mask) -> float:
    """Dice of the segmenter given the true box and points of a non-empty (H, W) mask, in the study's image."""
    return prompt_dice(study, mask, box_of(mask), _pair(inscribed_points(mask)))


def _pair(points: npt.NDArray[np.float64] | None) -> tuple[Point, Point] | None:
    if points is None:
        return None
    (ax, ay), (bx, by) = points.tolist()
    return (ax, ay), (bx, by)
