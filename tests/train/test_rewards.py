"""The rewards against numbers worked out by hand, areas that are counted, and what must hold for any answer."""

import json
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreasoner import MedReasonerError
from medreasoner.ops import AnswerParser
from medreasoner_train import rewards
from medreasoner_train.reward_geometry import box_align, box_iou, box_scale, points_align, points_angle
from medreasoner_train.rewards import (
    Truth,
    box_reward,
    disc_dice,
    format_segment,
    format_thinking,
    geometry_of,
    parse_answer,
    penalize,
    points_reward,
    score,
    smooth_exp,
    smooth_log,
)

TRUTH = Truth(box=(100, 100, 300, 200), points=((150, 150), (250, 150)), size=(840, 840))
ABSENT = Truth(box=None, points=None, size=(840, 840))
NOTHING = '<answer>{"bbox": null, "points_1": null, "points_2": null}</answer>'


def text_of(box: Any, first: Any, second: Any, thought: str = "") -> str:
    return f"{thought}<answer>{json.dumps({'bbox': box, 'points_1': first, 'points_2': second})}</answer>"


RIGHT = text_of([100, 100, 300, 200], [150, 150], [250, 150], "<think>There.</think>")


def test_helpers_at_places_worked_out_by_hand() -> None:
    assert smooth_log(0.5) == pytest.approx(0.694868, abs=1e-6)  # 0.1 + 0.9 ln 2.5 / ln 4
    assert smooth_exp(1.0) == pytest.approx(0.55, abs=1e-12)  # the logistic is odd about its middle
    assert smooth_exp(0.5, c=0.5) == pytest.approx(0.645647, abs=1e-6)  # 0.1 + 0.9 (0.5 - 0.010987) / 0.806588
    assert penalize(0.8, 0.5, 1.0) == 0.74  # 0.56 + 0.24 * 0.75
    assert penalize(3.0, 1.0, 1.0) == 1.0
    assert penalize(-1.0, 1.0, 1.0) == 0.0
    assert penalize(0.123456, 1.0, 1.0) == 0.1235


def test_a_box_that_is_half_the_true_one() -> None:
    box = (100, 100, 200, 200)
    # IoU 1/2; the second true point lies outside: 0.5; its area is just not above half: 0.5; so 0.85 of each.
    assert box_reward(box, TRUTH, mode="soft") == 0.5906  # 0.85 * 0.694868
    # Corners off by 25 px on average, the diagonal is 223.607: s(0.111803) = 0.934905, 0.982434 * 0.85 = 0.8351.
    # Area and aspect are off by ln 2 each, 0.980258 together: s = 0.191428, 0.301338 * 0.85 = 0.2561.
    assert box_reward(box, TRUTH, mode="hard") == pytest.approx(0.5906 + 0.8351 + 0.2561, abs=1e-9)
    assert box_reward(box, TRUTH, mode="base") == 0.0  # the overlap is not above 0.5, and 25 px are not below 10
    assert box_reward((100, 100, 300, 190), TRUTH, mode="base") == 2.0


def test_points_that_are_half_a_disc_off() -> None:
    truth = Truth(box=(100, 50, 260, 150), points=((100, 100), (200, 100)), size=(840, 840))
    points = ((150.0, 100.0), (250.0, 100.0))
    # Radii 50, centres 50 apart: r² (2 pi / 3 - sqrt(3) / 2) = 3070.92 of 7853.98.
    assert disc_dice(points, truth.points) == pytest.approx(0.391002, abs=1e-5)
    assert disc_dice(points, truth.points, compat="paper-code") == pytest.approx(0.486019, abs=1e-5)
    assert points_reward(points, truth, mode="soft") == 0.6039  # 0.1 + 0.9 ln(1 + 3 * 0.391002) / ln 4
    assert points_reward(points, truth, mode="soft", compat="paper-code") == 0.6839  # the same of 0.486019
    # Off by 25 px on average over x and y; diagonal 188.680: s(0.132500) = 0.931013, 0.978563. The angle is 0: 1.
    assert points_reward(points, truth, mode="hard") == pytest.approx(0.6039 + 0.9786 + 1.0, abs=1e-4)


