"""The rewards of MedReasoner, as pure functions: of the form of an answer, and of its box, points and mask.

All geometry is brought to the 840-pixel grid of the original's images first, to which its thresholds in pixels belong.
The published code has two faults, which ``compat="paper-code"`` reproduces and the default does not: its overlap of two
discs reaches 2, and in base mode its rewards on geometry are always 0.

References
----------
MedReasoner (arXiv 2508.08177), section on rewards, and the code published with it.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from medreasoner_train.targets import GRID

__all__ = [
    "Compat", "Mode", "Reward", "Truth", "box_reward", "disc_dice", "format_segment", "format_thinking", "geometry_of",
    "parse_answer", "penalize", "points_reward", "score", "smooth_exp", "smooth_log",
]  # fmt: skip

Mode = Literal["base", "soft", "hard"]
Compat = Literal["paper-code"]
Numbers = Sequence[float]
Pair = tuple[tuple[float, float], tuple[float, float]]
Box = tuple[float, float, float, float]

KEYS = ("bbox", "points_1", "points_2")
LONGEST = 20_000  # characters between the answer's tags: beyond, nobody meant an answer
SMALL = 1e-5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What is right: box (x1, y1, x2, y2), half-open, and two points (x, y) in a grid of `size` (width, height).

    The numbers of an answer are in that grid too. No box: the target is absent. A box without points: the data have
    none, and points earn nothing.
    """

    box: Box | None
    points: Pair | None
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.box is None and self.points is not None:
            raise ValueError("points without a box: a truth has a box, or is absent")
        if min(self.size) < 1:
            raise ValueError(f"size {self.size}: width and height are at least 1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """An answer's rewards, each in [0, 1] but in hard and base mode, where box and points are sums of two or three.

    thinking, segment: of the form; box, points: of the geometry; mask: the Dice of the segmenter's mask.
    """

    thinking: float = 0.0
    segment: float = 0.0
    box: float = 0.0
    points: float = 0.0
    mask: float = 0.0

    @property
    def total(self) -> float:
        """Their plain sum."""
        return self.thinking + self.segment + self.box + self.points + self.mask


def smooth_log(value: float, k: float = 3.0) -> float:
    """From 0.1 at 0 to 1.0 at 1, steepest at 0.

    >>> smooth_log(0.0), smooth_log(1.0)
    (0.1, 1.0)
    """
    return 0.1 + 0.9 * math.log(k * value + 1) / math.log(k + 1)


def smooth_exp(value: float, k: float = 3.0, c: float = 1.0) -> float:
    """From 1.0 at 0 to 0.1 at 2, steepest at `c`.

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


def format_thinking(text: str) -> float:
    """0 without ``<think>…</think>``, 0.2 if nothing stands between the tags, else 1."""
    _, opened, rest = text.partition("<think>")
    thought, closed, _ = rest.partition("</think>")
    if not (opened and closed):
        return 0.0
    return 1.0 if thought.strip() else 0.2


def parse_answer(text: str) -> Any:
    """What stands between the answer's tags as JSON, single quotes taken for double; None without tags or JSON.

    Of several answers the last counts: a thought may mention the tags, and what is said last is meant.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    body = text[start + len("<answer>") : end]
    if len(body) > LONGEST:
        return None
    try:
        return json.loads(body.replace("'", '"'))
    except (ValueError, RecursionError):
        return None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers, or None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in value):
        return None
    try:
        found = tuple(float(each) for each in value)
    except OverflowError:  # an integer beyond every float
        return None
    return found if all(math.isfinite(each) for each in found) else None


def _absent(answer: Any) -> bool:
    return isinstance(answer, dict) and all(key in answer and answer[key] is None for key in KEYS)


def format_segment(text: str, *, compat: Compat | None = None) -> float:
    """Of the answer: 0 no tags, 0.2 no JSON object, 0.4 a key missing or no part valid, 0.6 one part invalid, 1 valid.

    The parts are the box (4 numbers) and the two points (2 numbers each); nothing is asked of their order or range. An
    answer whose parts are all null is valid: our form for what is absent, which the published code does not know.
    """
    end = text.rfind("</answer>")
    if end < 0 or text.rfind("<answer>", 0, end) < 0:
        return 0.0
    answer = parse_answer(text)
    if not isinstance(answer, dict):
        return 0.2
    if any(key not in answer for key in KEYS):
        return 0.4
    if compat is None and _absent(answer):
        return 1.0
    box, first, second = _parts(answer)
    valid = (box is not None) + (first is not None and second is not None)
    return (0.4, 0.6, 1.0)[valid]


def _parts(answer: Any) -> tuple[Any, Any, Any]:
    """Box and points of an answer, each None where it is no valid one."""
    if not isinstance(answer, dict):
        return None, None, None
    return _numbers(answer.get("bbox"), 4), _numbers(answer.get("points_1"), 2), _numbers(answer.get("points_2"), 2)


def geometry_of(text: str) -> tuple[Box, Pair] | None:
    """Box and points of a text's answer, if both are valid."""
    box, first, second = _parts(parse_answer(text))
    return None if box is None or first is None or second is None else (box, (first, second))


def _area(box: Numbers) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _iou(a: Numbers, b: Numbers) -> float:
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def _inside(point: Numbers, box: Numbers) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _mean_apart(a: Numbers, b: Numbers) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def box_reward(box: Box, truth: Truth, *, mode: Mode) -> float:
    """Reward of a box, both in the 840-pixel grid.

    soft: `smooth_log` of the overlap. hard: that, the corners' distance in diagonals of the true box, and how far area
    and aspect are off. Each is penalized where a true point lies outside the box and where its area is not within half
    and double. base: one for an overlap above 0.5, and one for corners that are off by less than 10 px on average.
    """
    assert truth.box is not None
    overlap, apart = _iou(box, truth.box), _mean_apart(box, truth.box)
    if mode == "base":
        return float(overlap > 0.5) + float(apart < 10)
    position = math.prod(1.0 if _inside(point, box) else 0.5 for point in truth.points or ())
    mine, real = _area(box), _area(truth.box)
    area = 1.0 if 0.5 * real < mine < 2 * real else 0.5
    found = penalize(smooth_log(overlap), position, area)
    if mode == "soft":
        return found
    diagonal = math.hypot(truth.box[2] - truth.box[0], truth.box[3] - truth.box[1])
    align = smooth_exp(min(apart / diagonal, 2.0)) if diagonal > 0 else 0.0
    scale = smooth_exp(min(_scale_error(box, truth.box), 1.0), c=0.5)
    return found + penalize(align, position, area) + penalize(scale, position, area)


def _scale_error(box: Numbers, truth: Numbers) -> float:
    """How far the logarithms of area and aspect are apart; endless for a box without an area."""
    sides = (box[2] - box[0], box[3] - box[1], truth[2] - truth[0], truth[3] - truth[1])
    if min(sides) <= 0:
        return math.inf
    width, height, wide, high = (math.log(side) for side in sides)
    return math.hypot(width + height - wide - high, width - height - wide + high)


def disc_dice(a: Pair, b: Pair, *, compat: Compat | None = None) -> float:
    """Overlap of two discs, each with its pair of points as diameter: 2 |A ∩ B| / (|A| + |B|), in [0, 1].

    With ``compat="paper-code"`` 2 |A ∩ B| / |A ∪ B|, which reaches 2: every published pDice is that.
    """
    (ax, ay, ar), (bx, by, br) = _disc(a), _disc(b)
    apart = math.hypot(ax - bx, ay - by)
    areas = math.pi * ar * ar, math.pi * br * br
    shared = _lens(ar, br, apart)
    if compat is not None:
        return 2 * shared / (sum(areas) - shared + SMALL)
    return min(1.0, 2 * shared / (sum(areas) + SMALL))


def _disc(pair: Pair) -> tuple[float, float, float]:
    (x, y), (u, v) = pair
    return (x + u) / 2, (y + v) / 2, math.hypot(x - u, y - v) / 2 + SMALL


def _lens(a: float, b: float, apart: float) -> float:
    """Area shared by discs of radii a and b whose centres lie so far apart."""
    if apart >= a + b:
        return 0.0
    if apart <= abs(a - b):
        return math.pi * min(a, b) ** 2

    def segment(r: float, other: float) -> float:
        cosine = (apart * apart + r * r - other * other) / (2 * apart * r)
        half = math.acos(min(1.0, max(-1.0, cosine)))
        return r * r * (half - math.sin(2 * half) / 2)

    return segment(a, b) + segment(b, a)


def points_reward(points: Pair, truth: Truth, *, mode: Mode, compat: Compat | None = None) -> float:
    """Reward of two points, in the 840-pixel grid.

    soft: `smooth_log` of the discs' overlap. hard: that, the points' distance in diagonals of the true box under the
    better order, and the angle between the two pairs. Each is penalized where a point lies outside the true box and
    where the two are not more than 10 px apart. base: one for points that are off by less than 100 px on average, under
    the better order, and inside the true box.
    """
    assert truth.box is not None
    assert truth.points is not None
    flat, swapped = (*points[0], *points[1]), (*points[1], *points[0])
    real = (*truth.points[0], *truth.points[1])
    apart = min(_mean_apart(flat, real), _mean_apart(swapped, real))
    inside = [_inside(point, truth.box) for point in points]
    if mode == "base":
        return float(apart < 100 and all(inside))
    position = math.prod(1.0 if each else 0.5 for each in inside)
    spread = 1.0 if math.dist(*points) > 10 else 0.5
    overlap = disc_dice(points, truth.points, compat=compat)
    found = penalize(smooth_log(overlap), position, spread)
    if mode == "soft":
        return found
    diagonal = math.hypot(truth.box[2] - truth.box[0], truth.box[3] - truth.box[1])
    align = smooth_exp(min(apart / diagonal, 2.0)) if diagonal > 0 else 0.0
    angle = smooth_log(_cosine(points, truth.points))
    return found + penalize(align, position, spread) + penalize(angle, position, spread)


def _cosine(a: Pair, b: Pair) -> float:
    """|cos| of the angle between two pairs' directions; 0 where a pair has none."""
    (ux, uy), (vx, vy) = ((p[1][0] - p[0][0], p[1][1] - p[0][1]) for p in (a, b))
    lengths = math.hypot(ux, uy) * math.hypot(vx, vy)
    return min(1.0, abs(ux * vx + uy * vy) / lengths) if lengths > 0 else 0.0


def score(
    text: str,
    truth: Truth,
    *,
    mode: Mode = "soft",
    think: bool = True,
    compat: Compat | None = None,
    mask_dice: float | None = None,
) -> Reward:
    """All rewards of a text.

    Parameters
    ----------
    text
        What the policy wrote, with its tags. No text raises.
    truth
        What is right; its `size` is the grid of the text's numbers.
    mode
        ``"base"`` makes every reward 0 or 1 (form: only the full 1 counts), ``"soft"`` and ``"hard"`` are smooth.
    think
        Whether a thought was asked for; if not, its form earns nothing.
    compat
        ``"paper-code"``: with the published code's faults.
    mask_dice
        Dice of the segmenter's mask, a reward of its own; None: not measured.

    Returns
    -------
    reward
        Absent and answered so: full form and accuracy. A box where nothing is, or the reverse: form only.
    """
    thinking = format_thinking(text) if think else 0.0
    segment = format_segment(text, compat=compat)
    if mode == "base":
        thinking, segment = float(thinking == 1.0), float(segment == 1.0)
    answer = parse_answer(text)
    if truth.box is None:
        right = _absent(answer)
        full = _full(mode, right=right)
        return Reward(thinking=thinking, segment=segment, mask=float(right and mask_dice is not None), **full)
    if mode == "base" and compat is not None:
        return Reward(thinking=thinking, segment=segment, mask=mask_dice or 0.0)
    box, first, second = _parts(answer)
    across, down = GRID / truth.size[0], GRID / truth.size[1]
    points = None
    if truth.points is not None:
        points = (_scaled(truth.points[0], across, down), _scaled(truth.points[1], across, down))
    real = Truth(box=_scaled(truth.box, across, down), points=points, size=(int(GRID), int(GRID)))
    for_box = for_points = 0.0
    if box is not None:
        for_box = box_reward(_scaled(box, across, down), real, mode=mode)
    if points is not None and first is not None and second is not None:
        pair = (_scaled(first, across, down), _scaled(second, across, down))
        for_points = points_reward(pair, real, mode=mode, compat=compat)
    return Reward(thinking=thinking, segment=segment, box=for_box, points=for_points, mask=mask_dice or 0.0)


def _full(mode: Mode, *, right: bool) -> dict[str, float]:
    """The most that box and points can earn, or nothing."""
    most = {"base": (2.0, 1.0), "soft": (1.0, 1.0), "hard": (3.0, 3.0)}[mode]
    return {"box": most[0] * right, "points": most[1] * right}


def _scaled(values: Any, across: float, down: float) -> Any:
    """Coordinates x, y, x, y … times the grid's scales; beyond any image they are held, or areas overflow."""
    far = 1e6
    return tuple(min(far, max(-far, value * (down if index % 2 else across))) for index, value in enumerate(values))
