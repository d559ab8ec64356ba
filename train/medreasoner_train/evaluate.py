"""Measures a bundle on rows whose truth is known, through the runtime that users call: ``medreasoner-cli eval``.

Besides the overlap of boxes and masks it asks whether the model looks and reads: with the image blanked or swapped, or
with another question, the overlap must fall to the prior.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medreasoner import Grounder, Grounding, Study
from medreasoner.errors import GenerationError
from medreasoner_train.anatomy import AbsentRule
from medreasoner_train.data import Sample, by_image, frequent_pairs, informative_pairs
from medreasoner_train.evalset import BadRow, BadRows, Case, EvalSet, Groups, Truth, read_set
from medreasoner_train.language import Phrasings, keys_by_category, load_phrasings
from medreasoner_train.metrics import dice
from medreasoner_train.prior import fit_prior
from medreasoner_train.scoring import Row, answered, measures, overlaps, true_prompt_dice

__all__ = ["EvalOptions", "Evaluation", "Row", "evaluate_bundle", "true_prompt_dice"]

U8 = npt.NDArray[np.uint8]
Progress = Callable[[Sequence[Any]], Iterator[Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What to measure.

    Parameters
    ----------
    data
        Folder of the grounding set.
    part
        Phrasings to ask with: ``"heldout"``, never trained on, ``"train"``, or ``"named"``, which say what they ask
        for.
    groups
        Ask about the ``"validation"`` groups, or about ``"all"`` of a set that nothing was trained on; then the prior's
        boxes come from the same rows, since there are no others.
    think
        Whether the reasoner thinks first.
    every
        Take each n-th image only, for a quick look.
    controls
        Also blank the image, swap it and shuffle the query.
    tolerance
        Of the surface distance, pixels of the 840-px grid; 8 are about 1 % of the image's side.
    bad_rows
        ``"refuse"`` or ``"skip"`` rows that cannot be measured.
    seed
        Of the choice of phrasings.
    """

    data: Path
    part: str = "heldout"
    groups: Groups = "validation"
    think: bool = False
    every: int = 1
    controls: bool = True
    tolerance: float = 8.0
    bad_rows: Literal["refuse", "skip"] = "refuse"
    seed: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What came of a measurement.

    Parameters
    ----------
    rows
        One for each question.
    sets
        Keys by name: ``"all"`` (20 samples or more in the whole set), ``"informative"`` (of these, the prior below
        0.75), ``"every category"``.
    bad
        Rows that were left out.
    data
        What was measured with.
    model
        Name and version of the bundle, and its manifest's digest.
    """

    rows: list[Row]
    sets: dict[str, frozenset[str]]
    bad: list[BadRow]
    data: EvalSet
    model: str


class _Asker:
    """Chooses a phrasing for each question, the same at every run."""

    def __init__(self, phrasings: Mapping[str, Phrasings], seed: int) -> None:
        self._phrasings = phrasings
        self._rng = np.random.default_rng(seed)
        self._keys = keys_by_category(phrasings)

    @property
    def categories(self) -> frozenset[str]:
        """Those that can be asked for."""
        return frozenset(self._keys)

    def pick(self, names: Sequence[str]) -> str:
        return names[int(self._rng.integers(len(names)))]

    def about(self, case: Case) -> str:
        """The row's own question, or else a phrasing."""
        return case.query or self.query(case.sample.category, case.sample.modality)

    def query(self, category: str, modality: str) -> str:
        """A phrasing for a category, written for this modality if there is one."""
        own = f"{modality}/{category}"
        return self.pick(self._phrasings[own if own in self._phrasings else self.pick(self._keys[category])].queries)

    def other(self, category: str) -> str:
        """A phrasing for any other category."""
        return self.query(self.pick(sorted(set(self._keys) - {category})), "")


def evaluate_bundle(
    grounder: Grounder, options: EvalOptions, *, data: EvalSet | None = None, progress: Progress = iter
) -> Evaluation:
    """Ask about every structure of the images, and about one absent structure an image.

    `data` are the rows if they are kept in another form than a folder with an index; the options `data`, `groups` and
    `every` then have no say.

    Raises
    ------
    ImageReadError
        If there is no index, or a row is bad and bad rows are refused.
    """
    bad = BadRows(options.bad_rows)
    if data is None:
        data = read_set(options.data, groups=options.groups, every=options.every, bad=bad)
    exam = _Exam(grounder, options, data, bad)
    rows = [row for cases in progress(exam.images) for row in exam.about_image(cases)]
    if options.controls:
        rows += exam.controls(progress)
    present = [row for row in rows if row.kind == "present"]
    frequent = frequent_pairs(data.samples)
    keys = frozenset(row.key for row in present)
    means = {
        key: float(np.mean([row.prior_iou for row in present if row.key == key])) for key in sorted(frequent & keys)
    }
    sets = {"all": frozenset(means), "informative": informative_pairs(means), "every category": keys}
    return Evaluation(rows=rows, sets=sets, bad=bad.found, data=data, model=exam.model)


