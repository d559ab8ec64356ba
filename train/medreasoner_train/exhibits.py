"""Answers of an evaluation to look at: the best, those in the middle, the worst, the missed and the made up."""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image as PilImage

from medreasoner import ops
from medreasoner.render import draw
from medreasoner_train.evalset import Case
from medreasoner_train.scoring import Row

__all__ = ["Section", "choose", "picture"]

_DRAWN = 640  # longest side of what is drawn, unless a small image is enlarged further; pixels
_LINE = 5
_SIDE = 480  # of a picture in the page
_QUALITY = 85


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Rows that are shown together."""

    name: str
    title: str
    note: str
    rows: list[Row]


def choose(rows: Sequence[Row], count: int) -> list[Section]:
    """Up to `count` rows for each section, of as many categories as there are; none is shown twice."""
    there = [row for row in rows if row.kind == "present" and row.dice == row.dice]  # NaN: there is no mask
    found = [row for row in there if row.found]
    middle = float(np.median([row.dice for row in there])) if there else 0.0
    missed = [row for row in there if row.said_absent]
    made_up = [row for row in rows if row.kind.startswith("absent") and row.found]
    shown: set[int] = set()
    plan = (
        ("best", "Best", "Highest mask Dice.", sorted(found, key=lambda row: -row.dice)),
        ("worst", "Worst", "Lowest mask Dice of answers with a box.", sorted(found, key=lambda r: (r.dice, r.iou))),
        (
            "median",
            "Median",
            f"Mask Dice nearest to the median of all questions, {middle:.3f}.",
            sorted(found, key=lambda row: abs(row.dice - middle)),
        ),
        (
            "missed",
            "Missed",
            "Answered absent, though it is there; Dice 0. First where the model was the surest.",
            sorted(missed, key=lambda row: -row.absent_probability),
        ),
        (
            "made-up",
            "Made up",
            "A box for what is not in the image. First where the model was the surest.",
            sorted(made_up, key=lambda row: row.absent_probability),
        ),
    )
    sections = {name: Section(name=name, title=title, note=note, rows=_varied(ranked, count, shown))
                for name, title, note, ranked in plan}  # fmt: skip
    order = ("best", "median", "worst", "missed", "made-up")
    return [sections[name] for name in order if sections[name].rows]


def _varied(ranked: Sequence[Row], count: int, shown: set[int]) -> list[Row]:
    """The first rows that were not shown, of one category each as long as there are others; in their order."""
    free = [row for row in ranked if id(row) not in shown]
    firsts: dict[str, Row] = {}
    for row in free:
        firsts.setdefault(row.key, row)
    chosen = list(firsts.values())[:count]
    taken = {id(row) for row in chosen}
    for row in free:
        if len(chosen) == count:
            break
        if id(row) not in taken:
            chosen.append(row)
    taken = {id(row) for row in chosen}
    shown |= taken
    return [row for row in free if id(row) in taken]


def picture(row: Row, case: Case) -> str:
    """The answer drawn over its image, and the outline of the truth, as a JPEG in a data URI."""
    pixels = case.pixels()
    truth = case.mask() if row.kind == "present" and case.mask is not None else None
    drawn = draw(
        pixels,
        mask=None if row.mask is None else ops.rle_decode(row.mask),
        box=row.box,
        points=row.points or (),
        truth=truth,
        max_side=_DRAWN,
        line=_LINE,
    )
    drawn.thumbnail((_SIDE, _SIDE), PilImage.Resampling.LANCZOS)
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
