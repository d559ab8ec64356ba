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
from PIL import Image as PilImage

from medreasoner.errors import ArrayError, GenerationError, ImageReadError
from medreasoner.ops import rle_decode
from medreasoner_train import evaluate as module
from medreasoner_train import report
from medreasoner_train.data import by_image, load_index, load_mask, load_pixels, split
from medreasoner_train.evalset import Case, EvalSet
from medreasoner_train.evaluate import EvalOptions, Row, evaluate_bundle
from medreasoner_train.language import load_phrasings, place_of
from medreasoner_train.targets import box_of, inscribed_points

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
            points=None if mask is None else tuple((x, y) for x, y in inscribed_points(mask).tolist()),
            mask=np.zeros(self._pixels.shape[:2], bool) if mask is None else mask,
            reasoning=None if not think else f"A large, upper left thing. Seen; {place_of(mask)}." if mask is not None
            else "Nothing in this picture shows it.",
            absent_probability=0.9 if mask is None else 0.1,
            timings_ms={"total": 5.0},
            model_name="oracle",
            model_version="1",
            model_digest="0" * 64,
        )  # fmt: skip

    def segment(
        self, *, box: tuple[float, ...] | None = None, points: tuple[Any, Any] | None = None
    ) -> tuple[Mask, float]:
        """The box as a mask; by points alone, the pixels of these."""
        mask = np.zeros(self._pixels.shape[:2], bool)
        if box is None:
            assert points is not None
            for x, y in points:
                mask[int(y), int(x)] = True
            return mask, 0.5
        x1, y1, x2, y2 = (int(v) for v in box)
        mask[y1:y2, x1:x2] = True
        assert all(mask[int(y), int(x)] for x, y in points or ())
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


@pytest.fixture(scope="module")
def measured(grounding_set: Path) -> tuple[list[Row], dict[str, frozenset[str]]]:
    with pytest.MonkeyPatch.context() as patch:
        # The drawn set has no pair with twenty samples.
        patch.setattr(module, "frequent_pairs", lambda samples: frozenset(s.key for s in samples))
        done = evaluate_bundle(Oracle(grounding_set), EvalOptions(data=grounding_set))  # type: ignore[arg-type]
    assert done.bad == []
    return done.rows, done.sets


def test_one_who_knows_everything_scores_everything(
    measured: tuple[list[Row], dict[str, frozenset[str]]], grounding_set: Path
) -> None:
    rows, sets = measured
    _, held = split(load_index(grounding_set))
    present = [row for row in rows if row.kind == "present"]
    assert Counter((row.key, row.group) for row in present) == Counter((s.key, s.group) for s in held)
    assert all(row.found and row.iou == row.dice == row.nsd == 1.0 for row in present)
    assert all(row.pdice_corrected == pytest.approx(1, abs=1e-4) for row in present)
    assert all(row.pdice_paper == pytest.approx(2, abs=1e-3) for row in present)
    by_id = {s.id: s for s in held}
    for row in present:  # the stand-in's mask by a box is the box, by points two pixels
        mask = load_mask(by_id[row.id].mask)
        x1, y1, x2, y2 = box_of(mask)
        assert (
            row.dice_box == row.true_prompt_dice == pytest.approx(2 * mask.sum() / (mask.sum() + (x2 - x1) * (y2 - y1)))
        )
        assert row.dice_points == pytest.approx(4 / (mask.sum() + 2))
        assert row.super_category == "drawn"
        assert row.mask is not None
        np.testing.assert_array_equal(rle_decode(row.mask), mask)
    assert all(row.others == () or max(row.others) < 0.5 for row in present)
    assert {row.kind for row in rows} == set(KINDS)
    for row in rows:
        if row.kind.startswith("absent"):
            assert not row.found
            assert row.absent_probability == 0.9
            assert math.isnan(row.iou)
    assert sets["all"] == sets["every category"] == {s.key for s in held}


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
    first = evaluate_bundle(oracle, options, progress=progress).rows
    second = evaluate_bundle(oracle, options).rows
    assert [dataclasses.astuple(row)[:9] for row in first] == [dataclasses.astuple(row)[:9] for row in second]
    assert seen == [4]  # of ten images
    others = evaluate_bundle(oracle, dataclasses.replace(options, seed=2)).rows
    asked, again = ([row for row in rows if row.kind == "present"] for rows in (first, others))
    assert [row.id for row in asked] == [row.id for row in again]
    assert sum(a.query != b.query for a, b in zip(asked, again, strict=True)) > len(asked) / 2
    assert not {row.kind for row in first} & set(KINDS[3:])


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "kind": "present", "key": "CT/liver", "group": "g", "source": "s", "found": True, "absent_probability": 0.1,
        "super_category": "organ", "iou": 0.5, "dice": 0.6, "prior_iou": 0.4, "true_prompt_dice": 0.9,
        "dice_box": 0.5, "dice_points": 0.3, "pdice_paper": 1.2, "pdice_corrected": 0.7, "nsd": 0.35,
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
    assert figures["super_categories"]["organ"]["iou"]["mean"] == pytest.approx(0.5333, abs=1e-4)
    assert figures["modalities"]["CT"]["count"] == 3
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
    assert "| organ | 1 | 0.500 [0.500, 0.500] | 0.400 | 0.600 [0.600, 0.600] | 0.500 | 0.300 | 0.900 |" in text
    assert "pDice, paper's form" in text
    assert "pDice, corrected" in text


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


