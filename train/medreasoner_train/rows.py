"""Rows of a data set as they were read, before their images are looked at, and what can be wrong with one."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from medreasoner.errors import MedReasonerError
from medreasoner_train.picture import Picture

__all__ = [
    "UNKNOWN",
    "Box",
    "DataError",
    "Draft",
    "Fault",
    "Points",
    "Problem",
    "ProblemKind",
    "fault",
    "inside",
    "numbers",
]

Box: TypeAlias = tuple[float, float, float, float]
Points: TypeAlias = tuple[tuple[float, float], tuple[float, float]]

UNKNOWN = "unspecified"  # modality, category and the like of a row that does not tell

ProblemKind = Literal[
    "malformed row",
    "broken JSON",
    "duplicate id",
    "path outside the folder",
    "missing image",
    "unreadable image",
    "missing mask",
    "unreadable mask",
    "empty mask",
    "size mismatch",
    "bad box",
    "bad point",
    "unknown category",
]

WAY_OUT: dict[ProblemKind, str] = {
    "malformed row": "mend the row",
    "broken JSON": "write the row again as valid JSON",
    "duplicate id": "give every row an id of its own",
    "path outside the folder": "copy the file into the data set's folder and name it relative to that",
    "missing image": "put the file there or mend the path",
    "unreadable image": "write the image again as DICOM, NIfTI, PNG, JPEG or TIFF",
    "missing mask": "put the file there, mend the path, or leave mask and box empty if the target is absent",
    "unreadable mask": "write the mask again, as PNG of 0 and 255 say",
    "empty mask": "a mask's pixels are above 127, or 0 and 1; leave mask and box empty if the target is absent",
    "size mismatch": "write the mask in the pixel grid of its image",
    "bad box": "a box is x1 < x2, y1 < y2 in pixels of the image, half-open",
    "bad point": "points are two (x, y) in pixels of the image",
    "unknown category": "give the row a question, or write phrasings for its category in queries/train.json",
}
assert set(WAY_OUT) == set(get_args(ProblemKind))


class DataError(MedReasonerError, ValueError):
    """A data set, or a row of one, cannot be used; `problems` holds the rows.

    Parameters
    ----------
    message
        One line: what is wrong, the first row it is wrong with, the way out.
    problems
        Every row that was found wanting.
    """

    def __init__(self, message: str, problems: Sequence["Problem"] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A row that cannot be used: its name (file:line), kind and description of the fault, and the way out."""

    row: str
    kind: ProblemKind
    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.row}: {self.kind}: {self.what}; {self.way_out}"


class Fault(Exception):  # noqa: N818 - never leaves this package: becomes a Problem with its row's name
    """What is wrong with the row that is being read."""

    def __init__(self, kind: ProblemKind, what: str) -> None:
        super().__init__(what)
        self.kind: ProblemKind = kind
        self.what = what

    def of(self, row: str) -> Problem:
        """The problem that this is, given the name of the row."""
        return Problem(row=row, kind=self.kind, what=self.what, way_out=WAY_OUT[self.kind])


def fault(row: str, kind: ProblemKind, what: str) -> Problem:
    """A problem with the way out that belongs to its kind."""
    return Fault(kind, what).of(row)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One row as its file states it.

    `box` and `points` are in pixels of the image, or of a `grid` x `grid` picture that is the image resized. `group`
    None: the image is a group of its own.
    """

    row: str
    id: str
    group: str | None
    source: str
    modality: str
    super_category: str
    category: str
    query: str | None
    thought: str | None
    image: Picture
    mask: Picture | None
    box: Box | None
    points: Points | None
    grid: float | None = None


def inside(root: Path, name: str) -> Path:
    """The file `name` under `root`.

    Raises
    ------
    Fault
        If it lies outside, also by way of a link.
    """
    try:
        path = (root / name).resolve()
        good = path.is_relative_to(root.resolve()) and not Path(name).is_absolute()
    except (OSError, ValueError, RuntimeError) as err:  # a NUL in the name, a loop of links
        raise Fault("malformed row", "a path cannot be followed") from err
    if not good:
        raise Fault("path outside the folder", "a path leads out of the data set's folder")
    return root / name


def numbers(values: Any, count: int, kind: ProblemKind) -> tuple[float, ...]:
    """`count` finite numbers, out of a list or of cells of text.

    Raises
    ------
    Fault
        If they are not that.

    >>> numbers(["1", 2.5], 2, "bad point")
    (1.0, 2.5)
    """
    if not isinstance(values, list | tuple) or len(values) != count:
        raise Fault(kind, f"expected {count} numbers")
    if any(isinstance(value, bool) for value in values):
        raise Fault(kind, f"expected {count} numbers, found a truth value")
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as err:
        raise Fault(kind, f"expected {count} numbers, found something else") from err
    if not all(math.isfinite(value) for value in found):
        raise Fault(kind, f"expected {count} finite numbers")
    return found
