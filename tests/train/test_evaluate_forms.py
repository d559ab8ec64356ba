"""A bundle measured on a folder with a CSV: rows with a mask, with a box alone, and with a target that is absent."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from medreasoner import Grounder
from medreasoner_train.evaluate import EvalOptions, evaluate_bundle
from medreasoner_train.report import figures_of
from medreasoner_train.rows import DataError

HEADER = "image,query,mask,x1,y1,x2,y2,p1x,p1y,p2x,p2y,group,category,modality\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        PilImage.fromarray(rng.integers(0, 255, (60, 80), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((60, 80), np.uint8)
    mask[10:40, 20:60] = 255
    PilImage.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "rows.csv").write_text(
        HEADER
        + "a.png,Where is the bright square?,mask.png,,,,,,,,,one,square,drawn\n"
        + "a.png,Where is the ring?,,,,,,,,,,one,ring,drawn\n"
        + "b.png,Where is the bar?,,5,6,30,50,,,,,two,bar,drawn\n"
    )
    return tmp_path


def test_rows_are_measured_as_far_as_their_truth_is_known(folder: Path) -> None:
    options = EvalOptions(data=folder, groups="all", controls=False)
    with Grounder.load("nano", device="cpu") as grounder:
        evaluation = evaluate_bundle(grounder, options)
    square, ring, bar = evaluation.rows
    assert [row.kind for row in evaluation.rows] == ["present", "absent (given)", "present"]
    assert [row.query for row in evaluation.rows] == [
        "Where is the bright square?", "Where is the ring?", "Where is the bar?"
    ]  # fmt: skip
    assert (square.prior_iou, bar.prior_iou) == (1.0, 1.0)  # fitted on these very rows
    assert 0 <= square.dice <= 1
    assert 0 < square.true_prompt_dice <= 1
    assert np.isnan(bar.dice)
    assert np.isnan(ring.iou)
    assert figures_of(evaluation, options)


def test_a_bad_row_is_refused_or_left_out(folder: Path) -> None:
    with (folder / "rows.csv").open("a") as file:
        file.write("c.png,Where is it?,,1,1,9,9,,,,,three,bar,drawn\n")
    with Grounder.load("nano", device="cpu") as grounder:
        with pytest.raises(DataError, match=r"missing image"):
            evaluate_bundle(grounder, EvalOptions(data=folder, groups="all", controls=False))
        options = EvalOptions(data=folder, groups="all", controls=False, bad_rows="skip")
        evaluation = evaluate_bundle(grounder, options)
    assert len(evaluation.rows) == 3
    assert ["rows.csv:5" in row.row for row in evaluation.bad] == [True]
