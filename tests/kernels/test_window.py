import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medreasoner import ops
from medreasoner.errors import ArrayError


def windowed(values, slope, intercept, center, width, function):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 as array expressions, in [0, 255], not rounded."""
    x = values.astype(np.float64) * slope + intercept
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 255 / (1 + np.exp(-4 * (x - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    y = ((x - center) / width + 0.5) * 255 if width else np.full_like(x, 127.5)
    return np.select([x <= center - width / 2, x > center + width / 2], [0.0, 255.0], y)


DTYPES = st.sampled_from([np.int16, np.uint16, np.int32, np.float32])
NUMBER = st.floats(-2000, 2000, width=32)


@settings(deadline=None, max_examples=120)
@given(
    values=DTYPES.flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
            elements=st.floats(-3e4, 3e4, width=32) if dtype is np.float32 else None,
        )
    ),
    slope=NUMBER,
    intercept=NUMBER,
    center=NUMBER,
    width=st.floats(1, 4000, width=32),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    invert=st.booleans(),
)
def test_window_equals_the_formulas_of_the_standard(values, slope, intercept, center, width, function, invert):
    found = ops.window_u8(values, slope, intercept, center, width, function=function, invert=invert)
    expected = windowed(values, slope, intercept, center, width, function)
    expected = 255 - expected if invert else expected
    assert found.shape == values.shape
    assert np.abs(found - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32])
def test_the_table_for_many_pixels_gives_what_single_pixels_give(dtype):
    values = np.random.default_rng(0).integers(0, 4000, (200, 201)).astype(dtype)
    whole = ops.window_u8(values, 1, -1024, 40, 400)
    for y, x in ((0, 0), (7, 199), (199, 200), (100, 3)):
        assert whole[y, x] == ops.window_u8(values[y : y + 1, x : x + 1].copy(), 1, -1024, 40, 400)[0, 0]
    assert np.abs(whole - windowed(values, 1, -1024, 40, 400, "LINEAR")).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        pytest.param(2047, 127.5, id="centre"),
        pytest.param(0, 0, id="first"),
        pytest.param(4095, 255, id="last"),
    ],
)
def test_linear_maps_a_window_of_4096_as_the_example_of_the_standard(stored, shown):
    # PS3.3 C.11.2.1.2.1, note 4: centre 2048 and width 4096 map 0 to 4095 onto the whole range.
    value = ops.window_u8(np.array([[stored]], np.uint16), 1, 0, 2048, 4096)[0, 0]
    assert abs(int(value) - shown) <= 0.5


def test_a_width_near_the_last_bit_of_the_centre_wraps_no_shade():
    center, width = 1e6, 1.2e-10
    found = ops.window_u8(np.array([[0, 1, 2]], np.float32), 2.0**-33, center, center, width, function="LINEAR_EXACT")
    assert found[0, 0] in (127, 128)
    assert found[0, 1:].tolist() == [255, 255]


def test_linear_of_width_one_is_a_threshold():
    found = ops.window_u8(np.array([[9.4, 9.5, 9.6]], np.float32), 1, 0, 10, 1)
    assert found.tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_nan_is_black_and_infinities_are_the_ends(function, invert):
    values = np.array([[np.nan, -np.inf, np.inf]], np.float32)
    low, high = (255, 0) if invert else (0, 255)
    assert ops.window_u8(values, 1, 0, 0, 10, function=function, invert=invert).tolist() == [[0, low, high]]


def test_the_extremes_of_32_bits_do_not_overflow_the_table():
    values = np.array([[-(2**31), 2**31 - 1]], np.int32)
    assert ops.window_u8(values, 1, 0, 0, 10).tolist() == [[0, 255]]


def test_an_empty_array_stays_empty():
    assert ops.window_u8(np.zeros((0, 3), np.int16), 1, 0, 0, 10).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 0.5}, "0028,1051"),
        ({"width": 0, "function": "SIGMOID"}, "0028,1051"),
        ({"width": float("nan")}, "finite"),
        ({"slope": float("inf")}, "finite"),
        ({"function": "CUBIC"}, "0028,1056"),
        ({"values": np.zeros((2, 2), np.float64)}, "values: expected"),
        ({"values": np.zeros((2, 2, 2), np.int16)}, "values: expected"),
        ({"values": np.zeros((2, 4), np.int16)[:, ::2]}, "contiguous"),
        ({"values": np.zeros((2, 2), ">i2")}, "values: expected"),
    ],
    ids=str,
)
def test_window_refuses_what_the_standard_does_not_allow(change, named):
    arguments = {"values": np.zeros((2, 2), np.int16), "slope": 1, "intercept": 0, "center": 0, "width": 10}
    with pytest.raises(ArrayError, match=named):
        ops.window_u8(**(arguments | change))
