"""The rewards against numbers worked out by hand, areas that are counted, and what must hold for any answer."""

import json
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreasoner_train import rewards
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
    assert points_reward(points, truth, mode="base") == 1.0
    assert points_reward(((150.0, 100.0), (270.0, 100.0)), truth, mode="base") == 0.0  # outside the box


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


def test_the_published_base_mode_never_scores_geometry() -> None:
    found = score(RIGHT, TRUTH, mode="base", compat="paper-code")
    assert (found.thinking, found.segment, found.box, found.points) == (1, 1, 0, 0)


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


def test_points_that_the_data_do_not_have_earn_nothing() -> None:
    bare = Truth(box=TRUTH.box, points=None, size=TRUTH.size)
    found = score(RIGHT, bare, mode="hard")
    assert (found.box, found.points) == (pytest.approx(3), 0)
    # The box that is half the true one, without the penalty for the point outside: 0.7 + 0.3 * 0.75 of 0.694868.
    assert box_reward((100, 100, 200, 200), bare, mode="soft") == 0.6428


def test_the_last_answer_counts() -> None:
    both = f"<think>Not {NOTHING}</think>{RIGHT}"
    assert geometry_of(both) == ((100, 100, 300, 200), ((150, 150), (250, 150)))


def test_a_truth_is_whole() -> None:
    with pytest.raises(ValueError, match="points without a box"):
        Truth(box=None, points=((0, 0), (1, 1)), size=(2, 2))
    with pytest.raises(ValueError, match="at least 1"):
        Truth(box=None, points=None, size=(0, 2))


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
    truth=truths(), box=boxes(), first=pairs, second=pairs,
    across=st.sampled_from([1, 2, 4]), down=st.sampled_from([1, 2, 5]),
)  # fmt: skip
def test_the_grid_of_the_answer_does_not_matter(
    truth: Truth, box: Any, first: Any, second: Any, across: int, down: int
) -> None:
    def smaller(values: Any) -> Any:
        return tuple(value / (down if k % 2 else across) for k, value in enumerate(values))

    assert truth.box is not None
    assert truth.points is not None
    other = Truth(
        box=smaller(truth.box),
        points=(smaller(truth.points[0]), smaller(truth.points[1])),
        size=(840 // across, 840 // down),
    )
    for mode in ("base", "soft", "hard"):
        one = score(text_of(box, first, second), truth, mode=mode)  # type: ignore[arg-type]
        two = score(text_of(smaller(box), smaller(first), smaller(second)), other, mode=mode)  # type: ignore[arg-type]
        assert (one.box, one.points) == pytest.approx((two.box, two.points), abs=3e-4)


@settings(deadline=None)
@given(truth=truths(), first=pairs, second=pairs, mode=st.sampled_from(["base", "soft", "hard"]))
def test_the_order_of_the_points_does_not_matter(truth: Truth, first: Any, second: Any, mode: Any) -> None:
    one, two = points_reward((first, second), truth, mode=mode), points_reward((second, first), truth, mode=mode)
    assert one == pytest.approx(two, abs=1e-9)


@settings(deadline=None)
@given(truth=truths(), box=boxes(), near=st.floats(0, 1), far=st.floats(0, 1), mode=st.sampled_from(["soft", "base"]))
def test_a_box_on_the_way_to_the_truth_earns_no_less(
    truth: Truth, box: Any, near: float, far: float, mode: Any
) -> None:
    """Sides that move towards the true ones, first in overlap: containing boxes only, whose overlap is theirs."""
    assert truth.box is not None
    low, high = sorted((near, far))

    def between(share: float) -> Any:
        outer = (*np.minimum(box[:2], truth.box[:2]), *np.maximum(box[2:], truth.box[2:]))  # type: ignore[index]
        return tuple(float(o + share * (t - o)) for o, t in zip(outer, truth.box, strict=True))  # type: ignore[arg-type]

    assert box_reward(between(high), truth, mode=mode) >= box_reward(between(low), truth, mode=mode) - 1e-9


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
    assert parse_answer("<answer>" * 50_000) is None
    assert parse_answer("<answer></answer>" * 20_000) is None
    assert format_thinking("<think>" * 50_000) == 0.0
