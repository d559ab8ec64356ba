"""Measures a bundle on the validation groups, through the runtime that users call: ``medreasoner-cli eval``.

Besides the overlap of boxes and masks it asks whether the model looks and reads: with the image blanked or swapped, or
with another question, the overlap must fall to the prior.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner import Grounder, Grounding, Study
from medreasoner_train.anatomy import AbsentRule
from medreasoner_train.data import (
    ImageRecord,
    Sample,
    by_image,
    frequent_pairs,
    informative_pairs,
    load_index,
    load_mask,
    load_pixels,
    split,
)
from medreasoner_train.language import Phrasings, keys_by_category, load_phrasings
from medreasoner_train.metrics import dice
from medreasoner_train.prior import box_iou, fit_prior
from medreasoner_train.targets import box_of, inscribed_points

__all__ = ["EvalOptions", "Row", "evaluate_bundle", "true_prompt_dice"]

U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What to measure.

    Parameters
    ----------
    data
        Folder of the grounding set.
    part
        Phrasings to ask with: ``"heldout"``, never trained on, or ``"train"``.
    think
        Whether the reasoner thinks first.
    every
        Take each n-th image only, for a quick look.
    controls
        Also blank the image, swap it and shuffle the query.
    """

    data: Path
    part: str = "heldout"
    think: bool = False
    every: int = 1
    controls: bool = True
    seed: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question and what came of it.

    kind
        ``"present"``, ``"absent (same region)"``, ``"absent (elsewhere)"``, or a control: ``"blank image"``,
        ``"swapped image"``, ``"other query"``.
    iou, dice
        Overlap of box and mask with the truth, 0 if the answer was absent; NaN for absent targets.
    prior_iou
        What the category's median box reaches.
    true_prompt_dice
        Dice of the segmenter given the true box and points.
    others
        Dice with each other structure that is labelled in the image.
    """

    kind: str
    key: str
    group: str
    source: str
    found: bool
    absent_probability: float
    iou: float = float("nan")
    dice: float = float("nan")
    prior_iou: float = float("nan")
    true_prompt_dice: float = float("nan")
    others: tuple[float, ...] = ()
    total_ms: float = float("nan")


class _Asker:
    """Chooses a phrasing for each question, the same at every run."""

    def __init__(self, phrasings: Mapping[str, Phrasings], seed: int) -> None:
        self._phrasings = phrasings
        self._rng = np.random.default_rng(seed)
        self._keys = keys_by_category(phrasings)

    def pick(self, names: Sequence[str]) -> str:
        return names[int(self._rng.integers(len(names)))]

    def query(self, category: str, modality: str) -> str:
        """A phrasing for a category, written for this modality if there is one."""
        own = f"{modality}/{category}"
        return self.pick(self._phrasings[own if own in self._phrasings else self.pick(self._keys[category])].queries)

    def other(self, category: str) -> str:
        """A phrasing for any other category."""
        return self.query(self.pick(sorted(set(self._keys) - {category})), "")


def evaluate_bundle(
    grounder: Grounder, options: EvalOptions, *, progress: Callable[[Sequence[Any]], Iterator[Any]] = iter
) -> tuple[list[Row], dict[str, frozenset[str]]]:
    """Ask about every structure of the validation images, and about one absent structure an image.

    Returns
    -------
    rows : list of Row
    sets : dict
        Keys by kind: ``"all"`` (20 samples or more in the whole set) and ``"informative"`` (prior below 0.75).
    """
    samples = load_index(options.data)
    train_samples, val_samples = split(samples)
    records = by_image(val_samples)[:: options.every]
    prior = fit_prior([s.key for s in train_samples], np.stack([_relative_box(s) for s in train_samples]))
    rule, asker = AbsentRule(samples), _Asker(load_phrasings(options.part), options.seed)
    rows: list[Row] = []
    for record in progress(records):
        rows += _about_image(grounder, record, rule, asker, prior, options)
    if options.controls:
        rows += _controls(grounder, records, asker, prior, options, progress=progress)
    present = [row for row in rows if row.kind == "present"]
    frequent = frequent_pairs(samples)
    means = {
        key: float(np.mean([row.prior_iou for row in present if row.key == key]))
        for key in frequent
        if any(row.key == key for row in present)
    }
    return rows, {"all": frozenset(means), "informative": informative_pairs(means)}


def _relative_box(sample: Sample) -> npt.NDArray[np.float64]:
    mask = load_mask(sample.mask)
    height, width = mask.shape
    return np.array(box_of(mask)) / [width, height, width, height]


def _about_image(
    grounder: Grounder,
    record: ImageRecord,
    rule: AbsentRule,
    asker: _Asker,
    prior: Mapping[str, npt.NDArray[np.float64]],
    options: EvalOptions,
) -> list[Row]:
    rows = []
    masks = {sample.key: load_mask(sample.mask) for sample in record.samples}
    with grounder.open(load_pixels(record.image)) as study:
        for sample in record.samples:
            result = study.ground(asker.query(sample.category, sample.modality), think=options.think)
            others = tuple(dice(result.mask, mask) for key, mask in masks.items() if key != sample.key)
            row = _present(result, sample, masks[sample.key], prior)
            rows.append(
                dataclasses.replace(row, others=others, true_prompt_dice=true_prompt_dice(study, masks[sample.key]))
            )
        near, far = rule.same_region(record), rule.other_region(record)
        for kind, names in (("absent (same region)", near), ("absent (elsewhere)", far)):
            if not names:
                continue
            category = asker.pick(names)
            result = study.ground(asker.query(category, record.modality), think=options.think)
            rows.append(
                Row(
                    kind=kind,
                    key=f"{record.modality}/{category}",
                    group=record.group,
                    source=record.source,
                    found=result.found,
                    absent_probability=_p(result),
                )
            )
    return rows


def _p(result: Grounding) -> float:
    return float("nan") if result.absent_probability is None else result.absent_probability


def _present(
    result: Grounding,
    sample: Sample,
    mask: Mask,
    prior: Mapping[str, npt.NDArray[np.float64]],
    kind: str = "present",
) -> Row:
    height, width = mask.shape
    truth = np.array([box_of(mask)])
    usual = prior.get(sample.key)
    sides = np.array([width, height, width, height])
    return Row(
        kind=kind,
        key=sample.key,
        group=sample.group,
        source=sample.source,
        found=result.found,
        absent_probability=_p(result),
        iou=0.0 if result.box is None else float(box_iou(np.array([result.box], np.float64), truth)[0]),
        dice=dice(result.mask, mask),
        prior_iou=0.0 if usual is None else float(box_iou(usual[None] * sides, truth)[0]),
        total_ms=result.timings_ms["total"],
    )


def true_prompt_dice(study: Study, mask: Mask) -> float:
    """Dice of the segmenter given the true box and points of a non-empty (H, W) mask, in the study's image."""
    points = inscribed_points(mask)
    first, second = ((float(x), float(y)) for x, y in points)
    segmented, _ = study.segment(box=box_of(mask), points=(first, second))
    return dice(segmented, mask)


