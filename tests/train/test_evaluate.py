"""Measuring a bundle, with stand-ins whose answers are known, and the report."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medreasoner_train import evaluate as module
from medreasoner_train import report
from medreasoner_train.data import by_image, load_index, load_mask, load_pixels, split
from medreasoner_train.evaluate import EvalOptions, Row, evaluate_bundle
from medreasoner_train.language import load_phrasings
from medreasoner_train.targets import box_of

Mask = NDArray[np.bool_]
KINDS = ("present", "absent (same region)", "absent (elsewhere)", "blank image", "swapped image", "other query")


class Study:
    """Knows the truth about one image, or nothing."""

    def __init__(self, pixels: NDArray[np.uint8], truth: Mapping[str, Mask], asked: Mapping[str, str]) -> None:
        self._pixels, self._truth, self._asked = pixels, truth, asked

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ground(self, query: str, *, think: bool = False) -> Any:
        mask = self._truth.get(self._asked[query])
        return SimpleNamespace(
            found=mask is not None,
            box=None if mask is None else box_of(mask),
            mask=np.zeros(self._pixels.shape[:2], bool) if mask is None else mask,
            absent_probability=0.9 if mask is None else 0.1,
            timings_ms={"total": 5.0},
        )

    def segment(self, *, box: tuple[float, ...], points: tuple[Any, Any]) -> tuple[Mask, float]:
        x1, y1, x2, y2 = (int(v) for v in box)
        mask = np.zeros(self._pixels.shape[:2], bool)
        mask[y1:y2, x1:x2] = True
        assert all(mask[int(y), int(x)] for x, y in points)
        return mask, 0.5


class Oracle:
    """A grounder that knows the images of a data set by their pixels, and the questions by heart."""

    def __init__(self, root: Path) -> None:
        self._images = {
            load_pixels(record.image).tobytes(): {s.category: load_mask(s.mask) for s in record.samples}
            for record in by_image(load_index(root))
        }
        self._asked = {
            query: key.partition("/")[2] for key, own in load_phrasings("heldout").items() for query in own.queries
        }

    def __enter__(self) -> "Oracle":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, pixels: NDArray[np.uint8]) -> Study:
        return Study(pixels, self._images.get(pixels.tobytes(), {}), self._asked)

    def ground(self, pixels: NDArray[np.uint8], query: str, *, think: bool = False) -> Any:
        return self.open(pixels).ground(query, think=think)


@pytest.fixture
def measured(grounding_set: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], dict[str, frozenset[str]]]:
    monkeypatch.setattr(
        module, "frequent_pairs", lambda samples: frozenset(s.key for s in samples)
    )  # the drawn set has no pair with twenty samples
    return evaluate_bundle(Oracle(grounding_set), EvalOptions(data=grounding_set))  # type: ignore[arg-type]


def test_one_who_knows_everything_scores_everything(
    measured: tuple[list[Row], dict[str, frozenset[str]]], grounding_set: Path
) -> None:
    rows, sets = measured
    _, held = split(load_index(grounding_set))
    present = [row for row in rows if row.kind == "present"]
    assert Counter((row.key, row.group) for row in present) == Counter((s.key, s.group) for s in held)
    assert all(row.found and row.iou == 1.0 and row.dice == 1.0 for row in present)
    assert all(row.others == () or max(row.others) < 0.5 for row in present)
    assert {row.kind for row in rows} == set(KINDS)
    for row in rows:
        if row.kind.startswith("absent"):
            assert not row.found
            assert row.absent_probability == 0.9
            assert math.isnan(row.iou)
    assert sets["all"] == {s.key for s in held}


def test_only_validation_groups_are_asked_about(measured: tuple[list[Row], Any], grounding_set: Path) -> None:
    trained, _ = split(load_index(grounding_set))
    assert not {row.group for row in measured[0]} & {s.group for s in trained}


def test_the_prior_is_fitted_on_training_groups(measured: tuple[list[Row], Any], grounding_set: Path) -> None:
    trained, held = split(load_index(grounding_set))

    def relative(sample: Any) -> NDArray[np.float64]:
        mask = load_mask(sample.mask)
        height, width = mask.shape
        return np.array(box_of(mask)) / [width, height, width, height]

    for row, sample in zip([r for r in measured[0] if r.kind == "present"], held, strict=True):
        usual = np.median([relative(s) for s in trained if s.key == sample.key], axis=0)
        own = relative(sample)
        low, high = np.maximum(usual[:2], own[:2]), np.minimum(usual[2:], own[2:])
        shared = np.clip(high - low, 0, None).prod()
        union = (usual[2:] - usual[:2]).prod() + (own[2:] - own[:2]).prod() - shared
        assert row.prior_iou == pytest.approx(shared / union)


def test_an_unseen_image_and_another_question_find_nothing(measured: tuple[list[Row], Any]) -> None:
    blank = [row for row in measured[0] if row.kind == "blank image"]
    assert blank
    assert all(row.iou == row.dice == 0.0 for row in blank)
    other = [row for row in measured[0] if row.kind == "other query"]
    assert np.mean([row.iou for row in other]) < 0.5


def test_a_quick_look_takes_every_nth_image_and_a_run_can_be_repeated(grounding_set: Path) -> None:
    options = EvalOptions(data=grounding_set, every=3, controls=False)
    seen: list[int] = []

    def progress(records: Any) -> Iterator[Any]:
        seen.append(len(records))
        yield from records

    oracle: Any = Oracle(grounding_set)
    first, _ = evaluate_bundle(oracle, options, progress=progress)
    second, _ = evaluate_bundle(oracle, options)
    assert [dataclasses.astuple(row)[:6] for row in first] == [dataclasses.astuple(row)[:6] for row in second]
    assert seen == [4]  # of ten images
    assert not {row.kind for row in first} & set(KINDS[3:])


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "kind": "present", "key": "CT/liver", "group": "g", "source": "s", "found": True, "absent_probability": 0.1,
        "iou": 0.5, "dice": 0.6, "prior_iou": 0.4, "true_prompt_dice": 0.9,
    }  # fmt: skip
    return Row(**(values | changes))


def test_figures_are_means_by_hand() -> None:
    rows = [
        row(iou=0.2, group="a", others=(0.1, 0.7)),
        row(iou=0.4, group="b"),
        row(iou=1.0, group="c", key="CT/kidney"),
        row(kind="absent (elsewhere)", iou=math.nan, found=False),
        row(kind="absent (elsewhere)", iou=math.nan, found=True),
        row(kind="blank image", iou=0.05),
    ]
    sets = {"all": frozenset({"CT/liver", "CT/kidney"}), "informative": frozenset({"CT/liver"})}
    figures = report.as_dict(rows, sets)
    assert figures["sets"]["all"]["count"] == 3
    assert figures["sets"]["all"]["iou"]["mean"] == pytest.approx(0.5333, abs=1e-4)
    assert figures["sets"]["all"]["macro"]["iou"] == pytest.approx((0.3 + 1.0) / 2)
    assert figures["sets"]["informative"]["iou"]["mean"] == pytest.approx(0.3)
    assert figures["sets"]["informative"]["iou_over_prior"]["mean"] == pytest.approx(-0.1)
    assert figures["categories"]["CT/kidney"]["iou"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 1}
    assert figures["absent"]["absent (elsewhere)"]["mean"] == 0.5
    assert figures["absent"]["present"]["mean"] == 0.0
    assert figures["reads"]["asked_over_each_other"]["mean"] == 0.5
    assert figures["reads"]["asked_over_all_others"]["mean"] == 0.0
    assert figures["controls"]["blank image"]["iou"]["mean"] == 0.05
    shy = report.as_dict([row(kind="blank image", iou=0.0, found=False), row(kind="blank image", iou=0.4)], sets)
    control = shy["controls"]["blank image"]
    assert (control["iou"]["mean"], control["found"]["mean"], control["iou_found"]["mean"]) == (0.2, 0.5, 0.4)


def test_what_was_not_measured_is_null_and_a_dash(tmp_path: Path) -> None:
    rows = [row(kind="absent (elsewhere)", iou=math.nan, found=False)]
    figures = report.as_dict(rows, {"all": frozenset(), "informative": frozenset()})
    report.save(tmp_path / "new", rows, figures)
    assert json.loads((tmp_path / "new" / "figures.json").read_text())["sets"]["all"]["iou"]["mean"] is None
    (line,) = (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    assert json.loads(line)["iou"] is None
    assert "| - [-, -] |" in (tmp_path / "new" / "report.md").read_text()


def test_the_report_is_tables_whose_rows_have_equal_width() -> None:
    sets = {"all": frozenset({"CT/liver"}), "informative": frozenset({"CT/liver"})}
    rows = [row(), row(kind="blank image", iou=0.0)]
    text = report.markdown(report.as_dict(rows, sets))
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert "| CT/liver | 1 | 0.500 [0.500, 0.500] | 0.400 |" in text
    assert "blank image" in text


@pytest.mark.parametrize("share", [0.0, 0.08, 0.5])
def test_the_threshold_calls_no_more_than_the_share_of_present_targets_absent(share: float) -> None:
    probabilities = np.linspace(0.05, 0.95, 101)
    rows = [row(absent_probability=float(p)) for p in probabilities]
    threshold = report.threshold_for(rows, false_absent=share)
    assert (probabilities > threshold).mean() <= share
    assert (probabilities > threshold - 0.02).mean() > share - 0.02


def test_the_threshold_rises_while_enough_absent_targets_are_recognised() -> None:
    present = [row(absent_probability=float(p)) for p in np.linspace(0.0, 0.2, 50)]
    absent = [row(kind="absent (elsewhere)", absent_probability=float(p)) for p in np.linspace(0.5, 0.9, 101)]
    threshold = report.threshold_for([*present, *absent], recognised=0.8)
    assert threshold == pytest.approx(0.58)
    figures = report.as_dict([*present, *absent], {"all": frozenset(), "informative": frozenset()})
    assert figures["absent_threshold"] == pytest.approx(0.56)
    assert "| threshold on P(absent) that these answers call for | 0.560 |" in report.markdown(figures)
    # Where both cannot be had, few false alarms come first.
    hard = [row(kind="absent (elsewhere)", absent_probability=0.01)] * 9
    assert report.threshold_for([*present, *hard]) == pytest.approx(0.2 * 0.92, abs=1e-3)
