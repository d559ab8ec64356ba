"""What a bundle is measured on: rows whose truth is known, wherever they are kept, and what becomes of bad ones."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from medreasoner.errors import ImageReadError
from medreasoner.geometry import Box, Point
from medreasoner_train.data import Sample, by_image, load_index, load_mask, load_pixels, split
from medreasoner_train.examples import Example, load_examples, split_examples
from medreasoner_train.targets import box_of, inscribed_points

__all__ = ["BadRow", "BadRows", "Case", "EvalSet", "Groups", "Truth", "grounding_folder", "read_set"]

U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Groups = Literal["validation", "all"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be measured: its name, and what is wrong with it."""

    row: str
    reason: str


class BadRows:
    """Refuses the first bad row, or gathers them all.

    Parameters
    ----------
    what
        ``"refuse"`` or ``"skip"``.
    """

    def __init__(self, what: Literal["refuse", "skip"] = "refuse") -> None:
        self.refuses = what == "refuse"
        self.found: list[BadRow] = []

    def add(self, row: str, reason: str) -> None:
        """Take note of a bad row.

        Raises
        ------
        ImageReadError
            If bad rows are refused.
        """
        if self.refuses:
            raise ImageReadError(f"{row}: {reason}; mend the row, or leave such rows out with --bad-rows skip")
        self.found.append(BadRow(row=row, reason=reason))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Where a target is, in the image's own pixels.

    Parameters
    ----------
    mask
        (H, W) bool, not empty; None if the data have a box alone.
    box
        Half-open (x1, y1, x2, y2).
    points : (2, 2) float64
        (x, y) inside the target; None if they are not known.
    """

    shape: tuple[int, int]
    mask: Mask | None
    box: Box
    points: npt.NDArray[np.float64] | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row to ask about.

    Parameters
    ----------
    sample
        What it is about. Rows of one `image` are asked in one study; its files are read by `pixels` and `mask` alone.
    pixels
        Reads the image: (H, W) or (H, W, 3) uint8; raises ImageReadError.
    mask
        Reads the mask, (H, W) bool; None: there is none.
    query
        The row's own question; None: a phrasing of its category is asked.
    box, points
        As the data give them, (x1, y1, x2, y2) and two (x, y), pixels; None: those of the mask.
    absent
        The target is not in the image.
    """

    sample: Sample
    pixels: Callable[[], U8]
    mask: Callable[[], Mask] | None
    query: str | None = None
    box: Box | None = None
    points: tuple[Point, Point] | None = None
    absent: bool = False

    def truth(self, shape: tuple[int, int]) -> Truth:
        """Where the target is, in an image of (height, width) `shape`.

        Raises
        ------
        ImageReadError
            If the mask cannot be read, is empty or of another shape; if the box is none or reaches beyond the image.
        """
        mask = None if self.mask is None else self.mask()
        if mask is not None and not mask.any():
            raise ImageReadError("the mask is empty")
        if mask is not None and mask.shape != shape:
            raise ImageReadError(f"the mask is {_size(mask.shape)} pixels, the image {_size(shape)}")
        box = self.box or (None if mask is None else box_of(mask))
        if box is None:
            raise ImageReadError("there is neither mask nor box")
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= shape[1] and 0 <= y1 < y2 <= shape[0]):
            raise ImageReadError(f"the box {box} is empty or reaches beyond the image of {_size(shape)} pixels")
        points = None if mask is None or self.points else inscribed_points(mask)
        return Truth(shape=shape, mask=mask, box=box, points=np.array(self.points) if self.points else points)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """Rows to measure with, as a loader found them.

    Parameters
    ----------
    samples
        All that the set labels: it says which categories are frequent, and which are absent from an image.
    asked
        The rows to ask about.
    prior
        Keys, and boxes (N, 4) relative to their images, that the prior's median boxes are fitted on.
    prior_of
        What these are, in words.
    asks_absent
        Whether to ask for what is not there too, by what the sources are known to label; else only the rows say so.
    """

    samples: Sequence[Sample]
    asked: Sequence[Case]
    prior: tuple[list[str], npt.NDArray[np.float64]]
    prior_of: str
    asks_absent: bool = True

    def sound(self, categories: Container[str], bad: BadRows) -> list[Case]:
        """The rows that can be asked about; the others go to `bad`.

        `categories` are those with phrasings, for rows without a question of their own.
        """
        good, shapes = [], _Shapes()
        for case in self.asked:
            sample = case.sample
            try:
                shape = shapes.of(case)
                if not case.absent:
                    # The points, which cost the most, are not needed to know that the row is sound.
                    dataclasses.replace(case, points=case.points or ((0.0, 0.0), (0.0, 0.0))).truth(shape)
                if not case.query and sample.category not in categories:
                    raise ImageReadError(f"no phrasings for the category {sample.category!r}, and no question")
            except ImageReadError as err:
                bad.add(sample.id, str(err))
            else:
                good.append(case)
        return good