def test_precision_and_recall_of_absent_by_hand() -> None:
    """Of ten absent targets seven are called so and one fails; of twenty that are there three are called absent."""
    rows = [row(kind="absent (elsewhere)", group=f"a{n}", found=n >= 8, failed=n == 7) for n in range(10)]
    rows += [row(group=f"p{n}", found=n >= 4, failed=n == 3) for n in range(20)]
    rows += [row(kind="blank image", found=False)] * 5  # controls have no say
    found = report.as_dict(rows, {"informative": frozenset()})
    own = found["detection"]
    assert own["absent"]["precision"]["mean"] == pytest.approx(7 / 10)
    assert own["absent"]["recall"]["mean"] == pytest.approx(7 / 10)
    assert own["present"]["precision"]["mean"] == pytest.approx(16 / 18, abs=1e-4)
    assert own["present"]["recall"]["mean"] == pytest.approx(16 / 20)
    assert own["present"]["recall"]["low"] < 0.8 < own["present"]["recall"]["high"]
    assert found["failed"] == 2


class Failing(Oracle):
    """Fails at every other question."""

    def open(self, pixels: NDArray[np.uint8]) -> Study:
        study, asked = super().open(pixels), iter(range(100))
        own = study.ground

        def ground(query: str, *, think: bool = False) -> Any:
            if next(asked) % 2 == 0:
                raise GenerationError("no answer")
            return own(query, think=think)

        study.ground = ground  # type: ignore[method-assign]
        return study


def test_a_failed_answer_counts_zero_and_is_neither_found_nor_absent(grounding_set: Path) -> None:
    options = EvalOptions(data=grounding_set, controls=False)
    rows = evaluate_bundle(Failing(grounding_set), options).rows  # type: ignore[arg-type]
    failed = [r for r in rows if r.failed and r.kind == "present"]
    assert 0 < len(failed) < sum(r.kind == "present" for r in rows)
    for each in failed:
        assert not each.found
        assert not each.said_absent
        scores = (each.iou, each.dice, each.dice_box, each.dice_points, each.nsd)
        assert scores == (0.0,) * 5
        assert (each.pdice_paper, each.pdice_corrected) == (0.0, 0.0)
        assert each.true_prompt_dice > 0.5
        assert each.prior_iou > 0


class BoxesOnly(Oracle):
    """A segmenter that takes no points."""

    def open(self, pixels: NDArray[np.uint8]) -> Study:
        study = super().open(pixels)
        own = study.segment

        def segment(*, box: Any = None, points: Any = None) -> Any:
            if box is None:
                raise ArrayError("nothing to segment by")
            return own(box=box)

        study.segment = segment  # type: ignore[method-assign]
        return study


