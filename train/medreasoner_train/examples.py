"""Data for training and evaluation, whatever form they are kept in: questions about images whose answers are known."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medreasoner_train.csv_folder import read_csv
from medreasoner_train.data import VALIDATION_PERCENT, split
from medreasoner_train.language import Phrasings, keys_by_category, load_phrasings
from medreasoner_train.looking import Facts, look_at, placed
from medreasoner_train.picture import MAX_PIXELS, Picture
from medreasoner_train.rows import Box, DataError, Draft, Fault, Points, Problem, ProblemKind, fault, inside
from medreasoner_train.umrg import read_umrg

__all__ = [
    "DataError",
    "Example",
    "Loaded",
    "Problem",
    "draw_question",
    "load_examples",
    "split_examples",
]

BadRows = Literal["refuse", "skip"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question about one image. Coordinates: pixels of the image, (x, y), boxes half-open.

    Pixels and mask are read when they are asked for. An example can be sent to another process.

    Parameters
    ----------
    id
        Unique in its data set.
    group
        What must not be on both sides of a split: a patient, or the image.
    source, modality, super_category, category
        ``"unspecified"`` where the data do not tell.
    query
        The question; None: the data have none, and one is drawn by :func:`draw_question`.
    box, points
        Where the target is. No box: it is absent. A box without points: the data have neither points nor a mask.
    image, mask_image
        Where pixels and mask are kept.
    thought
        A reasoning trace, if the data have one.
    """

    id: str
    group: str
    source: str
    modality: str
    super_category: str
    category: str
    query: str | None
    box: Box | None
    points: Points | None
    image: Picture
    mask_image: Picture | None = None
    thought: str | None = None

    @property
    def key(self) -> str:
        """Name of the (modality, category) pair, as the phrasing files use it."""
        return f"{self.modality}/{self.category}"

    @property
    def absent(self) -> bool:
        """Whether the image does not show what is asked for."""
        return self.box is None

    def pixels(self) -> npt.NDArray[np.uint8]:
        """(H, W) uint8 if the image is grey, also when stored as colour, else (H, W, 3) RGB."""
        return self.image.pixels()

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """(H, W) bool; None if the data have a box only, or the target is absent."""
        return None if self.mask_image is None else self.mask_image.mask()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The examples of a data set, in its order, and the rows that were left out."""

    examples: tuple[Example, ...]
    problems: tuple[Problem, ...] = ()


def load_examples(
    path: Path,
    *,
    bad_rows: BadRows = "refuse",
    cache: Path | None = None,
    question_pattern: str | None = None,
    categories: Container[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Loaded:
    """Read a data set of any of three forms; every image and mask is decoded once, to know that it can be.

    Parameters
    ----------
    path
        A grounding set (the folder, or its ``index.jsonl``), U-MRG-14K (a .parquet file, or a folder of them), or a
        CSV with the images beside it (the file, or the folder with this one CSV): see
        :func:`medreasoner_train.csv_folder.read_csv` for its columns.
    bad_rows
        ``"refuse"``: one error if a row cannot be used; ``"skip"``: such rows are left out, counted in a warning
        and told in ``Loaded.problems``.
    cache
        Folder for what takes long to work out: boxes and points of masks, pictures unpacked from parquet. None: worked
        out anew each time, and such pictures are held in memory.
    question_pattern
        Of U-MRG: a regular expression that finds the question in a prompt, as its group ``question``; None: see
        :func:`medreasoner_train.umrg.question_in`.
    categories
        For which phrasings are written; rows of others need questions of their own. None: those of queries/train.json.
    max_pixels
        Largest height times width of an image.
    progress
        Wraps what is iterated over, to show how far it is.

    Raises
    ------
    DataError
        If `path` is no data set, a row cannot be used (the first is named, the rest are counted by kind), or none can.
    MissingExtraError
        If a package is needed that is not installed: pyarrow for parquet, nibabel for NIfTI.
    """
    if categories is None:
        categories = keys_by_category(load_phrasings("train"))
    unpacked, memory = (None, None) if cache is None else (cache / "pictures", cache / "facts.json")
    drafts: list[Draft] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    place: dict[str, int] = {}  # of each row
    for item in _rows(path, question_pattern=question_pattern, unpacked=unpacked, max_pixels=max_pixels):
        place[item.row] = len(place)
        if isinstance(item, Problem):
            problems.append(item)
        elif item.id in seen:
            problems.append(fault(item.row, "duplicate id", "an earlier row has the same id"))
        else:
            seen.add(item.id)
            drafts.append(item)
    examples: list[Example] = []
    for draft, facts in zip(drafts, look_at(drafts, memory=memory, progress=progress), strict=True):
        try:
            examples.append(_example(draft, facts, categories))
        except Fault as err:
            problems.append(err.of(draft.row))
    problems.sort(key=lambda problem: place[problem.row])
    _report(path, examples, problems, bad_rows)
    return Loaded(examples=tuple(examples), problems=tuple(problems))


def split_examples(
    examples: Sequence[Example], *, percent: int = VALIDATION_PERCENT
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples; no group is in both. The rule is that of :func:`medreasoner_train.data.split`.

    Of each source the first groups in the order of a hash of their names, so that neither a seed nor the order of the
    rows matters; a source with a single group gives none.
    """
    return split(examples, percent)