def test_points_that_are_turned_and_closer_together() -> None:
    points = ((185.0, 130.0), (215.0, 170.0))  # about the same centre, radius 25 in place of 50: 1/4 of the area
    # Dice 2 * 1 / (4 + 1) = 0.4, 0.1 + 0.9 ln 2.2 / ln 4; theirs 2 * 1 / 4 = 0.5.
    assert points_reward(points, TRUTH, mode="soft") == 0.6119
    assert points_reward(points, TRUTH, mode="soft", compat="paper-code") == 0.6949
    # Off by (35 + 20 + 35 + 20) / 4 = 27.5 of 223.607: s(0.122984) = 0.932833, 0.980371. The directions (30, 40) and
    # (100, 0): |cos| = 0.6, 0.1 + 0.9 ln 2.8 / ln 4 = 0.768443.
    assert points_reward(points, TRUTH, mode="hard") == pytest.approx(0.6119 + 0.9804 + 0.7684, abs=1e-9)
    assert points_reward(points[::-1], TRUTH, mode="hard") == points_reward(points, TRUTH, mode="hard")


def test_base_mode_asks_for_points_near_the_true_ones_in_the_answers_own_box() -> None:
    box, points = (90.0, 90.0, 320.0, 220.0), ((310.0, 150.0), (150.0, 150.0))
    # Better order swapped: (0 + 0 + 60 + 0) / 4 = 15 px off; one lies outside the true box, which base mode allows.
    assert points_reward(points, TRUTH, mode="base", box=box) == 1.0
    assert points_reward(points, TRUTH, mode="base", box=(90.0, 90.0, 305.0, 220.0)) == 0.0
    assert points_reward(points, TRUTH, mode="base") == 0.0  # there is no box
    whole = (0.0, 0.0, 840.0, 840.0)
    # Moved by 99 px along x and by 100 px along y: 99.5 px on average; another px makes it 100.
    assert points_reward(((249.0, 250.0), (349.0, 250.0)), TRUTH, mode="base", box=whole) == 1.0
    assert points_reward(((250.0, 250.0), (350.0, 250.0)), TRUTH, mode="base", box=whole) == 0.0


def test_a_box_without_area_has_no_scale() -> None:
    box = (150.0, 100.0, 150.0, 200.0)
    # IoU 0: 0.1. One true point lies on its edge, which is inside, the other outside; the area is below half: 0.85.
    assert box_reward(box, TRUTH, mode="soft") == 0.085
    assert box_reward(box, TRUTH, mode="hard") == 0.0
    assert box_reward((100.0, 100.0, 300.0, 100.0), TRUTH, mode="hard") == 0.0
    assert box_reward((300.0, 100.0, 100.0, 200.0), TRUTH, mode="hard") == 0.0  # left and right swapped
    # Both corners swapped: IoU 0, both points outside, 0.7 + 0.3 * (0.25 + 0.5) / 2 = 0.8125 of each. Off by 150 px of
    # 223.607: s(0.670820) = 0.728596, 0.777296 (of which 0.6316); area and aspect are right: 1.
    assert box_reward((300.0, 200.0, 100.0, 100.0), TRUTH, mode="hard") == pytest.approx(
        0.0812 + 0.6316 + 0.8125, abs=2e-4
    )


def test_geometry_is_judged_on_the_840_px_grid() -> None:
    # 420 x 210: a pixel is 2 wide and 4 high. So this is TRUTH, and its box that is half the true one.
    small = Truth(box=(50, 25, 150, 50), points=((75, 37.5), (125, 37.5)), size=(420, 210))
    found = score(text_of([50, 25, 100, 50], [75, 37.5], [80, 37.5]), small)
    assert found.box == 0.5906
    # The points lie 10 px apart, not more: 0.925. Radii 50 and 5, inside: Dice 2 * 25 / (2500 + 25) = 0.019802,
    # smooth_log 0.1 + 0.9 ln 1.059406 / ln 4 = 0.137465, of which 0.925.
    assert found.points == 0.1272