def test_a_prompt_that_a_segmenter_does_not_take_is_not_measured(grounding_set: Path) -> None:
    options = EvalOptions(data=grounding_set, controls=False)
    done = evaluate_bundle(BoxesOnly(grounding_set), options)  # type: ignore[arg-type]
    own = report.figures_of(done, options)["sets"]["every category"]
    assert own["dice_points"]["mean"] is None
    assert own["dice_box"]["mean"] > 0.5


def test_traces_are_held_against_the_mask(grounding_set: Path) -> None:
    options = EvalOptions(data=grounding_set, controls=False, think=True)
    done = evaluate_bundle(Oracle(grounding_set), options)  # type: ignore[arg-type]
    traces = report.figures_of(done, options)["traces"]
    there = sum(row.kind == "present" for row in done.rows)
    assert {(own["mean"], own["count"]) for own in traces.values()} == {(1.0, there)}
    assert "traces" not in report.as_dict([row()], done.sets)


def test_all_groups_are_asked_about_on_request(grounding_set: Path) -> None:
    options = EvalOptions(data=grounding_set, controls=False, groups="all")
    done = evaluate_bundle(Oracle(grounding_set), options)  # type: ignore[arg-type]
    assert {row.group for row in done.rows} == {s.group for s in load_index(grounding_set)}
    assert report.figures_of(done, options)["about"]["prior's boxes fitted on"] == "these rows themselves"


