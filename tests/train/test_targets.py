"""Box and points of a mask, against figures whose largest discs are known."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from medreasoner_train.targets import box_of, inscribed_points

Mask = NDArray[np.bool_]


def disc(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> Mask:
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside: Mask = np.hypot(columns - centre[0], rows - centre[1]) <= radius
    return inside


@pytest.mark.parametrize(("centre", "radius"), [((60.5, 50.5), 30), ((40.5, 80.5), 15), ((70.5, 60.5), 8)])
def test_one_point_of_a_disc_is_its_centre(centre: tuple[float, float], radius: float) -> None:
    mask = disc((120, 120), centre, radius)
    points = inscribed_points(mask)
    from_centre = np.hypot(*(points - np.array(centre)).T)
    assert from_centre.min() <= 1.0
    # The other disc lies in what is left, a ring no wider than a pixel or two: at the rim.
    assert from_centre.max() >= radius - 2.5


def test_two_discs_give_their_two_centres_along_the_axis_on_which_they_part() -> None:
    mask = disc((100, 200), (150.5, 40.5), 28) | disc((100, 200), (50.5, 60.5), 24)
    points = inscribed_points(mask)
    # The grid is 840 x 840 whatever the image: the discs are ellipses there, with the same centres.
    np.testing.assert_allclose(points, [[50.5, 60.5], [150.5, 40.5]], atol=1.5)


def test_a_long_rectangle_holds_discs_as_wide_as_itself() -> None:
    mask = np.zeros((100, 100), bool)
    mask[40:61, 10:90] = True  # 21 rows: the largest discs lie on the middle row
    points = inscribed_points(mask)
    np.testing.assert_allclose(points[:, 1], 50.5, atol=1.0)
    assert abs(points[1, 0] - points[0, 0]) >= 20
    assert points[0, 0] < points[1, 0]


def test_a_full_image_has_its_first_disc_in_the_middle() -> None:
    points = inscribed_points(np.ones((41, 41), bool))
    assert np.abs(points - 20.5).sum(axis=1).min() <= 1.0


def test_the_larger_disc_may_stand_second_since_places_give_the_order() -> None:
    left, right = disc((160, 160), (30.5, 40.5), 10), disc((160, 160), (120.5, 40.5), 25)
    swapped = inscribed_points((left | right)[:, ::-1])
    np.testing.assert_allclose(inscribed_points(left | right)[:, 0], [30.5, 120.5], atol=1.5)
    np.testing.assert_allclose(swapped[:, 0], [39.5, 129.5], atol=1.5)


masks = arrays.arrays(np.bool_, strategies.tuples(strategies.integers(1, 24), strategies.integers(1, 24))).filter(
    np.any
)


@hypothesis.given(mask=masks)
@hypothesis.settings(deadline=None)
def test_points_are_centres_of_pixels_of_the_mask(mask: Mask) -> None:
    points = inscribed_points(mask)
    assert points.shape == (2, 2)
    np.testing.assert_array_equal(points % 1, 0.5)
    for x, y in points:
        assert mask[int(y), int(x)]


@hypothesis.given(mask=masks)
@hypothesis.settings(deadline=None)
def test_points_lie_apart_where_the_mask_is_large_enough(mask: Mask) -> None:
    scale = np.array([840 / mask.shape[1], 840 / mask.shape[0]])
    points = inscribed_points(mask) * scale
    places = (np.argwhere(mask)[:, ::-1] + 0.5) * scale
    reach = max(np.hypot(*(places - point).T).max() for point in points)
    assert np.hypot(*(points[0] - points[1])) > 10 or reach <= 10


@hypothesis.given(mask=masks)
def test_the_box_is_the_smallest_that_holds_every_pixel(mask: Mask) -> None:
    x1, y1, x2, y2 = box_of(mask)
    rows, columns = zip(*np.argwhere(mask).tolist(), strict=True)
    assert (x1, y1, x2, y2) == (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