def test_points_outside_and_close_together_earn_less() -> None:
    inside, spread = ((150.0, 150.0), (250.0, 150.0)), TRUTH
    assert points_reward(inside, spread, mode="soft") == 1.0
    # Both outside: 0.25, and 0.7 + 0.3 * (0.25 + 1) / 2 = 0.8875 of smooth_log(0) = 0.1.
    assert points_reward(((500.0, 500.0), (600.0, 500.0)), spread, mode="soft") == 0.0887
    # 10 px apart is not more than 10: 0.7 + 0.3 * 0.75 = 0.925.
    close = Truth(box=(100, 100, 300, 200), points=((150, 150), (160, 150)), size=(840, 840))
    assert points_reward(((150.0, 150.0), (160.0, 150.0)), close, mode="soft") == 0.925


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("", 0.0),
        ("<think>only open", 0.0),
        ("</think><think>", 0.0),
        ("<think> \n </think>", 0.2),
        ("<think>so</think>", 1.0),
    ],
)
def test_form_of_a_thought(text: str, worth: float) -> None:
    assert format_thinking(text) == worth


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("", 0.0),
        ("<answer>{}", 0.0),
        ("</answer>{}<answer>", 0.0),
        ("<answer>left of the middle</answer>", 0.2),
        ("<answer>[1, 2]</answer>", 0.2),
        ('<answer>{"bbox": [1, 2, 3, 4], "points_1": [1, 2]}</answer>', 0.4),
        (text_of([1, 2, 3], [1], "x"), 0.4),
        (text_of([1, 2, 3, 4], [1, 2], [1]), 0.6),
        (text_of(None, [1, 2], [1, 3]), 0.6),
        (text_of([True, 2, 3, 4], [1, 2], [1, 3]), 0.6),
        (text_of([9, 9, 1, 1], [-1, 2], [1e9, 3]), 1.0),
        ("<answer>{'bbox': [1, 2, 3, 4], 'points_1': [1, 2], 'points_2': [3, 4]}</answer>", 1.0),
        (NOTHING, 1.0),
    ],
)
def test_form_of_an_answer(text: str, worth: float) -> None:
    assert format_segment(text) == worth


def test_nothing_is_no_valid_answer_to_the_published_code() -> None:
    assert format_segment(NOTHING, compat="paper-code") == 0.4


def test_all_is_right() -> None:
    full = {"soft": (1, 1), "hard": (3, 3), "base": (2, 1)}
    for mode, (box, points) in full.items():
        found = score(RIGHT, TRUTH, mode=mode, mask_dice=0.75)  # type: ignore[arg-type]
        assert (found.thinking, found.segment, found.mask) == (1, 1, 0.75)
        assert (found.box, found.points) == pytest.approx((box, points), abs=1e-4), mode
        assert found.total == pytest.approx(2.75 + box + points, abs=1e-4)
    assert score(RIGHT, TRUTH, think=False).thinking == 0


def test_the_published_base_mode_never_scores_a_box() -> None:
    """Its rewards for IoU and for the box's L1 fail on the truth; its reward for points does not touch what fails."""
    found = score(RIGHT, TRUTH, mode="base", compat="paper-code")
    assert (found.thinking, found.segment, found.box, found.points) == (1, 1, 0, 1)
    assert score(NOTHING, ABSENT, mode="base", compat="paper-code").box == 0


def test_the_published_overlap_reaches_two_and_the_penalty_cuts_it() -> None:
    assert disc_dice(TRUTH.points, TRUTH.points, compat="paper-code") == pytest.approx(2, abs=1e-6)  # type: ignore[arg-type]
    assert score(RIGHT, TRUTH, compat="paper-code").points == 1.0


@pytest.mark.parametrize("mode", ["base", "soft", "hard"])
def test_absent(mode: Any) -> None:
    right = score(NOTHING, ABSENT, mode=mode, think=False, mask_dice=0.0)
    there = score(RIGHT, TRUTH, mode=mode, think=False, mask_dice=1.0)
    assert right.total == pytest.approx(there.total, abs=1e-3)
    for text, truth in ((RIGHT, ABSENT), (NOTHING, TRUTH)):
        wrong = score(text, truth, mode=mode, think=False, mask_dice=0.0)
        assert (wrong.segment, wrong.box, wrong.points, wrong.mask) == (1, 0, 0, 0)
    assert score(NOTHING, ABSENT, mode=mode).mask == 0  # nothing was measured


def test_a_mask_earns_only_where_the_answer_asked_for_one() -> None:
    assert score(text_of([100, 100, 300, 200], None, None), TRUTH, mask_dice=0.5).mask == 0.5  # by the box alone
    assert score("<think>Cut off", TRUTH, mask_dice=0.5).mask == 0
    assert score(NOTHING, TRUTH, mask_dice=1.0).mask == 0
    assert score(NOTHING, ABSENT, mask_dice=0.0).mask == 1
    assert score(RIGHT, ABSENT, mask_dice=1.0).mask == 0


