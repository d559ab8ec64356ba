import numpy as np
import PIL
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medreasoner import ops
from medreasoner.errors import ArrayError

SIDE = st.integers(1, 90)
PILLOW_MAJOR = int(PIL.__version__.split(".")[0])
every_level = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def pixels(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (height, width) if channels == 1 else (height, width, 3)
    # Saturated pixels next to others make the cubic overshoot, which the kernel must clip as Pillow does.
    return rng.choice(np.array([0, 0, 255, 255, *range(0, 256, 5)], np.uint8), shape)


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


@every_level
@given(
    height=SIDE, width=SIDE, out_height=SIDE, out_width=SIDE, channels=st.sampled_from([1, 3]), seed=st.integers(0, 99)
)
def test_resize_equals_pillow_in_the_documented_order_of_passes(
    simd, height, width, out_height, out_width, channels, seed
):
    image = pixels(height, width, channels, seed)
    if height - out_height > max(2 * (width - out_width), 0):
        expected = pillow(pillow(image, out_height, width), out_height, out_width)
    else:
        expected = pillow(pillow(image, height, out_width), out_height, out_width)
    np.testing.assert_array_equal(ops.resize_u8(image, out_height, out_width), expected)


@pytest.mark.skipif(PILLOW_MAJOR < 13, reason="older versions always resize horizontally first")
@every_level
@given(
    height=SIDE, width=SIDE, out_height=SIDE, out_width=SIDE, channels=st.sampled_from([1, 3]), seed=st.integers(0, 99)
)
def test_resize_equals_pillow(simd, height, width, out_height, out_width, channels, seed):
    image = pixels(height, width, channels, seed)
    np.testing.assert_array_equal(ops.resize_u8(image, out_height, out_width), pillow(image, out_height, out_width))


@pytest.mark.parametrize(
    ("size", "out"),
    [
        pytest.param((1024, 1024), (252, 252), id="radiograph to nano"),
        pytest.param((700, 501), (256, 256), id="odd sides"),
        pytest.param((300, 401), (840, 840), id="enlarged"),
        pytest.param((1, 2000), (1, 7), id="one row"),
        pytest.param((2000, 1), (9, 3), id="one column"),
        pytest.param((1, 1), (50, 60), id="one pixel"),
        pytest.param((640, 480), (1, 1), id="to one pixel"),
        pytest.param((48, 48), (48, 48), id="unchanged"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_equals_pillow_at_chosen_sizes(simd, size, out, channels):
    image = pixels(*size, channels, seed=3)
    expected = pillow(image, *out)
    if PILLOW_MAJOR < 13 and size[0] - out[0] > max(2 * (size[1] - out[1]), 0):
        expected = pillow(pillow(image, out[0], size[1]), *out)
    np.testing.assert_array_equal(ops.resize_u8(image, *out), expected)


def test_resize_leaves_its_input_alone_and_accepts_read_only_pixels():
    image = pixels(20, 30, 3, seed=0)
    before = image.copy()
    image.setflags(write=False)
    result = ops.resize_u8(image, 20, 30)
    assert result is not image
    assert result.flags.writeable
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(np.zeros((4, 4), np.int16), id="dtype"),
        pytest.param(np.zeros((4, 4), np.float64), id="float"),
        pytest.param(np.zeros((4, 8), np.uint8)[:, ::2], id="strided"),
        pytest.param(np.zeros((4, 4, 3), np.uint8, order="F"), id="column-major"),
        pytest.param(np.zeros((4, 4, 4), np.uint8), id="four channels"),
        pytest.param(np.zeros((4,), np.uint8), id="one dimension"),
        pytest.param(np.zeros((0, 4), np.uint8), id="empty"),
        pytest.param([[1, 2]], id="list"),
    ],
)
def test_resize_refuses_arrays_that_it_would_have_to_copy_or_guess(bad):
    with pytest.raises(ArrayError, match="pixels: expected"):
        ops.resize_u8(bad, 4, 4)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4), (1 << 40, 1), (1 << 19, 1 << 19)])
def test_resize_refuses_impossible_sizes(size):
    with pytest.raises(ArrayError, match="size: expected"):
        ops.resize_u8(np.zeros((4, 4), np.uint8), *size)