def draw_question(example: Example, phrasings: Mapping[str, Phrasings], rng: np.random.Generator) -> str:
    """The example's own question, or one of the phrasings of its modality and category, else of its category.

    Raises
    ------
    DataError
        If there is none.
    """
    if example.query is not None:
        return example.query
    own = [example.key] if example.key in phrasings else keys_by_category(phrasings).get(example.category)
    if not own:
        raise DataError(f"no phrasings for the category of {example.id}: add them to queries/train.json")
    queries = phrasings[own[int(rng.integers(len(own)))]].queries
    return queries[int(rng.integers(len(queries)))]


def _rows(
    path: Path, *, question_pattern: str | None, unpacked: Path | None, max_pixels: int
) -> Iterator[Draft | Problem]:
    """The rows of whatever `path` is."""
    for file in _files(path):
        if file.suffix == ".jsonl":
            yield from _read_index(file, max_pixels=max_pixels)
        elif file.suffix == ".csv":
            yield from read_csv(file, max_pixels=max_pixels)
        else:
            yield from read_umrg(file, pattern=question_pattern, unpacked=unpacked, max_pixels=max_pixels)


def _files(path: Path) -> list[Path]:
    accepted = "accepted: a folder with index.jsonl, with .parquet files or with one .csv, or such a file"
    if path.is_file():
        if path.suffix in {".jsonl", ".csv", ".parquet"}:
            return [path]
        raise DataError(f"{path}: no data set; {accepted}")
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; {accepted}")
    if (path / "index.jsonl").is_file():
        return [path / "index.jsonl"]
    if parquet := sorted(path.glob("*.parquet")):
        return parquet
    tables = sorted(path.glob("*.csv"))
    if len(tables) > 1:
        raise DataError(f"{path}: {len(tables)} CSV files; give the path of the one that is meant")
    if not tables:
        raise DataError(f"{path}: no data set in it; {accepted}")
    return tables


def _read_index(path: Path, *, max_pixels: int) -> Iterator[Draft | Problem]:
    """The rows of a grounding set's index, see :mod:`medreasoner_train.data`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: cannot be read as UTF-8 ({type(err).__name__})") from err
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = f"{path.name}:{number}"
        try:
            yield _index_draft(path.parent, row, line, max_pixels)
        except Fault as err:
            yield err.of(row)


def _index_draft(root: Path, row: str, line: str, max_pixels: int) -> Draft:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise Fault("broken JSON", "the line is no JSON") from err
    needed = ("id", "image", "mask", "source", "modality", "super_category", "category", "patient_or_group_id")
    if not isinstance(fields, dict):
        raise Fault("malformed row", "it is no object")
    if missing := [name for name in needed if not isinstance(fields.get(name), str)]:
        raise Fault("malformed row", f"no text in the field {', '.join(missing)}")
    return Draft(
        row=row,
        id=fields["id"],
        group=fields["patient_or_group_id"],
        source=fields["source"],
        modality=fields["modality"],
        super_category=fields["super_category"],
        category=fields["category"],
        query=None,
        thought=None,
        image=Picture(path=inside(root, fields["image"]), max_pixels=max_pixels),
        mask=Picture(path=inside(root, fields["mask"]), max_pixels=max_pixels),
        box=None,
        points=None,
    )


def _example(draft: Draft, facts: Facts | Fault, categories: Container[str]) -> Example:
    if isinstance(facts, Fault):
        raise facts
    if draft.query is None and draft.category not in categories:
        raise Fault("unknown category", f"no question, and no phrasings for the category {draft.category!r}")
    box, points = placed(draft, facts)
    return Example(
        id=draft.id,
        # Without one, equal pictures are a group, under whatever names they are kept.
        group=f"image {facts.digest}" if draft.group is None else draft.group,
        source=draft.source,
        modality=draft.modality,
        super_category=draft.super_category,
        category=draft.category,
        query=draft.query,
        box=box,
        points=points,
        image=draft.image,
        mask_image=draft.mask,
        thought=draft.thought,
    )


def _report(path: Path, examples: Sequence[Example], problems: Sequence[Problem], bad_rows: BadRows) -> None:
    """Refuse, or tell how many rows were left out."""
    total = len(examples) + len(problems)
    if not total:
        raise DataError(f"{path}: it holds no rows")
    if not problems:
        return
    rest: Counter[ProblemKind] = Counter(problem.kind for problem in problems[1:])
    others = ", ".join(f"{count} x {kind}" for kind, count in sorted(rest.items()))
    also = f" Besides: {others}." if others else ""
    if bad_rows == "refuse" or not examples:
        skip = " bad_rows='skip' leaves such rows out." if examples else ""
        raise DataError(
            f"{path.name}: {len(problems)} of {total} rows cannot be used. {problems[0]}.{also}{skip}", problems
        )
    logger.warning("%s: %d of %d rows are left out. %s.%s", path.name, len(problems), total, problems[0], also)