def test_nulls_are_an_answer_only_together() -> None:
    assert score(text_of(None, [150, 150], [250, 150]), ABSENT, mode="hard").total == 0.6
    assert score(text_of([100, 100, 300, 200], None, [1, 1]), TRUTH).segment == 0.6
    assert score('<answer>{"bbox": null, "points_1": null}</answer>', ABSENT).total == 0.4


def test_points_that_the_data_do_not_have_earn_nothing() -> None:
    bare = Truth(box=TRUTH.box, points=None, size=TRUTH.size)
    found = score(RIGHT, bare, mode="hard")
    assert (found.box, found.points) == (pytest.approx(3), 0)
    # The box that is half the true one, without the penalty for the point outside: 0.7 + 0.3 * 0.75 of 0.694868.
    assert box_reward((100, 100, 200, 200), bare, mode="soft") == 0.6428


def test_the_last_answer_counts() -> None:
    both = f"<think>Not {NOTHING}</think>{RIGHT}"
    assert geometry_of(both) == ((100, 100, 300, 200), ((150, 150), (250, 150)))
    assert score(f"{RIGHT}{NOTHING}", ABSENT).box == 1
    assert geometry_of(f"{RIGHT} or </answer>") == geometry_of(RIGHT)  # up to the next closing tag
    assert parse_answer(f"{RIGHT}<answer>") == "no_answer"  # the last was broken off


