"""U-MRG-14K in its published form: parquet files (arXiv 2508.08177; fields in the format of verl).

Fields read: ``prompt`` [{content}], ``images`` and ``masks`` (bytes, {bytes, path} or paths relative to the parquet's
folder, one a row), ``reward_model.ground_truth`` = JSON {"bbox_2d": [4], "point_2d": [[x, y], [x, y]]}, ``extra_info``
{id, supercategory, category; modality and group if it has them}, ``data_source``.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medreasoner.errors import MissingExtraError
from medreasoner_train.files import appearing
from medreasoner_train.picture import Picture
from medreasoner_train.rows import UNKNOWN, Box, DataError, Draft, Fault, Points, Problem, inside, numbers

__all__ = ["GRID", "QUESTIONS", "question_in", "read_umrg"]

GRID = 840.0  # side of the pictures that the data set ships; its coordinates are pixels of them
BATCH = 16  # rows that are held at a time
NEEDED = ("prompt", "images", "reward_model")
OTHERS = ("masks", "extra_info", "data_source")

QUESTIONS = (
    r"(?:^|\n)[ \t]*Question:[ \t]*(?P<question>[^\n]+)",
    r"^Please answer (?P<question>.+?) with bbox and points\.",
)
"""Where the instructions of the published prompts, thinking and not, have the question. As it was published the data
set's ``prompt`` is the question alone; these are for copies in which the instructions were written around it."""


def question_in(content: str, pattern: str | None) -> str:
    """The question in the text of a prompt, without instructions and without the literal ``<image>``.

    Parameters
    ----------
    content
        Text of the prompt.
    pattern
        A regular expression whose group ``question`` is the question. None: the published forms, :data:`QUESTIONS`,
        and where neither is found, the whole text.

    Raises
    ------
    Fault
        If `pattern` is given and not found, or nothing is left.

    >>> question_in("<image>What pumps the blood?", None)
    'What pumps the blood?'
    """
    text = content.replace("<image>", "").strip()
    for own in QUESTIONS if pattern is None else (pattern,):
        if found := re.search(own, text, re.DOTALL if pattern is None else 0):
            text = found["question"].strip()
            break
    else:
        if pattern is not None:
            raise Fault("malformed row", "the pattern of the question is not found in its prompt")
    if not text:
        raise Fault("malformed row", "its prompt holds no question")
    return text


def read_umrg(path: Path, *, pattern: str | None, unpacked: Path | None, max_pixels: int) -> Iterator[Draft | Problem]:
    """The rows of a parquet file.

    Parameters
    ----------
    path
        The file.
    pattern
        As of :func:`question_in`.
    unpacked
        Folder to write pictures to that the file holds as bytes; None: they stay in memory (for all of U-MRG-14K,
        gigabytes).
    max_pixels
        Of a picture.

    Raises
    ------
    DataError
        If it is no parquet file or lacks fields.
    MissingExtraError
        If pyarrow is not installed.
    """
    parquet = _pyarrow("pyarrow.parquet")
    arrow_error = _pyarrow("pyarrow").ArrowException
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if missing := [name for name in NEEDED if name not in fields]:
                raise DataError(f"{path.name}: not of U-MRG's form: it lacks the field {', '.join(missing)}")
            wanted = [name for name in (*NEEDED, *OTHERS) if name in fields]
            for batch in file.iter_batches(batch_size=BATCH, columns=wanted):
                for fields_of_row in batch.to_pylist():
                    number += 1
                    row = f"{path.name}:{number}"
                    try:
                        yield _draft(path, row, fields_of_row, pattern, unpacked, max_pixels)
                    except Fault as err:
                        yield err.of(row)
    except (OSError, arrow_error) as err:
        raise DataError(f"{path.name}: not a readable parquet file ({type(err).__name__}); fetch it again") from err


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        raise MissingExtraError("reading parquet needs pyarrow: pip install 'medreasoner[train]'") from err


def _draft(
    path: Path, row: str, fields: dict[str, Any], pattern: str | None, unpacked: Path | None, max_pixels: int
) -> Draft:
    about = fields.get("extra_info") or {}
    if not isinstance(about, dict):
        raise Fault("malformed row", "extra_info is no structure")
    box, points = _ground_truth(fields["reward_model"])

    def said(name: str, otherwise: str) -> str:
        value = about.get(name)
        return otherwise if value is None or value == "" else str(value)

    def picture(cells: Any, what: str) -> Picture | None:
        return _picture(path.parent, cells, what, unpacked, max_pixels)

    image = picture(fields["images"], "image")
    if image is None:
        raise Fault("missing image", "it has no image")
    return Draft(
        row=row,
        id=said("id", row),
        group=said("group", "") or None,
        source=str(fields.get("data_source") or "umrg"),
        modality=said("modality", UNKNOWN),
        super_category=said("supercategory", UNKNOWN),
        category=said("category", UNKNOWN),
        query=question_in(_content(fields["prompt"]), pattern),
        thought=None,
        image=image,
        mask=picture(fields.get("masks"), "mask"),
        box=box,
        points=points,
        grid=GRID,
    )


def _content(prompt: Any) -> str:
    """The text of the first message that is not the system's."""
    messages = prompt if isinstance(prompt, list) else [prompt]
    for message in messages:
        if isinstance(message, dict) and message.get("role") != "system" and isinstance(message.get("content"), str):
            return str(message["content"])
    raise Fault("malformed row", "its prompt is not [{content}]")


def _ground_truth(reward_model: Any) -> tuple[Box | None, Points | None]:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except (ValueError, RecursionError) as err:
            raise Fault("broken JSON", "its ground_truth is no JSON") from err
    if not isinstance(truth, dict) or not {"bbox_2d", "point_2d"} <= truth.keys():
        raise Fault("broken JSON", "its ground_truth is not {bbox_2d, point_2d}")
    box, points = truth["bbox_2d"], truth["point_2d"]
    if box is None and points is None:
        return None, None
    x1, y1, x2, y2 = numbers(box, 4, "bad box")
    if not isinstance(points, list) or len(points) != 2:
        raise Fault("bad point", "expected two points")
    (ax, ay), (bx, by) = (numbers(point, 2, "bad point") for point in points)
    return (x1, y1, x2, y2), ((ax, ay), (bx, by))


def _picture(root: Path, cells: Any, what: str, unpacked: Path | None, max_pixels: int) -> Picture | None:
    """The one picture of a field, which may be a list of one."""
    if isinstance(cells, list):
        if len(cells) > 1:
            raise Fault("malformed row", f"it has {len(cells)} {what}s, expected one")
        cells = cells[0] if cells else None
    data, name = (cells.get("bytes"), cells.get("path")) if isinstance(cells, dict) else (cells, cells)
    if isinstance(data, bytes) and data:
        return Picture(data=data, max_pixels=max_pixels) if unpacked is None else _unpack(data, unpacked, max_pixels)
    if isinstance(name, str) and name:
        return Picture(path=inside(root, name), max_pixels=max_pixels)
    if cells is None or isinstance(cells, dict):
        return None
    raise Fault("malformed row", f"its {what} is neither bytes nor a path")


def _unpack(data: bytes, folder: Path, max_pixels: int) -> Picture:
    path = folder / hashlib.sha256(data).hexdigest()  # told apart by content when it is read
    if not path.exists():
        with appearing(path) as beside:
            beside.write_bytes(data)
    return Picture(path=path, max_pixels=max_pixels)
