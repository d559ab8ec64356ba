"""Means with intervals over groups, and the overlap of masks, of their surfaces, and of pairs of points."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medreasoner_train.rewards import disc_dice
from medreasoner_train.targets import GRID

__all__ = ["DiscOverlap", "Interval", "dice", "disc_overlap", "group_mean", "surface_dice"]

Mask = npt.NDArray[np.bool_]

_GRID = int(GRID)


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A mean over samples and its 95 % bootstrap interval over groups."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def dice(a: Mask, b: Mask) -> float:
    """Overlap 2|A∩B| / (|A| + |B|) of two masks of one shape; two empty masks agree fully.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


@dataclasses.dataclass(frozen=True, slots=True)
class DiscOverlap:
    """pDice of two pairs of points: `paper` in [0, 2), as every published figure has it; `corrected` in [0, 1]."""

    paper: float
    corrected: float


def disc_overlap(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> DiscOverlap:
    """Overlap of two discs, each of which has a pair of points as its diameter.

    Parameters
    ----------
    a, b : (2, 2) float64
        Two points (x, y), pixels of the 840-px grid.

    References
    ----------
    MedReasoner, arXiv 2508.08177, pDice: published as 2 I / (union + 1e-5), which is 2 and not 1 on a match, with
    1e-5 px added to each radius. The corrected form is the Dice coefficient, 2 I / (A + B + 1e-5).

    Examples
    --------
    >>> pair = np.array([[100.0, 100.0], [300.0, 100.0]])
    >>> own = disc_overlap(pair, pair)
    >>> round(own.paper, 6), round(own.corrected, 6)
    (2.0, 1.0)
    """
    one, two = (((float(pair[0][0]), float(pair[0][1])), (float(pair[1][0]), float(pair[1][1]))) for pair in (a, b))
    return DiscOverlap(disc_dice(one, two, compat="paper-code"), disc_dice(one, two))


def surface_dice(a: Mask, b: Mask, *, tolerance: float) -> float:
    """Share of both masks' outlines that lies within a tolerance of the other's: the normalised surface distance.

    The outline is the pixels of a mask that have one of their four neighbours, or the edge of the image, beyond it.

    Parameters
    ----------
    a, b : (H, W) bool
        Of one shape. Those of more than 840 pixels a side are thinned out to 840 first.
    tolerance
        Largest distance that still counts as equal, pixels of the 840-px grid to which the image is stretched.

    Returns
    -------
    float
        In [0, 1]; two empty masks agree fully, an empty one and another not at all.

    References
    ----------
    S. Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
    radiotherapy", arXiv 1809.04430 (2018): the surface Dice similarity coefficient at a tolerance.

    Examples
    --------
    >>> m = np.zeros((84, 84), bool); m[20:60, 20:60] = True
    >>> surface_dice(m, np.roll(m, 1, axis=1), tolerance=10), surface_dice(m, np.roll(m, 1, axis=1), tolerance=0) < 0.6
    (1.0, True)
    """
    if not (a.any() and b.any()):
        return float(a.any() == b.any())
    spacing = [_GRID / min(side, _GRID) for side in a.shape]
    a, b = _thinned(a), _thinned(b)
    rows, columns = (np.flatnonzero((a | b).any(axis=axis)) for axis in (1, 0))
    here = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))  # holds both outlines
    outlines = [_outline(mask)[here] for mask in (a, b)]
    near = 0
    for own, other in (outlines, outlines[::-1]):
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)
        near += int((distance[own] <= tolerance).sum())
    return near / sum(int(outline.sum()) for outline in outlines)


def _thinned(mask: Mask) -> Mask:
    """The mask on at most 840 pixels a side, each the one in the middle of what it stands for."""
    rows, columns = (
        ((np.arange(min(side, _GRID)) + 0.5) * side / min(side, _GRID)).astype(np.int64) for side in mask.shape
    )
    return mask[np.ix_(rows, columns)] if mask.shape != (len(rows), len(columns)) else mask


def _outline(mask: Mask) -> Mask:
    inner = ndimage.binary_erosion(mask)  # beyond the image counts as outside
    return mask & ~inner


def group_mean(values: Sequence[float], groups: Sequence[str], *, draws: int = 1000, seed: int = 0) -> Interval:
    """Mean over samples; the interval resamples whole groups, since samples of one patient are not independent.

    Parameters
    ----------
    values, groups
        One of each a sample.
    draws
        Bootstrap resamples.
    seed
        Of the resampling.
    """
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(index).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high), len(values))