FRAGMENTS = (
    "<answer>", "</answer>", "<think>", "</think>", "<answer", "{", "}", "[", "]", ",", ":", '"bbox"', "'points_1'",
    '"points_2"', "null", "NaN", "true", "1e400", "12", "-0.5", " ", "text", "[1, 2]", "[1, 2, 3, 4]", NOTHING, RIGHT,
    "{'bbox': [1, 2, 3, 4], 'points_1': [1, 2], 'points_2': [3, ", "4]}",
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=9))
def test_what_is_rewarded_is_what_the_runtime_reads(parts: list[str]) -> None:
    text = "".join(parts)
    parser = AnswerParser()
    parser.feed(text)
    read = parser.result()
    found = parse_answer(text)
    if read.status in ("no_answer", "incomplete"):
        assert found == "no_answer"
    assert geometry_of(text) == ((read.bbox, (read.points_1, read.points_2)) if read.status == "ok" else None)
    assert (score(text, ABSENT).box == 1) == read.absent
    assert (format_segment(text) == 1) == (read.status in ("ok", "absent"))
    assert (format_thinking(text) > 0) == ("</think>" in text.partition("<think>")[2])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"points": ((0, 0), (1, 1))}, "points without a box"),
        ({"size": (0, 2)}, "at least 1"),
        ({"box": (3, 1, 3, 4)}, "x1 is less than x2"),
        ({"box": (1, 4, 3, 1)}, "y1 less than y2"),
        ({"box": (1, math.nan, 3, 4)}, "no coordinates"),
        ({"box": (1, 1, 3, 4), "points": ((1, 1), (math.inf, 1))}, "no coordinates"),
    ],
)
def test_a_truth_is_whole(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(MedReasonerError, match=told):
        Truth(**{"box": None, "points": None, "size": (8, 8)} | wrong)


def test_what_no_caller_means_is_refused() -> None:
    with pytest.raises(MedReasonerError, match="expected one of base, soft, hard"):
        score(RIGHT, TRUTH, mode="harder")  # type: ignore[arg-type]
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(MedReasonerError, match=r"in \[0, 1\]"):
            score(RIGHT, TRUTH, mask_dice=wrong)
    with pytest.raises(MedReasonerError, match="absent"):
        box_reward((1, 1, 2, 2), ABSENT, mode="soft")
    with pytest.raises(MedReasonerError, match="absent"):
        points_reward(((1, 1), (2, 2)), ABSENT, mode="soft")


coordinate = st.integers(0, 839)
pairs = st.tuples(coordinate, coordinate)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[float, float, float, float]:
    x1, y1 = draw(st.integers(0, 800)), draw(st.integers(0, 800))
    return x1, y1, draw(st.integers(x1 + 1, 840)), draw(st.integers(y1 + 1, 840))


@st.composite
def truths(draw: st.DrawFn) -> Truth:
    x1, y1, x2, y2 = draw(boxes())
    inside = st.tuples(st.integers(int(x1), int(x2)), st.integers(int(y1), int(y2)))
    return Truth(box=(x1, y1, x2, y2), points=(draw(inside), draw(inside)), size=(840, 840))


@settings(deadline=None)
@given(truth=truths(), box=boxes(), first=pairs, second=pairs, mode=st.sampled_from(["base", "soft", "hard"]))
def test_every_part_stays_within_its_range(truth: Truth, box: Any, first: Any, second: Any, mode: Any) -> None:
    found = score(text_of(box, first, second), truth, mode=mode)
    most = {"base": (2, 1), "soft": (1, 1), "hard": (3, 3)}[mode]
    assert 0 <= found.box <= most[0]
    assert 0 <= found.points <= most[1]
    assert found.total == pytest.approx(found.segment + found.box + found.points)


@settings(deadline=None)
@given(
    truth=truths(), box=boxes(), first=pairs, second=pairs, factor=st.integers(2, 50), side=st.integers(1, 3000),
    mode=st.sampled_from(["base", "soft", "hard"]),
)  # fmt: skip
def test_a_finer_grid_changes_nothing(
    truth: Truth, box: Any, first: Any, second: Any, factor: int, side: int, mode: Any
) -> None:
    def finer(values: Any) -> Any:
        return tuple(value * factor for value in values)

    assert truth.box is not None
    assert truth.points is not None
    plain = Truth(box=truth.box, points=truth.points, size=(side, side + 7))
    points = (finer(truth.points[0]), finer(truth.points[1]))
    fine = Truth(box=finer(truth.box), points=points, size=finer(plain.size))
    own = score(text_of(box, first, second), plain, mode=mode)
    assert score(text_of(finer(box), finer(first), finer(second)), fine, mode=mode) == own


@settings(deadline=None)
@given(truth=truths(), first=pairs, second=pairs, mode=st.sampled_from(["base", "soft", "hard"]))
def test_the_order_of_the_points_does_not_matter(truth: Truth, first: Any, second: Any, mode: Any) -> None:
    one, two = points_reward((first, second), truth, mode=mode), points_reward((second, first), truth, mode=mode)
    assert one == pytest.approx(two, abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(truth=boxes(), box=boxes(), near=st.floats(0, 1), far=st.floats(0, 1))
def test_a_box_on_the_way_to_the_truth_has_no_less_of_any_smooth_part(
    truth: Any, box: Any, near: float, far: float
) -> None:
    """Without penalties: that of the area may come and go on the way, where one side shrinks and the other grows."""
    low, high = (tuple(a + share * (b - a) for a, b in zip(box, truth, strict=True)) for share in sorted((near, far)))
    for part in (box_iou, box_align, box_scale):
        assert part(high, truth) >= part(low, truth) - 1e-9  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    truth=truths(), by=st.tuples(st.integers(-400, 400), st.integers(-400, 400)), ends=st.tuples(*[st.floats(0, 1)] * 2)
)
def test_points_that_are_moved_back_have_no_less_of_any_smooth_part(truth: Truth, by: Any, ends: Any) -> None:
    assert truth.box is not None
    assert truth.points is not None
    first, second = truth.points

    def moved(share: float) -> Any:
        return tuple((x + share * by[0], y + share * by[1]) for x, y in (first, second))

    near, far = (moved(share) for share in sorted(ends))
    assert disc_dice(near, truth.points) >= disc_dice(far, truth.points) - 1e-9
    assert points_align(near, truth.points, truth.box) >= points_align(far, truth.points, truth.box) - 1e-9
    assert points_angle(near, truth.points) == pytest.approx(points_angle(far, truth.points), abs=1e-6)


@settings(deadline=None)
@given(st.floats(0, 90), st.floats(0, 90), st.floats(1, 300), st.booleans())
def test_the_angle_counts_from_none_to_a_right_one(one: float, other: float, length: float, turned: bool) -> None:
    def pair(degrees: float) -> Any:
        x, y = length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))
        return ((400.0, 400.0), (400 + x, 400 + y)) if not turned else ((400 + x, 400 + y), (400.0, 400.0))

    low, high = sorted((one, other))
    truth = ((10.0, 10.0), (60.0, 10.0))
    assert points_angle(pair(low), truth) >= points_angle(pair(high), truth) - 1e-9


