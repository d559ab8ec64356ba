"""What a box and two points earn: the geometry of MedReasoner's rewards, as pure functions.

Coordinates are pixels of the 840-pixel grid of the original's images, to which its thresholds of 10 and 100 px belong;
`to_grid` brings them there. Boxes are half-open (x1, y1, x2, y2), points (x, y).

References
----------
MedReasoner (arXiv 2508.08177), section on rewards, and the code published with it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from medreasoner.errors import ArrayError
from medreasoner.geometry import Box, Point
from medreasoner_train.targets import APART, GRID

__all__ = [
    "Compat", "Mode", "Pair", "Truth", "box_align", "box_iou", "box_reward", "box_scale", "disc_dice", "penalize",
    "points_align", "points_angle", "points_reward", "smooth_exp", "smooth_log", "to_grid",
]  # fmt: skip

Mode = Literal["base", "soft", "hard"]
Compat = Literal["paper-code"]
Pair = tuple[Point, Point]

SMALL = 1e-5  # px on a radius, px² on an area: the published form
FAR = 1e6  # px: nothing further away matters, and areas and products stay finite
BASE_IOU, BASE_BOX_L1, BASE_POINTS_L1 = 0.5, 10.0, 100.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What is right: box (x1, y1, x2, y2), half-open, and two points (x, y) in a grid of `size` (width, height).

    The numbers of an answer are in that grid too. No box: the target is absent. A box without points: the data have
    none, and points earn nothing.

    Raises
    ------
    ArrayError
        For points without a box, a box without an area, numbers that cannot be of such a grid, a size below 1.
    """

    box: Box | None
    points: Pair | None
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ArrayError(f"size {self.size}: width and height are at least 1")
        if self.box is None and self.points is not None:
            raise ArrayError("points without a box: a truth has a box, or is absent")
        numbers = (*(self.box or ()), *(value for point in self.points or () for value in point))
        # So written, it refuses what is not a number too.
        if not all(abs(value) <= 1000 * self.size[index % 2] for index, value in enumerate(numbers)):
            raise ArrayError(f"box {self.box}, points {self.points}: no coordinates of a grid of size {self.size}")
        if self.box is not None and _area(self.box) <= 0:
            raise ArrayError(f"box {self.box}: x1 is less than x2, y1 less than y2; for no target give None")


def to_grid(point: Point, size: tuple[int, int]) -> Point:
    """A point (x, y) of a grid of `size` (width, height) in the 840-pixel grid, held within ±1e6.

    >>> to_grid((126, 63), (252, 126))
    (420.0, 420.0)
    """
    # One rounding each: whole numbers in a grid that is some times finer give the very same result.
    x, y = point[0] * GRID / size[0], point[1] * GRID / size[1]
    return min(FAR, max(-FAR, x)), min(FAR, max(-FAR, y))


def smooth_log(value: float, k: float = 3.0) -> float:
    """From 0.1 at 0 to 1.0 at 1, steepest at 0; `value` is at least 0.

    >>> smooth_log(0.0), smooth_log(1.0)
    (0.1, 1.0)
    """
    return 0.1 + 0.9 * math.log(k * value + 1) / math.log(k + 1)


def smooth_exp(value: float, k: float = 3.0, c: float = 1.0) -> float:
    """From 1.0 at 0 to 0.1 at 2, steepest at `c`; `value` is at most 2.

    >>> smooth_exp(0.0), round(smooth_exp(2.0), 12)
    (1.0, 0.1)
    """

    def s(v: float) -> float:
        return 1 / (1 + math.exp(k * (v - c)))

    return 0.1 + 0.9 * (s(value) - s(2.0)) / (s(0.0) - s(2.0))