def copy_with(source: Path, target: Path, change: Any) -> Path:
    """The data set with one validation row changed, as a folder that refers to the same pictures."""
    _, held = split(load_index(source))
    names = {s.id for s in held}
    lines = [json.loads(line) for line in (source / "index.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"], line["mask"] = str(source / line["image"]), str(source / line["mask"])
    change(next(line for line in lines if line["id"] in names), target)
    target.mkdir(exist_ok=True)
    (target / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


def lost_image(line: dict[str, Any], _: Path) -> None:
    line["image"] += ".gone"


def torn_image(line: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    data = Path(line["image"]).read_bytes()
    (folder / "torn.png").write_bytes(data[: len(data) // 2])
    line["image"] = str(folder / "torn.png")


def empty_mask(line: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    mask = np.zeros_like(load_mask(Path(line["mask"])))
    PilImage.fromarray(mask).save(folder / "empty.png")
    line["mask"] = str(folder / "empty.png")


def other_size(line: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    PilImage.fromarray(np.ones((7, 9), bool)).save(folder / "small.png")
    line["mask"] = str(folder / "small.png")


def unknown_category(line: dict[str, Any], _: Path) -> None:
    line["category"] = "flux capacitor"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lost_image, "not a readable image"),
        (torn_image, "not a readable image"),
        (empty_mask, "the mask is empty"),
        (other_size, "the mask is 7 x 9 pixels, the image"),
        (unknown_category, "no phrasings for the category 'flux capacitor'"),
    ],
)
def test_a_bad_row_is_named_and_refused_or_skipped_and_counted(
    change: Any, reason: str, grounding_set: Path, tmp_path: Path
) -> None:
    root = copy_with(grounding_set, tmp_path / "set", change)
    bad = next(s for s in split(load_index(grounding_set))[1])
    options = EvalOptions(data=root, controls=False, every=4)
    oracle: Any = Oracle(grounding_set)
    with pytest.raises(ImageReadError, match=r"--bad-rows skip") as refused:
        evaluate_bundle(oracle, options)
    assert str(refused.value).startswith(f"{bad.id}: ")
    assert reason in str(refused.value)
    options = dataclasses.replace(options, bad_rows="skip")
    done = evaluate_bundle(oracle, options)
    (skipped,) = done.bad
    assert skipped.row == bad.id
    assert reason in skipped.reason
    assert bad.id not in {row.id for row in done.rows if row.kind == "present"}
    asked = [s.id for record in by_image(split(load_index(root))[1])[::4] for s in record.samples]
    assert [row.id for row in done.rows if row.kind == "present"] == [each for each in asked if each != bad.id]
    text = report.markdown(report.figures_of(done, options))
    assert "Rows left out: 1" in text
    assert f"| {bad.id} | " in text


def test_a_bad_row_of_the_prior_is_told_of_too(grounding_set: Path, tmp_path: Path) -> None:
    root = copy_with(grounding_set, tmp_path / "set", lambda line, _: None)
    trained, _ = split(load_index(root))
    text = (root / "index.jsonl").read_text()
    (root / "index.jsonl").write_text(text.replace(str(trained[0].mask), "gone.png"))
    oracle: Any = Oracle(grounding_set)
    with pytest.raises(ImageReadError, match=f"^{trained[0].id}: .*not a readable mask"):
        evaluate_bundle(oracle, EvalOptions(data=root, controls=False))
    done = evaluate_bundle(oracle, EvalOptions(data=root, controls=False, every=4, bad_rows="skip"))
    assert [each.row for each in done.bad] == [trained[0].id]


def test_a_line_that_is_no_row_is_left_out_on_request(grounding_set: Path, tmp_path: Path) -> None:
    root = copy_with(grounding_set, tmp_path / "set", lambda line, _: None)
    with (root / "index.jsonl").open("a") as file:
        file.write("{}\n")
    oracle: Any = Oracle(grounding_set)
    with pytest.raises(ImageReadError, match=r"index\.jsonl:\d+: not a row"):
        evaluate_bundle(oracle, EvalOptions(data=root, controls=False))
    done = evaluate_bundle(oracle, EvalOptions(data=root, controls=False, every=4, bad_rows="skip"))
    assert [each.row for each in done.bad] == [f"index.jsonl:{len(load_index(grounding_set)) + 1}"]


def test_a_set_without_a_second_group_says_what_to_do(grounding_set: Path, tmp_path: Path) -> None:
    line = (grounding_set / "index.jsonl").read_text().splitlines()[0]
    (tmp_path / "index.jsonl").write_text(line + "\n")
    with pytest.raises(ImageReadError, match="--groups all"):
        evaluate_bundle(Oracle(grounding_set), EvalOptions(data=tmp_path))  # type: ignore[arg-type]


def test_rows_of_another_form_may_have_questions_boxes_and_absent_targets_of_their_own(grounding_set: Path) -> None:
    first, second = [s for s in load_index(grounding_set) if s.source == "kvasir_seg"][:2]
    oracle: Any = Oracle(grounding_set)
    oracle._asked |= {"my own question": "polyp", "what is not here": "nothing"}
    x1, y1, x2, y2 = box_of(load_mask(first.mask))

    def case(sample: Any, **changes: Any) -> Case:
        return Case(sample=sample, pixels=lambda: load_pixels(sample.image), mask=None, **changes)

    data = EvalSet(
        samples=[first, second],
        asked=[
            case(
                dataclasses.replace(first, category="xyz"),
                query="my own question",
                box=(x1, y1, x2, y1 + (y2 - y1) / 2),
            ),
            case(dataclasses.replace(first, id="none"), query="what is not here", absent=True),
            case(dataclasses.replace(second, id="beyond"), query="my own question", box=(0.0, 0.0, 9999.0, 5.0)),
        ],
        prior=([], np.zeros((0, 4))),
        prior_of="nothing",
    )
    done = evaluate_bundle(oracle, EvalOptions(data=grounding_set, controls=False, bad_rows="skip"), data=data)
    there, not_there = (next(r for r in done.rows if r.kind == kind) for kind in ("present", "absent (given)"))
    assert there.query == "my own question"
    assert there.iou == pytest.approx(0.5)
    assert math.isnan(there.dice)
    assert math.isnan(there.nsd)
    assert not_there.said_absent
    (bad,) = done.bad
    assert bad.row == "beyond"
    assert "reaches beyond the image" in bad.reason
    assert report.figures_of(done, EvalOptions(data=grounding_set))["detection"]["absent"]["recall"]["mean"] == 1.0
