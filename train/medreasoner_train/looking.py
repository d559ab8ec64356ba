"""Looks at the image and the mask of a row: their sizes, and what the mask gives where the row has no box or points."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medreasoner.errors import ImageReadError, MissingExtraError
from medreasoner_train.files import appearing
from medreasoner_train.picture import Picture
from medreasoner_train.rows import Box, Draft, Fault, Points
from medreasoner_train.targets import box_of, inscribed_points

__all__ = ["Facts", "look_at", "placed"]

THREADS = 4
VERSION = 1  # of the remembered facts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of one row: the image's height and width, a digest of its pixels, and box and points of its mask, if it has one.

    The points, which take longest, are worked out only for rows that have none of their own.
    """

    height: int
    width: int
    digest: str
    box: Box | None
    points: Points | None


def look_at(
    drafts: Sequence[Draft],
    *,
    memory: Path | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Facts | Fault]:
    """Decode image and mask of every row.

    Parameters
    ----------
    drafts
        N rows.
    memory
        File (.json) in which facts are kept from one time to the next; those of files that changed are looked up anew.
    progress
        Wraps what is iterated over, to show how far it is.

    Returns
    -------
    found : list of N
        The facts of each row, or what is wrong with its image or mask.

    Raises
    ------
    MissingExtraError
        If the images need an optional package: nibabel for NIfTI.
    """
    known = _remembered(memory)
    fresh: dict[str, Facts] = {}

    def look(draft: Draft) -> Facts | Fault:
        try:
            if draft.image.missing():
                raise Fault("missing image", "no such file")
            if draft.mask is not None and draft.mask.missing():
                raise Fault("missing mask", "no such file")
            key = _key(draft)
            facts = known.get(key) or _look(draft)
        except Fault as err:
            return err
        fresh[key] = facts
        return facts

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(progress(pool.map(look, drafts)))
    if memory is not None and not fresh.keys() <= known.keys():
        _remember(memory, {**known, **fresh})
    return found


def _look(draft: Draft) -> Facts:
    try:
        image = draft.image.read()
    except MissingExtraError:
        raise
    except ImageReadError as err:
        raise Fault("unreadable image", _reason(err, draft.image)) from err
    box, points = None, None
    if draft.mask is not None:
        try:
            mask = draft.mask.mask()
        except MissingExtraError:
            raise
        except ImageReadError as err:
            raise Fault("unreadable mask", _reason(err, draft.mask)) from err
        if mask.shape != (image.height, image.width):
            raise Fault(
                "size mismatch",
                f"the mask is {mask.shape[0]} x {mask.shape[1]} (rows x columns), "
                f"the image {image.height} x {image.width}",
            )
        if not mask.any():
            raise Fault("empty mask", "no pixel of the mask is set")
        box = box_of(mask)
        if draft.points is None:
            (x1, y1), (x2, y2) = inscribed_points(mask).tolist()
            points = ((x1, y1), (x2, y2))
    return Facts(height=image.height, width=image.width, digest=image.digest()[:16], box=box, points=points)


def _reason(err: ImageReadError, picture: Picture) -> str:
    """The reader's message without the file's name, which may be a patient's; the row is named anyway."""
    name = "bytes" if picture.path is None else picture.path.name
    return str(err).removeprefix(f"{name}: ")


def placed(draft: Draft, facts: Facts) -> tuple[Box | None, Points | None]:
    """Box and points of a row in its image's pixels: its own, else those of its mask; None and None: absent.

    Raises
    ------
    Fault
        If they lie outside the image, the box has no area, or there are points alone.
    """
    width, height = (facts.width, facts.height) if draft.grid is None else (draft.grid, draft.grid)
    box, points = facts.box, facts.points
    if draft.box is not None:
        x1, y1, x2, y2 = draft.box
        if not (x1 < x2 and y1 < y2):
            raise Fault("bad box", f"the box {_shown(draft.box)} has no area")
        if min(draft.box) < 0 or x2 > width or y2 > height:
            raise Fault(
                "bad box", f"the box {_shown(draft.box)} leaves the image of {width:g} x {height:g} pixels (x, y)"
            )
        box = (*_scaled((x1, y1), draft, facts), *_scaled((x2, y2), draft, facts))
    if draft.points is not None:
        for x, y in draft.points:
            if not (0 <= x < width and 0 <= y < height):
                raise Fault(
                    "bad point", f"{_shown((x, y))} lies outside the image of {width:g} x {height:g} pixels (x, y)"
                )
        if box is None:
            raise Fault("bad box", "there are points, but neither a box nor a mask")
        points = (_scaled(draft.points[0], draft, facts), _scaled(draft.points[1], draft, facts))
    return box, points


def _scaled(point: tuple[float, float], draft: Draft, facts: Facts) -> tuple[float, float]:
    if draft.grid is None:
        return point
    return point[0] * facts.width / draft.grid, point[1] * facts.height / draft.grid


def _shown(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _key(draft: Draft) -> str:
    mask = "" if draft.mask is None else draft.mask.fingerprint()
    return f"{draft.image.fingerprint()}||{mask}||{draft.points is None}"


def _remembered(memory: Path | None) -> dict[str, Facts]:
    """What was written by `_remember`; nothing if there is no such file or it is of another kind."""
    if memory is None or not memory.exists():
        return {}
    try:
        table = json.loads(memory.read_text(encoding="utf-8"))
        rows = table["facts"].items() if table["version"] == VERSION else ()
        return {key: _facts(*row) for key, row in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _facts(height: int, width: int, digest: str, box: Any, points: Any) -> Facts:
    return Facts(
        height=height,
        width=width,
        digest=digest,
        box=None if box is None else (box[0], box[1], box[2], box[3]),
        points=None if points is None else ((points[0][0], points[0][1]), (points[1][0], points[1][1])),
    )


def _remember(memory: Path, facts: dict[str, Facts]) -> None:
    rows = {key: [one.height, one.width, one.digest, one.box, one.points] for key, one in facts.items()}
    with appearing(memory) as beside:
        beside.write_text(json.dumps({"version": VERSION, "facts": rows}), encoding="utf-8")
