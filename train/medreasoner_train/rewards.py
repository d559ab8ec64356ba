"""The rewards of MedReasoner, as pure functions: of the form of an answer, and of its box, points and mask.

All geometry is brought to the 840-pixel grid of the original's images first, to which its thresholds in pixels belong.
The published code has two faults, which ``compat="paper-code"`` reproduces and the default does not: its overlap of two
discs reaches 2, and in base mode its rewards for IoU and L1 of the box are always 0.

References
----------
MedReasoner (arXiv 2508.08177), section on rewards, and the code published with it.
"""

import dataclasses
import json
import math
from typing import Any, Literal

from medreasoner.errors import ArrayError
from medreasoner.geometry import Box, Point
from medreasoner_train.reward_geometry import (
    Compat,
    Mode,
    Pair,
    Truth,
    box_reward,
    disc_dice,
    penalize,
    points_reward,
    smooth_exp,
    smooth_log,
    to_grid,
)  # fmt: skip
from medreasoner_train.targets import GRID

__all__ = [
    "Compat", "Failure", "Mode", "Reward", "Truth", "box_reward", "disc_dice", "format_segment", "format_thinking",
    "geometry_of", "parse_answer", "penalize", "points_reward", "score", "smooth_exp", "smooth_log",
]  # fmt: skip

Failure = Literal["no_answer", "malformed"]
"""Why a text has no answer: tags are missing; or what stands between them is no JSON object."""

KEYS = ("bbox", "points_1", "points_2")
LONGEST = 1 << 16  # characters between the answer's tags: the runtime reads no longer answer either
MOST: dict[Mode, tuple[float, float]] = {"base": (2.0, 1.0), "soft": (1.0, 1.0), "hard": (3.0, 3.0)}  # box, points


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """An answer's rewards.

    thinking, segment: of the form, in [0, 1]; box: in [0, 1], to 2 in base and 3 in hard mode; points: in [0, 1], to 3
    in hard mode; mask: the Dice of the segmenter's mask, in [0, 1].
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """An answer's form, its valid parts in its own grid, and whether it says that there is nothing."""

    form: float
    box: Box | None = None
    points: Pair | None = None
    absent: bool = False


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Python's own reads NaN and Infinity, and refuses integers of some thousand digits.
_JSON = json.JSONDecoder(parse_constant=_refuse, parse_int=float)


def format_thinking(text: str) -> float:
    """0 without ``<think>…</think>``, 0.2 if nothing stands between the first such tags, else 1."""
    _, opened, rest = text.partition("<think>")
    thought, closed, _ = rest.partition("</think>")
    if not (opened and closed):
        return 0.0
    return 1.0 if thought.strip() else 0.2


def parse_answer(text: str) -> dict[str, Any] | Failure:
    """The JSON object between the answer's tags, single quotes taken for double; or what is wrong.

    What stands between the last ``<answer>`` and the next ``</answer>`` counts, as in the runtime, so that what is
    rewarded is what a user gets. A thought may therefore name the tags, and an answer that was taken back or broken
    off earns nothing. Numbers are floats.

    >>> parse_answer("<answer>{'bbox': null}</answer>"), parse_answer("<answer>left</answer>")
    ({'bbox': None}, 'malformed')
    """
    _, opened, rest = text.rpartition("<answer>")
    body, closed, _ = rest.partition("</answer>")
    if not (opened and closed):
        return "no_answer"
    if len(body) > LONGEST:
        return "malformed"
    try:
        answer = _JSON.decode(body.replace("'", '"'))
    except (ValueError, RecursionError):
        return "malformed"
    return answer if isinstance(answer, dict) else "malformed"


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers, or None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    return tuple(value) if all(isinstance(each, float) and math.isfinite(each) for each in value) else None


def _point(value: Any) -> Point | None:
    found = _numbers(value, 2)
    return None if found is None else (found[0], found[1])


