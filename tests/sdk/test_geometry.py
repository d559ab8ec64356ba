"""Grids: round trips, limits, and equality with the reference resize rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from medreasoner.errors import ImageReadError
from medreasoner.geometry import place, smart_size
from medreasoner.spec import Coordinates, PadResize, Resize, SmartResize, StretchResize

sides = st.integers(1, 5000)
resizes = st.one_of(
    st.builds(StretchResize, width=st.integers(1, 2000), height=st.integers(1, 2000)),
    st.builds(PadResize, size=st.integers(1, 2000)),
    st.builds(
        SmartResize, min_pixels=st.integers(1, 4000), max_pixels=st.integers(4000, 10**7), factor=st.integers(1, 56)
    ),
)
fractions = arrays(np.float64, (4, 2), elements=st.floats(0, 1))


def fits(resize: Resize, height: int, width: int) -> bool:
    return not isinstance(resize, SmartResize) or max(height, width) <= 200 * min(height, width)


@given(resizes, sides, sides, fractions, st.sampled_from(["absolute", "relative_1000"]))
def test_a_point_comes_back_from_every_grid(
    resize: Resize, height: int, width: int, at: np.ndarray, coordinates: Coordinates
) -> None:
    if not fits(resize, height, width):
        return
    placement = place(resize, height=height, width=width)
    points = at * (width, height)
    np.testing.assert_allclose(placement.to_image(placement.to_grid(points)), points, rtol=1e-9, atol=1e-6)
    answer = placement.to_answer(points, coordinates)
    np.testing.assert_allclose(placement.from_answer(answer, coordinates), points, rtol=1e-9, atol=1e-6)


@given(resizes, sides, sides)
def test_the_image_fills_the_content_and_the_content_lies_in_the_grid(resize: Resize, height: int, width: int) -> None:
    if not fits(resize, height, width):
        return
    placement = place(resize, height=height, width=width)
    assert 1 <= placement.content_height <= placement.grid_height
    assert 1 <= placement.content_width <= placement.grid_width
    np.testing.assert_allclose(
        placement.to_grid([width, height]), [placement.content_width, placement.content_height], rtol=1e-12
    )


@given(resizes, sides, sides, st.sampled_from(["absolute", "relative_1000"]))
def test_an_answer_within_its_limits_is_on_the_image(
    resize: Resize, height: int, width: int, coordinates: Coordinates
) -> None:
    if not fits(resize, height, width):
        return
    placement = place(resize, height=height, width=width)
    limits = placement.answer_limits(coordinates)
    assert min(limits) >= 1
    corner = placement.from_answer(limits, coordinates)
    assert (corner <= (width, height)).all()
    # The limit reaches the image's edge but for one unit of the answer.
    reach = placement.to_answer([width, height], coordinates)
    assert (reach - limits < 1).all()


@given(resizes, sides, sides, arrays(np.float64, (2,), elements=st.floats(-1e6, 1e6)))
def test_no_answer_leads_out_of_the_image(resize: Resize, height: int, width: int, point: np.ndarray) -> None:
    if fits(resize, height, width):
        x, y = place(resize, height=height, width=width).from_answer(point, "absolute")
        assert 0 <= x <= width
        assert 0 <= y <= height


@given(
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.sampled_from([14, 28, 32]),
    st.integers(1, 500_000),
    st.integers(1, 16_000_000),
)
def test_smart_size_equals_transformers(height: int, width: int, factor: int, low: int, more: int) -> None:
    high = max(low, factor * factor) + more
    resize = SmartResize(min_pixels=low, max_pixels=high, factor=factor)
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ImageReadError, match="200 times"):
            smart_size(height, width, resize)
    else:
        expected = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
        assert smart_size(height, width, resize) == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 200, (128, 256)), (1841, 1955, (241, 256)), (3, 1000, (1, 256)), (1, 4000, (1, 256)), (7, 7, (256, 256))],
    ids=["half", "chest", "rounds up", "keeps a pixel", "enlarges"],
)
def test_longest_pad_follows_sam(height: int, width: int, expected: tuple[int, int]) -> None:
    # segment_anything.utils.transforms.ResizeLongestSide.get_preprocess_shape: int(side * 256 / longest + 0.5)
    placement = place(PadResize(size=256), height=height, width=width)
    assert (placement.content_height, placement.content_width) == expected
    assert (placement.grid_height, placement.grid_width) == (256, 256)


def test_the_crop_of_a_mask_is_the_part_that_the_image_covers() -> None:
    placement = place(PadResize(size=256), height=100, width=200)
    assert placement.mask_crop(64) == (32.0, 64.0)
    assert place(StretchResize(width=256, height=256), height=100, width=200).mask_crop(64) == (64.0, 64.0)


def test_thousandths_are_of_the_padded_grid() -> None:
    placement = place(PadResize(size=100), height=50, width=100)
    assert placement.answer_limits("relative_1000") == (1000, 500)
    assert placement.from_answer([500, 500], "relative_1000").tolist() == [50.0, 50.0]
