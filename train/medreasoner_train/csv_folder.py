"""A plain folder of images with a CSV that says what is asked of each."""

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from medreasoner_train.picture import Picture
from medreasoner_train.rows import UNKNOWN, Box, DataError, Draft, Fault, Points, Problem, inside, numbers

__all__ = ["COLUMNS", "read_csv"]

BOX = ("x1", "y1", "x2", "y2")
POINTS = ("p1x", "p1y", "p2x", "p2y")
ABOUT = ("id", "group", "source", "modality", "super_category", "category", "query", "thought", "frame")
COLUMNS = ("image", "mask", *BOX, *POINTS, *ABOUT)

logger = logging.getLogger(__name__)


def read_csv(path: Path, *, max_pixels: int) -> Iterator[Draft | Problem]:
    """The rows of a CSV in UTF-8 with a header of :data:`COLUMNS`; `image` and one of `mask` and the box are needed.

    Paths are relative to the CSV's folder; boxes are half-open and with the points in pixels of the image. A row with
    neither mask nor box asks for something that is absent. `frame` is the index from 0 of the image's frame or slice,
    and of the mask's if that has several.

    Raises
    ------
    DataError
        If the file cannot be read, or its header lacks what is needed.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, reader.fieldnames or ())
            for cells in reader:
                row = f"{path.name}:{reader.line_num}"
                try:
                    yield _draft(path, row, cells, max_pixels)
                except Fault as err:
                    yield err.of(row)
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise DataError(f"{path.name}: cannot be read as CSV in UTF-8 ({err}); write it again") from err


def _check_header(path: Path, columns: Sequence[str]) -> None:
    accepted = ", ".join(COLUMNS)
    if "image" not in columns:
        raise DataError(f"{path.name}: no column 'image' in the header; accepted columns: {accepted}")
    if len(set(columns)) < len(columns):
        raise DataError(f"{path.name}: a column stands twice in the header; rename one")
    if "mask" not in columns and not set(BOX) <= set(columns):  # else a misspelt header would make all targets absent
        raise DataError(f"{path.name}: neither a column 'mask' nor x1, y1, x2, y2; accepted columns: {accepted}")
    if other := sorted(set(columns) - set(COLUMNS)):
        logger.warning("%s: %d unknown columns are left out: %s", path.name, len(other), ", ".join(other))


def _draft(path: Path, row: str, cells: Mapping[str | None, str | list[str] | None], max_pixels: int) -> Draft:
    if None in cells or None in cells.values():
        raise Fault("malformed row", "it has more or fewer cells than the header")
    text = {str(name): str(cell).strip() for name, cell in cells.items()}

    def cell(name: str, otherwise: str = "") -> str:
        return text.get(name, "") or otherwise

    if not cell("image"):
        raise Fault("missing image", "no image is named")
    frame = _frame(cell("frame"))
    mask = cell("mask")
    return Draft(
        row=row,
        id=cell("id", row),
        group=cell("group") or None,
        source=cell("source", path.stem),
        modality=cell("modality", UNKNOWN),
        super_category=cell("super_category", UNKNOWN),
        category=cell("category", UNKNOWN),
        query=cell("query") or None,
        thought=cell("thought") or None,
        image=Picture(path=inside(path.parent, cell("image")), frame=frame, max_pixels=max_pixels),
        mask=Picture(path=inside(path.parent, mask), frame=frame, max_pixels=max_pixels) if mask else None,
        box=_box([cell(name) for name in BOX]),
        points=_points([cell(name) for name in POINTS]),
    )


def _frame(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise Fault("malformed row", "frame is no index from 0")
    return int(text)


def _box(cells: list[str]) -> Box | None:
    if not any(cells):
        return None
    x1, y1, x2, y2 = numbers(cells, 4, "bad box")
    return x1, y1, x2, y2


def _points(cells: list[str]) -> Points | None:
    if not any(cells):
        return None
    ax, ay, bx, by = numbers(cells, 4, "bad point")
    return (ax, ay), (bx, by)