def penalize(reward: float, a: float, b: float) -> float:
    """0.7 of a reward, the rest by the mean of two factors; within [0, 1], to four places.

    >>> penalize(1.0, 0.5, 0.25)
    0.8125
    """
    return round(min(1.0, max(0.0, 0.7 * reward + 0.3 * reward * (a + b) / 2)), 4)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; a box whose sides are not positive has no area.

    >>> box_iou((0, 0, 2, 1), (1, 0, 3, 1))
    0.3333333333333333
    """
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def box_align(box: Box, true_box: Box) -> float:
    """`smooth_exp` of the mean distance of the four coordinates, in diagonals of the true box; in [0.1, 1]."""
    return smooth_exp(min(_mean_apart(box, true_box) / _diagonal(true_box), 2.0))


def box_scale(box: Box, true_box: Box) -> float:
    """`smooth_exp` of how far the logarithms of area and aspect are off; in [0.29, 1].

    Raises
    ------
    ValueError
        For an area or aspect that is not positive: it has no logarithm. (With both corners swapped they are positive.)
    """
    if (box[2] - box[0]) * (box[3] - box[1]) <= 0:
        raise ValueError(f"box {box} has no area")
    width, height, wide, high = (
        math.log(abs(side)) for own in (box, true_box) for side in (own[2] - own[0], own[3] - own[1])
    )
    return smooth_exp(min(math.hypot(width + height - wide - high, width - height - wide + high), 1.0), c=0.5)


def box_reward(box: Box, truth: Truth, *, mode: Mode, compat: Compat | None = None) -> float:
    """Reward of a box, both in the 840-pixel grid.

    Parameters
    ----------
    box
        The answer's, of four finite numbers in any order.
    truth
        Whose target is there.
    mode
        ``"soft"``: `smooth_log` of the IoU, in [0, 1]. ``"hard"``: that plus `box_align` and `box_scale`, in [0, 3].
        Each is penalized by 0.5 for each true point outside the box, and by 0.5 unless its area is above half and
        below double the true one. ``"base"``: 1 for an IoU above 0.5 plus 1 for coordinates that are off by less than
        10 px on average, in [0, 2]; no penalties.
    compat
        ``"paper-code"``: base mode gives 0, whatever the box.

    Returns
    -------
    reward
        0 in hard mode for a box whose scale cannot be computed: what fails earns nothing, as published.

    Raises
    ------
    ArrayError
        If the target is absent.
    """
    true_box = _there(truth)
    overlap = box_iou(box, true_box)
    if mode == "base":
        return 0.0 if compat else float(overlap > BASE_IOU) + float(_mean_apart(box, true_box) < BASE_BOX_L1)
    position = math.prod(1.0 if _inside(point, box) else 0.5 for point in truth.points or ())
    area = 1.0 if 0.5 * _area(true_box) < _area(box) < 2 * _area(true_box) else 0.5
    parts = [smooth_log(overlap)]
    if mode == "hard":
        try:
            parts += [box_align(box, true_box), box_scale(box, true_box)]
        except ValueError:
            return 0.0
    return sum(penalize(part, position, area) for part in parts)


def disc_dice(a: Pair, b: Pair, *, compat: Compat | None = None) -> float:
    """Overlap of two discs, each with its pair of points as diameter: 2 |A ∩ B| / (|A| + |B|), in [0, 1].

    Points in pixels of the 840-pixel grid; radii and the denominator are 1e-5 larger. With ``compat="paper-code"``
    2 |A ∩ B| / |A ∪ B|, which reaches 2: every published pDice is that.
    """
    (ax, ay, ar), (bx, by, br) = _disc(a), _disc(b)
    areas = math.pi * ar * ar + math.pi * br * br
    shared = _lens(ar, br, math.hypot(ax - bx, ay - by))
    if compat is not None:
        return 2 * shared / (areas - shared + SMALL)
    return min(1.0, 2 * shared / (areas + SMALL))


def points_align(points: Pair, true_points: Pair, true_box: Box) -> float:
    """`smooth_exp` of the mean distance of the four coordinates, in diagonals of the true box; in [0.1, 1].

    The better order of the two points counts.
    """
    return smooth_exp(min(_pairs_apart(points, true_points) / _diagonal(true_box), 2.0))


def points_angle(points: Pair, true_points: Pair) -> float:
    """`smooth_log` of |cos| of the angle between both pairs' directions; in [0.1, 1], 0.1 where a pair has none."""
    (ux, uy), (vx, vy) = ((p[1][0] - p[0][0], p[1][1] - p[0][1]) for p in (points, true_points))
    lengths = math.hypot(ux, uy) * math.hypot(vx, vy)
    return smooth_log(min(1.0, abs(ux * vx + uy * vy) / lengths) if lengths > 0 else 0.0)


def points_reward(
    points: Pair, truth: Truth, *, mode: Mode, compat: Compat | None = None, box: Box | None = None
) -> float:
    """Reward of two points, in the 840-pixel grid.

    Parameters
    ----------
    points
        The answer's, of finite numbers.
    truth
        Whose target is there; without points of its own it gives 0.
    mode
        ``"soft"``: `smooth_log` of `disc_dice`, in [0, 1]. ``"hard"``: that plus `points_align` and `points_angle`, in
        [0, 3]. Each is penalized by 0.5 for each point outside the true box, and by 0.5 unless the two are more than
        10 px apart. ``"base"``: 1 for coordinates that are off by less than 100 px on average, under the better order,
        with both points inside the answer's own box (as published), else 0.
    compat
        ``"paper-code"``: the overlap of `disc_dice` that reaches 2; the reward stays within its range.
    box
        The answer's own box, for base mode, which gives 0 without one.

    Raises
    ------
    ArrayError
        If the target is absent.
    """
    true_box = _there(truth)
    if truth.points is None:
        return 0.0
    if mode == "base":
        within = box is not None and all(_inside(point, box) for point in points)
        return float(within and _pairs_apart(points, truth.points) < BASE_POINTS_L1)
    position = math.prod(1.0 if _inside(point, true_box) else 0.5 for point in points)
    spread = 1.0 if math.dist(*points) > APART else 0.5
    parts = [smooth_log(disc_dice(points, truth.points, compat=compat))]
    if mode == "hard":
        parts += [points_align(points, truth.points, true_box), points_angle(points, truth.points)]
    return sum(penalize(part, position, spread) for part in parts)


def _there(truth: Truth) -> Box:
    if truth.box is None:
        raise ArrayError("an absent target has no box to compare with; `score` judges answers about it")
    return truth.box


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _diagonal(box: Box) -> float:
    return math.hypot(box[2] - box[0], box[3] - box[1])


def _inside(point: Point, box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _mean_apart(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def _pairs_apart(a: Pair, b: Pair) -> float:
    """Mean distance of the coordinates of two pairs under the better order."""
    first, second = b
    return min(_mean_apart((*a[0], *a[1]), (*one, *two)) for one, two in ((first, second), (second, first)))


def _disc(pair: Pair) -> tuple[float, float, float]:
    (x, y), (u, v) = pair
    return (x + u) / 2, (y + v) / 2, math.hypot(x - u, y - v) / 2 + SMALL


def _lens(a: float, b: float, apart: float) -> float:
    """Area shared by discs of radii a and b whose centres lie so far apart."""
    if apart >= a + b:
        return 0.0
    if apart <= abs(a - b) + 1e-12 * (a + b):  # so near that the cosine below would divide by nothing
        return math.pi * min(a, b) ** 2

    def segment(r: float, other: float) -> float:
        cosine = (apart * apart + r * r - other * other) / (2 * apart * r)
        half = math.acos(min(1.0, max(-1.0, cosine)))
        return r * r * (half - math.sin(2 * half) / 2)

    return segment(a, b) + segment(b, a)