@settings(deadline=None, max_examples=40)
@given(*[st.tuples(*[st.integers(-2, 30)] * 4)] * 2)
def test_overlap_of_boxes_against_pixels_that_are_counted(a: Any, b: Any) -> None:
    def filled(box: Any) -> Any:
        mask = np.zeros((32, 32), bool)  # of pixels from -2 on
        mask[slice(*np.array(box[1::2]) + 2), slice(*np.array(box[::2]) + 2)] = True
        return mask

    one, two = filled(a), filled(b)
    assert box_iou(a, b) == pytest.approx((one & two).sum() / max((one | two).sum(), 1))


@settings(deadline=None, max_examples=30)
@given(a=st.tuples(pairs, pairs), b=st.tuples(pairs, pairs))
def test_discs_against_pixels_that_are_counted(a: Any, b: Any) -> None:
    grid = np.stack(np.meshgrid(np.arange(-420, 1260, 2) + 1.0, np.arange(-420, 1260, 2) + 1.0), axis=-1)

    def disc(pair: Any) -> Any:
        centre, radius = np.mean(pair, axis=0), math.dist(*pair) / 2
        return np.hypot(*(grid - centre).transpose(2, 0, 1)) <= radius

    one, two = disc(a), disc(b)
    total = int(one.sum()) + int(two.sum())
    counted = 2 * int((one & two).sum()) / max(total, 1)
    # A circle's border runs through pixels: the fewer there are in all, the coarser the count.
    assert disc_dice(a, b) == pytest.approx(counted, abs=0.01 + 12 / math.sqrt(total + 144))


wild = st.one_of(
    st.text(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(rewards.KEYS), inner, max_size=3),
        max_leaves=12,
    ).map(json.dumps),
)


@settings(deadline=None, max_examples=300)
@given(body=wild, before=st.text(max_size=10), truth=st.sampled_from([TRUTH, ABSENT]))
def test_no_text_raises(body: str, before: str, truth: Truth) -> None:
    for mode in ("base", "soft", "hard"):
        for compat in (None, "paper-code"):
            found = score(f"{before}<answer>{body}</answer>", truth, mode=mode, compat=compat)  # type: ignore[arg-type]
            assert math.isfinite(found.total)


@pytest.mark.parametrize(
    "body",
    [
        '{"bbox": [1e400, 0, 1, 1], "points_1": [0, 0], "points_2": [0, 0]}',
        '{"bbox": [NaN, 0, 1, 1], "points_1": [Infinity, 0], "points_2": [0, 0]}',
        '{"bbox": [' + "9" * 5000 + ', 0, 1, 1], "points_1": [0, 0], "points_2": [0, 0]}',
        '{"bbox": [1e300, 1e300, -1e300, 1e308], "points_1": [1e308, -1e308], "points_2": [-1e308, 1e308]}',
        "[" * 9000,
        "{" * 200_000,
        '{"bbox": [5, 5, 5, 5], "points_1": [5, 5], "points_2": [5, 5]}',
    ],
)
def test_texts_that_were_meant_to_break_it(body: str) -> None:
    start = time.perf_counter()
    found = score(f"<answer>{body}</answer>", TRUTH, mode="hard")
    assert math.isfinite(found.total)
    assert 0 <= found.box <= 3
    assert time.perf_counter() - start < 5  # no search that grows with a power of the length


def test_many_tags_are_read_once() -> None:
    assert parse_answer("<answer>" * 50_000) == "no_answer"
    assert parse_answer("<answer></answer>" * 20_000) == "malformed"
    assert parse_answer(f"<answer>{' ' * 70_000}{{}}</answer>") == "malformed"  # longer than the runtime reads
    assert format_thinking("<think>" * 50_000) == 0.0


def test_a_step_of_a_thousand_answers_takes_no_time() -> None:
    thought = "<think>" + "The bright rim on the left is the wall of a vessel. " * 40 + "</think>"
    texts = [text_of([k % 400, 9, 500, 600], [k % 500, 40.5], [300, 300], thought) for k in range(1000)]
    spent = []
    for _ in range(3):
        start = time.process_time()
        for text in texts:
            score(text, TRUTH, mode="hard")
        spent.append(time.process_time() - start)
    assert min(spent) < 0.2


def test_discs_that_are_hardly_apart_are_one() -> None:
    near = ((0.0, 0.0), (0.0, 0.0)), ((0.0, 5e-324), (0.0, 5e-324))
    assert disc_dice(*near) == pytest.approx(disc_dice(near[0], near[0]))
    wide = ((0.0, 0.0), (100.0, 0.0)), ((1e-200, 0.0), (100.0, 1e-200))
    assert disc_dice(*wide) == pytest.approx(1.0)
