"""The report's pictures, and the page that shows them."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from medreasoner.ops import rle_encode
from medreasoner.render import TRUTH
from medreasoner_train.data import Sample
from medreasoner_train.evalset import BadRow, Case, EvalSet
from medreasoner_train.evaluate import EvalOptions, Evaluation
from medreasoner_train.exhibits import choose, picture
from medreasoner_train.page import html
from medreasoner_train.report import figures_of
from medreasoner_train.scoring import Row

SHAPE = (60, 90)
TRUE = np.zeros(SHAPE, bool)
TRUE[20:50, 10:50] = True
ANSWER = np.zeros(SHAPE, bool)
ANSWER[25:55, 40:80] = True


def answer(name: str, score: float, key: str = "CT/liver", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "kind": "present", "key": key, "group": name, "source": "s", "found": True, "absent_probability": 0.25,
        "id": name, "super_category": "organ", "query": f"where is <{name}>?", "box": (40.0, 25.0, 80.0, 55.0),
        "points": ((50.0, 40.0), (70.0, 40.0)), "mask": rle_encode(ANSWER), "iou": score, "dice": score, "nsd": score,
        "prior_iou": 0.1, "dice_box": score, "dice_points": score, "pdice_paper": score, "pdice_corrected": score,
        "true_prompt_dice": 0.9,
    }  # fmt: skip
    return Row(**(values | changes))


def case(name: str) -> Case:
    sample = Sample(id=name, image=Path(name), mask=Path(name), source="s", modality="CT", super_category="organ",
                    category="liver", group=name, licence_class="open")  # fmt: skip
    return Case(sample=sample, pixels=lambda: np.full(SHAPE, 90, np.uint8), mask=lambda: TRUE)


ROWS = [
    *(answer(f"r{n}", n / 20, key=f"CT/{'liver' if n % 2 else 'kidney'}") for n in range(21)),
    answer("lost", 0.0, found=False, box=None, points=None, mask=None, absent_probability=0.99),
    answer("ghost", float("nan"), kind="absent (elsewhere)"),
    answer("control", 1.0, kind="blank image"),
]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    data = EvalSet(samples=[], asked=[case(row.id) for row in ROWS], prior=([], np.zeros((0, 4))), prior_of="a & b")
    sets = {"all": frozenset[str](), "informative": frozenset({"CT/liver"}), "every category": frozenset({"CT/liver"})}
    bad = [BadRow(row="<b>17</b>", reason="its mask is empty")]
    return Evaluation(rows=ROWS, sets=sets, bad=bad, data=data, model="toy 1 (manifest 00)")


def test_best_median_and_worst_are_what_their_names_say() -> None:
    sections = {section.name: [row.id for row in section.rows] for section in choose(ROWS, 2)}
    assert sections == {
        "best": ["r20", "r19"],
        "median": ["r9", "r10"],  # the median over 22 questions, one of them 0, is 0.475
        "worst": ["r0", "r1"],
        "missed": ["lost"],
        "made-up": ["ghost"],
    }


def test_other_categories_come_first_and_nothing_is_shown_twice() -> None:
    rows = [answer("a", 0.9), answer("b", 0.8), answer("c", 0.7, key="CT/kidney")]
    assert [row.id for row in choose(rows, 2)[0].rows] == ["a", "c"]
    shown = [row.id for section in choose(rows, 3) for row in section.rows]
    assert sorted(shown) == ["a", "b", "c"]
    assert choose([], 4) == []


def decoded(uri: str) -> np.ndarray:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    with PilImage.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image).astype(int)


def test_the_picture_has_the_truth_in_its_colour_and_the_answer_tinted() -> None:
    drawn = decoded(picture(answer("x", 0.5), case("x")))
    assert drawn.shape == (320, 480, 3)
    scale = 480 / 90

    def at(x: float, y: float) -> Any:
        return drawn[int(y * scale), int(x * scale)]

    assert np.abs(at(10, 35) - TRUTH).max() < 60  # on the outline of what is true
    assert np.abs(at(25, 35) - 90).max() < 12  # within it, the image
    tinted = at(65, 50)  # within the answer
    assert tinted[2] > tinted[0] + 20
    without = decoded(picture(answer("x", 0.5, kind="absent (elsewhere)"), case("x")))
    assert np.abs(without[int(35 * scale), int(10 * scale)] - 90).max() < 12


def test_large_images_are_made_small() -> None:
    big = Case(sample=case("x").sample, pixels=lambda: np.zeros((2000, 1000), np.uint8), mask=None)
    assert decoded(picture(answer("x", 0.5, mask=None), big)).shape == (480, 240, 3)


class Reader(HTMLParser):
    """Tags that are open, ids, links, sources, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names.add(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values["href"] or ""] if "href" in values else []
        self.sources += [values["src"] or ""] if "src" in values else []
        if tag not in {"img", "meta"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_whose_links_lead_somewhere(evaluation: Evaluation) -> None:
    options = EvalOptions(data=Path("a<b"))
    figures = figures_of(evaluation, options)
    text = html(figures, evaluation, count=2)
    page = Reader()
    page.feed(text)
    assert page.open == []
    assert page.links
    assert {link.removeprefix("#") for link in page.links} == set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.sources) == 8  # two, two, two, one missed, one made up
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not page.names & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\(", text)
    assert "where is <r20>?" in page.text
    assert "<b>17</b>" in page.text
    assert "Dice 1.000" in page.text
    assert "answered absent, P(absent) 0.990" in page.text
    assert f"{figures['sets']['informative']['dice']['mean']:.3f}" in page.text


def test_a_page_without_pictures(evaluation: Evaluation) -> None:
    page = Reader()
    page.feed(html(figures_of(evaluation, EvalOptions(data=Path("x"))), evaluation, count=0))
    assert page.sources == []
    assert "best" not in page.ids