class _Exam:
    """The questions to a bundle."""

    def __init__(self, grounder: Grounder, options: EvalOptions, data: EvalSet, bad: BadRows) -> None:
        self._grounder, self._options = grounder, options
        self.model = "unknown"  # until it answers
        self._asker = _Asker(load_phrasings(options.part), options.seed)
        cases: dict[Path, list[Case]] = {}
        for case in data.sound(self._asker.categories, bad):
            cases.setdefault(case.sample.image, []).append(case)
        self.images = list(cases.values())
        # With bad rows among them: what they label is in the image all the same.
        labels = by_image(case.sample for case in data.asked if not case.absent)
        self._labelled = {record.image: record for record in labels}
        self._prior = fit_prior(*data.prior)
        self._rule, self._asks_absent = AbsentRule(data.samples), data.asks_absent

    def about_image(self, cases: Sequence[Case]) -> list[Row]:
        """What is there, each structure, and one that is not."""
        pixels = cases[0].pixels()
        truths = [None if case.absent else case.truth(pixels.shape[:2]) for case in cases]
        with self._grounder.open(pixels) as study:
            rows = [self._about(study, case, truths, index) for index, case in enumerate(cases)]
            for kind, sample in self._absent(cases[0].sample):
                query = self._asker.query(sample.category, sample.modality)
                rows.append(answered(kind, sample, query, self._answer(study.ground, query)))
        return rows

    def _about(self, study: Study, case: Case, truths: Sequence[Truth | None], index: int) -> Row:
        """The question of one row, of whose image all `truths` are known."""
        query, truth = self._asker.about(case), truths[index]
        result = self._answer(study.ground, query)
        if truth is None:
            return answered("absent (given)", case.sample, query, result)
        row = answered("present", case.sample, query, result)
        row = overlaps(row, result, truth, self._prior.get(case.sample.key))
        row = measures(row, result, study, truth, tolerance=self._options.tolerance)
        if result is None or truth.mask is None:
            return row
        masks = [other.mask for k, other in enumerate(truths) if other is not None and k != index]
        return dataclasses.replace(row, others=tuple(dice(result.mask, mask) for mask in masks if mask is not None))

    def _absent(self, sample: Sample) -> Iterator[tuple[str, Sample]]:
        """Kinds of absent targets, and of each one that can be asked for, as if it were a row of the sample's image."""
        if (labelled := self._labelled.get(sample.image)) is None or not self._asks_absent:
            return
        near, far = self._rule.same_region(labelled), self._rule.other_region(labelled)
        for kind, names in (("absent (same region)", near), ("absent (elsewhere)", far)):
            known = [name for name in names if name in self._asker.categories]
            if known:
                name = self._asker.pick(known)
                yield kind, dataclasses.replace(sample, category=name, super_category="")

    def _answer(self, ground: Callable[..., Grounding], *question: Any) -> Grounding | None:
        """The answer; None if the reasoner gives none that can be used, which counts as a wrong one."""
        try:
            result = ground(*question, think=self._options.think)
        except GenerationError:
            return None
        self.model = f"{result.model_name} {result.model_version} (manifest {result.model_digest[:12]})"
        return result

    def controls(self, progress: Progress) -> list[Row]:
        """The same questions with nothing to see, with another image of the modality, and other questions."""
        rows = []
        firsts = [next((case for case in cases if not case.absent), None) for cases in self.images]
        asked = [case for case in firsts if case is not None]
        by_modality: dict[str, list[Case]] = {}
        for case in asked:
            by_modality.setdefault(case.sample.modality, []).append(case)
        for case in progress(asked):
            sample, query, own = case.sample, self._asker.about(case), case.pixels()
            rows.append(self._control("blank image", case, np.full_like(own, int(own.mean())), query))
            strangers = [other for other in by_modality[sample.modality] if other.sample.group != sample.group]
            if strangers:
                other = strangers[int(len(strangers) * 0.618) % len(strangers)].pixels()
                rows.append(self._control("swapped image", case, _stretched(other, own.shape), query))
            rows.append(self._control("other query", case, own, self._asker.other(sample.category)))
        return rows

    def _control(self, kind: str, case: Case, pixels: U8, query: str) -> Row:
        result = self._answer(self._grounder.ground, pixels, query)
        row = answered(kind, case.sample, query, result)
        return overlaps(row, result, case.truth(pixels.shape[:2]), self._prior.get(case.sample.key))


def _stretched(pixels: U8, shape: tuple[int, ...]) -> U8:
    from PIL import Image as PilImage

    return np.asarray(PilImage.fromarray(pixels).resize((shape[1], shape[0])))