class _Shapes:
    """(Height, width) of images; the last one is kept, since an image's rows follow each other."""

    def __init__(self) -> None:
        self._last: Path | None = None
        self._shape = (0, 0)

    def of(self, case: Case) -> tuple[int, int]:
        if self._last != case.sample.image:
            self._last = None
            height, width = case.pixels().shape[:2]
            self._last, self._shape = case.sample.image, (height, width)
        return self._shape


def _size(shape: Iterable[int]) -> str:
    return " x ".join(str(side) for side in shape)


def read_set(root: Path, *, groups: Groups = "validation", every: int = 1, bad: BadRows) -> EvalSet:
    """The rows of a data set of any form: see :func:`grounding_folder` and `medreasoner_train.examples`.

    Raises
    ------
    ImageReadError, DataError
        If it is no data set, or holds no row to ask about; if a row is bad, unless `bad` gathers these.
    """
    if root.is_dir() and (root / "index.jsonl").exists():
        return grounding_folder(root, groups=groups, every=every, bad=bad)
    loaded = load_examples(root, bad_rows="refuse" if bad.refuses else "skip")
    for problem in loaded.problems:
        bad.add(problem.row, problem.what)
    return _example_set(loaded.examples, root, groups=groups, every=every)


def _example_set(examples: Sequence[Example], root: Path, *, groups: Groups, every: int) -> EvalSet:
    train, held = split_examples(examples)
    if groups == "all":
        train = held = list(examples)
    if not held:
        raise ImageReadError(f"{root}: no row to ask about; validation takes a source's second group: try --groups all")
    images = {example.image: Path(f"{number}") for number, example in enumerate(examples)}  # a name for each
    by_place: dict[Path, list[Case]] = {}
    for example in held:
        by_place.setdefault(images[example.image], []).append(_case(example, images[example.image]))
    asked = [case for cases in list(by_place.values())[::every] for case in cases]
    there = [example for example in train if example.box is not None]
    prior_of = "these rows themselves" if groups == "all" else "the training groups"
    return EvalSet(
        samples=[_sample(example, images[example.image]) for example in examples],
        asked=asked,
        prior=([example.key for example in there], _relative(there)),
        prior_of=prior_of,
        asks_absent=False,
    )


def _sample(example: Example, image: Path) -> Sample:
    return Sample(
        id=example.id,
        image=image,
        mask=image,
        source=example.source,
        modality=example.modality,
        super_category=example.super_category,
        category=example.category,
        group=example.group,
        licence_class="",
    )


def _case(example: Example, image: Path) -> Case:
    return Case(
        sample=_sample(example, image),
        pixels=example.pixels,
        mask=None if example.mask_image is None else partial(_mask_of, example),
        query=example.query,
        box=example.box,
        points=example.points,
        absent=example.absent,
    )


def _mask_of(example: Example) -> Mask:
    mask = example.mask()
    assert mask is not None
    return mask


def _relative(examples: Sequence[Example]) -> npt.NDArray[np.float64]:
    rows = []
    for example in examples:
        height, width = example.pixels().shape[:2]
        rows.append(np.array(example.box) / [width, height, width, height])
    return np.array(rows, np.float64).reshape(-1, 4)


def grounding_folder(root: Path, *, groups: Groups = "validation", every: int = 1, bad: BadRows) -> EvalSet:
    """The rows of a folder with an ``index.jsonl``: of the validation groups, or of all; of each n-th image.

    Raises
    ------
    ImageReadError
        If the index is missing, or holds no row to ask about; if a row is bad, unless `bad` gathers these.
    """
    samples = load_index(root, on_bad=bad.add)
    train, held = split(samples)
    if groups == "all":
        train = held = samples
    if not held:
        raise ImageReadError(f"{root}: no row to ask about; validation takes a source's second group: try --groups all")
    asked = [sample for record in by_image(held)[::every] for sample in record.samples]
    cases = [
        Case(sample=each, pixels=partial(load_pixels, each.image), mask=partial(load_mask, each.mask)) for each in asked
    ]
    prior_of = "these rows themselves" if groups == "all" else "the training groups"
    # Rows that are asked about are found out to be bad when they are, with more to say of them.
    prior = _relative_boxes(train, BadRows("skip") if groups == "all" else bad)
    return EvalSet(samples=samples, asked=cases, prior=prior, prior_of=prior_of)


def _relative_boxes(samples: Sequence[Sample], bad: BadRows) -> tuple[list[str], npt.NDArray[np.float64]]:
    keys, boxes = [], []
    for sample in samples:
        try:
            mask = load_mask(sample.mask)
        except ImageReadError as err:
            bad.add(sample.id, str(err))
            continue
        if not mask.any():
            bad.add(sample.id, "the mask is empty")
            continue
        height, width = mask.shape
        keys.append(sample.key)
        boxes.append(np.array(box_of(mask)) / [width, height, width, height])
    return keys, np.array(boxes, np.float64).reshape(-1, 4)