def _controls(
    grounder: Grounder,
    records: Sequence[ImageRecord],
    asker: _Asker,
    prior: Mapping[str, npt.NDArray[np.float64]],
    options: EvalOptions,
    *,
    progress: Callable[[Sequence[Any]], Iterator[Any]],
) -> list[Row]:
    """The same questions with nothing to see, with another image of the modality, and other questions."""
    rows = []
    by_modality: dict[str, list[ImageRecord]] = {}
    for record in records:
        by_modality.setdefault(record.modality, []).append(record)
    for record in progress(records):
        sample = record.samples[0]
        mask = load_mask(sample.mask)
        query = asker.query(sample.category, sample.modality)
        own = load_pixels(record.image)
        blank = np.full_like(own, int(own.mean()))
        rows.append(_present(grounder.ground(blank, query, think=options.think), sample, mask, prior, "blank image"))
        strangers = [r for r in by_modality[record.modality] if r.group != record.group]
        if strangers:
            other = _stretched(load_pixels(strangers[int(len(strangers) * 0.618) % len(strangers)].image), own.shape)
            result = grounder.ground(other, query, think=options.think)
            rows.append(_present(result, sample, mask, prior, "swapped image"))
        result = grounder.ground(own, asker.other(sample.category), think=options.think)
        rows.append(_present(result, sample, mask, prior, "other query"))
    return rows


def _stretched(pixels: U8, shape: tuple[int, ...]) -> U8:
    from PIL import Image as PilImage

    return np.asarray(PilImage.fromarray(pixels).resize((shape[1], shape[0])))
