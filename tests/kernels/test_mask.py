import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medreasoner import ops
from medreasoner.errors import ArrayError

many = settings(deadline=None, max_examples=80)


def interpolated(logits: np.ndarray, height: int, width: int) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(logits))[None, None].double()
    return torch.nn.functional.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def assert_same_where_clear(found: np.ndarray, logits: np.ndarray, threshold: float) -> None:
    """Float32 may decide otherwise within a few units of its last place around the threshold."""
    assert found.dtype == np.bool_
    clear = np.abs(logits - threshold) > 1e-4
    np.testing.assert_array_equal(found[clear], (logits > threshold)[clear])


@many
@given(
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    threshold=st.sampled_from([0.0, 0.7, -3.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_mask_equals_torch_interpolate_of_the_crop(h, w, height, width, threshold, seed, data):
    logits = np.random.default_rng(seed).normal(0, 3, (h, w)).astype(np.float32)
    crop = (data.draw(st.integers(1, h)), data.draw(st.integers(1, w)))
    found = ops.mask_from_logits(logits, crop=crop, height=height, width=width, threshold=threshold)
    assert_same_where_clear(found, interpolated(logits[: crop[0], : crop[1]], height, width), threshold)


@pytest.mark.parametrize(("size", "out"), [((64, 64), (1024, 811)), ((256, 256), (512, 512)), ((256, 256), (100, 90))])
def test_smooth_masks_equal_torch_at_working_sizes(simd, size, out):
    y, x = np.indices(size)
    logits = (np.sin(y / 9) * np.cos(x / 7) * 8 + 1).astype(np.float32)
    found = ops.mask_from_logits(logits, crop=size, height=out[0], width=out[1])
    assert_same_where_clear(found, interpolated(logits, *out), 0.0)
    plain = ops.count_masks(logits[None], crop=size, height=out[0], width=out[1])  # the same sums, without SIMD by hand
    np.testing.assert_array_equal(found, plain == 1)


@many
@given(crop_h=st.floats(0.1, 9), crop_w=st.floats(0.1, 9), height=st.integers(1, 40), width=st.integers(1, 40))
def test_a_fractional_crop_samples_where_the_geometry_says(crop_h, crop_w, height, width):
    logits = np.random.default_rng(1).normal(0, 3, (9, 9)).astype(np.float32)

    def axis(crop: float, size: int) -> np.ndarray:
        """(size, 9) weights of linear interpolation at half-pixel centres, kept inside the crop."""
        at = np.clip((np.arange(size) + 0.5) * crop / size - 0.5, 0, int(np.ceil(crop)) - 1)
        return np.maximum(1 - np.abs(at[:, None] - np.arange(9)), 0)

    found = ops.mask_from_logits(logits, crop=(crop_h, crop_w), height=height, width=width)
    assert_same_where_clear(found, axis(crop_h, height) @ logits.astype(np.float64) @ axis(crop_w, width).T, 0.0)


def test_nan_and_the_threshold_itself_are_outside():
    logits = np.array([[np.nan, 0.0, 1.0]], np.float32)
    assert ops.mask_from_logits(logits, crop=(1, 3), height=1, width=3).tolist() == [[False, False, True]]
    everywhere = np.full((4, 4), np.nan, np.float32)
    assert not ops.mask_from_logits(everywhere, crop=(4, 4), height=9, width=9).any()


@pytest.mark.parametrize(
    "change",
    [
        {"logits": np.zeros((4, 4))},
        {"logits": np.zeros((1, 4, 4), np.float32)},
        {"logits": np.zeros((4, 8), np.float32)[:, ::2]},
        {"logits": np.zeros((0, 4), np.float32)},
        {"crop": (5, 4)},
        {"crop": (0, 4)},
        {"crop": (float("nan"), 4)},
        {"height": 0},
        {"width": 1 << 40},
    ],
    ids=str,
)
def test_mask_refuses_what_does_not_fit(change):
    arguments = {"logits": np.zeros((4, 4), np.float32), "crop": (4, 4), "height": 8, "width": 8}
    with pytest.raises(ArrayError):
        ops.mask_from_logits(**(arguments | change))


@many
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    share=st.sampled_from([0, 0.01, 0.1, 1]),
    seed=st.integers(0, 99),
)
def test_the_box_holds_every_set_pixel_and_touches_four(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    ys, xs = np.nonzero(mask)
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None
    assert ops.mask_box(mask) == expected


def test_bytes_that_are_viewed_as_bool_count_as_set():
    mask = np.array([[0, 2], [255, 0]], np.uint8).view(np.bool_)
    assert ops.mask_box(mask) == (0, 0, 2, 2)
    assert ops.rle_encode(mask) == ops.rle_encode(mask.view(np.uint8) != 0)


@pytest.mark.parametrize("function", [ops.mask_box, ops.rle_encode])
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(np.zeros((3, 3), np.uint8), id="dtype"),
        pytest.param(np.zeros((3, 6), bool)[:, ::2], id="strided"),
        pytest.param(np.zeros((3, 3), bool, order="F"), id="column-major"),
        pytest.param(np.zeros(3, bool), id="one dimension"),
        pytest.param(np.zeros((0, 3), bool), id="empty"),
        pytest.param(None, id="None"),
    ],
)
def test_masks_of_other_form_are_refused(function, bad):
    with pytest.raises(ArrayError, match="mask: expected"):
        function(bad)


@given(n=st.integers(1, 6), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_counts_are_the_sum_of_masks(n, height, width, seed):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 9, 2)
    logits = rng.standard_normal((n, h, w)).astype(np.float32)
    crop = (rng.uniform(0.2, 1) * h, rng.uniform(0.2, 1) * w)
    each = [ops.mask_from_logits(one, crop=crop, height=height, width=width, threshold=0.1) for one in logits]
    found = ops.count_masks(logits, crop=crop, height=height, width=width, threshold=0.1)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.sum(each, axis=0))


def test_threads_share_the_rows_of_large_counts():
    logits = np.random.default_rng(0).standard_normal((3, 9, 7)).astype(np.float32)
    size = {"crop": (8.5, 7), "height": 1801, "width": 2003}
    expected = np.sum([ops.mask_from_logits(each, **size) for each in logits], axis=0)
    for n_threads in (1, 2, 5):
        np.testing.assert_array_equal(ops.count_masks(logits, **size, n_threads=n_threads), expected)
    with pytest.raises(ArrayError, match="1 to 1024"):
        ops.count_masks(logits, **size, n_threads=0)


def test_counts_of_too_many_or_cropped_beyond_are_refused():
    with pytest.raises(ArrayError, match="n <= 255"):
        ops.count_masks(np.zeros((256, 1, 1), np.float32), crop=(1, 1), height=1, width=1)
    with pytest.raises(ArrayError, match="crop"):
        ops.count_masks(np.zeros((2, 1, 1), np.float32), crop=(2, 1), height=1, width=1)
