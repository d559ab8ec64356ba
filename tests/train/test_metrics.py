"""Means with intervals over groups, and overlaps of masks, outlines and discs."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from medreasoner_train.metrics import dice, disc_overlap, group_mean, surface_dice

rows = strategies.lists(
    strategies.tuples(strategies.floats(0, 1), strategies.sampled_from("abcdefgh")), min_size=1, max_size=40
)


@hypothesis.given(rows)
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_interval_contains_the_mean_and_stays_in_range(samples: list[tuple[float, str]]) -> None:
    values, groups = zip(*samples, strict=True)
    own = group_mean(values, groups)
    assert own.count == len(values)
    assert own.mean == pytest.approx(sum(values) / len(values))
    assert min(values) - 1e-9 <= own.low <= own.mean + 1e-9
    assert own.mean - 1e-9 <= own.high <= max(values) + 1e-9


def test_nothing_measured_is_not_a_number() -> None:
    own = group_mean([], [])
    assert own.count == 0
    assert all(math.isnan(value) for value in (own.mean, own.low, own.high))


def test_one_group_has_an_interval_without_width() -> None:
    own = group_mean([0.0, 1.0], ["a", "a"])
    assert (own.mean, own.low, own.high) == (0.5, 0.5, 0.5)


def test_samples_of_one_patient_count_as_one() -> None:
    rng = np.random.default_rng(0)
    patient = rng.random(20)
    values = np.repeat(patient, 50)
    apart = group_mean(values.tolist(), [str(i) for i in range(1000)])
    together = group_mean(values.tolist(), np.repeat([f"p{i}" for i in range(20)], 50).tolist())
    assert together.high - together.low > 4 * (apart.high - apart.low)
    # The interval of a mean of 20 independent values is about +- 2 s / sqrt(20).
    assert together.high - together.low == pytest.approx(3.92 * patient.std() / math.sqrt(20), rel=0.15)


def test_a_seed_gives_the_same_interval() -> None:
    values, groups = [0.1, 0.9, 0.4], ["a", "b", "c"]
    assert group_mean(values, groups) == group_mean(values, groups)
    assert str(group_mean([0.5], ["a"])) == "0.500 [0.500, 0.500]"


def test_dice_counts_pixels() -> None:
    a = np.zeros((4, 4), bool)
    b = a.copy()
    assert dice(a, b) == 1.0
    a[:2] = True
    assert dice(a, b) == 0.0
    b[1:3] = True
    assert dice(a, b) == pytest.approx(2 * 4 / 16)
    assert dice(a, a) == 1.0


places = strategies.tuples(*[strategies.floats(0, 840, width=32)] * 4).map(lambda v: np.array(v).reshape(2, 2))


@hypothesis.given(places, places)
@hypothesis.settings(max_examples=80, deadline=None)
def test_disc_overlaps_stay_in_range_and_do_not_mind_the_order(a: np.ndarray, b: np.ndarray) -> None:
    own = disc_overlap(a, b)
    assert 0 <= own.corrected <= 1
    assert own.corrected <= own.paper + 1e-9  # the union is no more than both discs
    assert own.paper <= 2
    for other in (disc_overlap(b, a), disc_overlap(a[::-1], b)):
        assert other.paper == pytest.approx(own.paper, abs=1e-6)
        assert other.corrected == pytest.approx(own.corrected, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([[200, 300], [500, 300]], [[300, 300], [600, 340]]),
        ([[200, 300], [500, 300]], [[340, 300], [400, 310]]),  # one within the other
        ([[100, 100], [200, 200]], [[150, 260], [190, 330]]),
    ],
)
def test_disc_overlap_is_what_counting_points_gives(a: list[list[float]], b: list[list[float]]) -> None:
    fine = np.stack(np.meshgrid(np.arange(0.25, 840, 0.5), np.arange(0.25, 840, 0.5)), axis=-1)
    first, second = (
        np.hypot(*(fine - np.mean(pair, axis=0)).transpose(2, 0, 1)) <= math.dist(*pair) / 2 for pair in (a, b)
    )
    shared, union = (first & second).sum(), (first | second).sum()
    own = disc_overlap(np.array(a, float), np.array(b, float))
    assert own.paper == pytest.approx(2 * shared / union, abs=2e-3)
    assert own.corrected == pytest.approx(2 * shared / (first.sum() + second.sum()), abs=2e-3)


def test_discs_by_hand() -> None:
    pair = np.array([[100.0, 100.0], [300.0, 100.0]])
    # Circles of radius 100 a radius apart: the lens is r² (2π/3 - √3/2).
    lens = 100**2 * (2 * math.pi / 3 - math.sqrt(3) / 2)
    own = disc_overlap(pair, pair + np.array([100, 0]))
    assert own.corrected == pytest.approx(lens / (math.pi * 100**2), rel=1e-5)
    assert own.paper == pytest.approx(2 * lens / (2 * math.pi * 100**2 - lens), rel=1e-5)
    apart = disc_overlap(pair, pair + np.array([500, 0]))
    assert (apart.paper, apart.corrected) == (0.0, 0.0)
    # A pair of equal points has a disc of 1e-5 px, whose area drowns in the other 1e-5.
    dot = np.array([[7.0, 7.0], [7.0, 7.0]])
    assert disc_overlap(dot, dot).corrected == pytest.approx(2 * math.pi * 1e-10 / (2 * math.pi * 1e-10 + 1e-5))


def square(side: int, top: int, left: int, size: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_surface_dice_counts_the_outline_within_the_tolerance() -> None:
    a = square(84, 20, 20, 40)  # a pixel is 10 px of the 840-px grid
    moved = square(84, 20, 22, 40)  # two pixels to the right: 20 px
    assert surface_dice(a, a, tolerance=0) == 1.0
    assert surface_dice(a, moved, tolerance=20) == 1.0
    # At 19 px each outline's pixels are counted one by one.
    near = surface_dice(a, moved, tolerance=19)
    by_hand = 0
    for own, other in ((a, moved), (moved, a)):
        rim, far = (np.argwhere(m & ~inner(m)) for m in (own, other))
        by_hand += sum(bool((np.hypot(*(far - pixel).T) * 10 <= 19).any()) for pixel in rim)
    assert near == by_hand / (2 * 156)
    assert near < 0.8


def inner(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & mask


def test_surface_dice_measures_each_side_on_the_840_px_grid() -> None:
    mask = np.zeros((100, 400), bool)
    mask[30:60, 100:300] = True
    down, right = np.roll(mask, 1, axis=0), np.roll(mask, 1, axis=1)  # 8.4 px and 2.1 px
    assert surface_dice(mask, down, tolerance=8.5) == surface_dice(mask, right, tolerance=2.2) == 1.0
    assert surface_dice(mask, down, tolerance=8.3) < 0.7
    assert surface_dice(mask, right, tolerance=2.0) < 1.0


def test_surface_dice_of_nothing() -> None:
    none, some = np.zeros((9, 9), bool), square(9, 2, 2, 4)
    assert surface_dice(none, some, tolerance=100) == surface_dice(some, none, tolerance=100) == 0.0
    assert surface_dice(none, none, tolerance=1) == 1.0


def test_surface_dice_of_a_large_image_is_that_on_the_grid() -> None:
    large = square(1680, 400, 400, 800)
    assert surface_dice(large, np.roll(large, 16, axis=0), tolerance=8) == 1.0
    small = surface_dice(large[::2, ::2], np.roll(large, 40, axis=0)[::2, ::2], tolerance=8)
    assert surface_dice(large, np.roll(large, 40, axis=0), tolerance=8) == pytest.approx(small, abs=0.01)


masks = strategies.integers(0, 2**36 - 1).map(lambda n: np.array([n >> k & 1 for k in range(36)], bool).reshape(6, 6))


@hypothesis.given(masks, masks, strategies.floats(0, 500))
@hypothesis.settings(max_examples=60, deadline=None)
def test_surface_dice_is_symmetric_and_grows_with_the_tolerance(a: np.ndarray, b: np.ndarray, reach: float) -> None:
    own = surface_dice(a, b, tolerance=reach)
    assert 0 <= own <= surface_dice(a, b, tolerance=reach + 50) <= 1
    assert own == surface_dice(b, a, tolerance=reach)
    assert surface_dice(a, a, tolerance=0) == 1.0