def _read(text: str, compat: Compat | None) -> _Reading:
    answer = parse_answer(text)
    if isinstance(answer, str):
        return _Reading(form=0.0 if answer == "no_answer" else 0.2)
    sides = _numbers(answer.get("bbox"), 4)
    box = None if sides is None else (sides[0], sides[1], sides[2], sides[3])
    first, second = _point(answer.get("points_1")), _point(answer.get("points_2"))
    points = None if first is None or second is None else (first, second)
    if any(key not in answer for key in KEYS):
        return _Reading(form=0.4, box=box, points=points)
    absent = all(answer[key] is None for key in KEYS)
    form = 1.0 if absent and compat is None else (0.4, 0.6, 1.0)[(box is not None) + (points is not None)]
    return _Reading(form=form, box=box, points=points, absent=absent)


def format_segment(text: str, *, compat: Compat | None = None) -> float:
    """Of the answer: 0 no tags, 0.2 no JSON object, 0.4 a key missing or no part valid, 0.6 one part invalid, 1 valid.

    The parts are the box (4 numbers) and the two points (2 numbers each); nothing is asked of their order or range. An
    answer whose parts are all null is valid: our form for what is absent. The published code does not know it, and with
    ``compat="paper-code"`` null is an invalid part.
    """
    return _read(text, compat).form


def geometry_of(text: str) -> tuple[Box, Pair] | None:
    """Box and points of a text's answer in its own grid, if both are valid."""
    found = _read(text, None)
    return None if found.box is None or found.points is None else (found.box, found.points)


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
        What the policy wrote, with its tags. No text raises: what cannot be read or computed earns nothing.
    truth
        What is right; its `size` is the grid of the text's numbers.
    mode
        ``"soft"``: graded form, IoU and discs' overlap; ``"hard"``: distance, scale and angle too. ``"base"``: thinking
        and segment are 1 where their graded form is 1, else 0; for box and points see `box_reward`, `points_reward`.
    think
        Whether a thought was asked for; if not, the thinking part is left out: 0 for every answer.
    compat
        ``"paper-code"``: with the published code's faults, and without its knowing of absent answers' form.
    mask_dice
        Dice of the segmenter's mask in [0, 1], a reward of its own, for answers that have a box or points to make a
        mask from; for a target that is absent only whether it is given counts. None: not measured.

    Returns
    -------
    reward
        Absent and answered so: full form and accuracy, and a mask reward of 1 if masks are measured. A box where
        nothing is, or the reverse: form only.

    Raises
    ------
    ArrayError
        For a mode that there is not, or a `mask_dice` beyond [0, 1].
    """
    if mode not in MOST:
        raise ArrayError(f"mode {mode!r}: expected one of {', '.join(MOST)}")
    if mask_dice is not None and not 0 <= mask_dice <= 1:
        raise ArrayError(f"mask_dice {mask_dice}: a Dice lies in [0, 1]")
    read = _read(text, compat)
    thinking, segment = format_thinking(text) if think else 0.0, read.form
    if mode == "base":
        thinking, segment = float(thinking == 1), float(segment == 1)
    if truth.box is None:
        box, points = MOST[mode] if read.absent else (0.0, 0.0)
        box = 0.0 if mode == "base" and compat else box  # as where there is a target
        mask = float(read.absent and mask_dice is not None)
    else:
        box, points = _accuracy(read, truth, mode, compat)
        mask = 0.0 if mask_dice is None or (read.box is None and read.points is None) else float(mask_dice)
    return Reward(thinking=thinking, segment=segment, box=box, points=points, mask=mask)


def _accuracy(read: _Reading, truth: Truth, mode: Mode, compat: Compat | None) -> tuple[float, float]:
    """Rewards of an answer's box and points, where there is a target."""

    def box_of(own: Box | None) -> Box | None:
        return None if own is None else (*to_grid(own[:2], truth.size), *to_grid(own[2:], truth.size))

    def pair_of(own: Pair | None) -> Pair | None:
        return None if own is None else (to_grid(own[0], truth.size), to_grid(own[1], truth.size))

    real = Truth(box=box_of(truth.box), points=pair_of(truth.points), size=(int(GRID), int(GRID)))
    box, points = box_of(read.box), pair_of(read.points)
    return (
        0.0 if box is None else box_reward(box, real, mode=mode, compat=compat),
        0.0 if points is None else points_reward(points, real, mode=mode, compat=compat, box=box),
    )
