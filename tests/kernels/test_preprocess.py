import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medreasoner import ops
from medreasoner.errors import ArrayError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# One multiplication and addition in float32 instead of divisions: a few units in the last place of numbers up to 3.
TOLERANCE = {"rtol": 0, "atol": 1e-6}


def picture(channels: int, height: int = 77, width: int = 121) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, 3)
    return np.random.default_rng(channels).integers(0, 256, shape, dtype=np.uint8)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width, 3) by Pillow."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))


def normalised(image: np.ndarray) -> np.ndarray:
    return (image / 255.0 - np.array(MEAN)) / np.array(STD)


def patches_of(planes: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """(3, H, W) -> (n_patches, 3 * patch * patch), written out index by index."""
    _, height, width = planes.shape
    block = patch * merge
    rows = []
    for top in range(0, height, block):
        for left in range(0, width, block):
            for y in range(top, top + block, patch):
                for x in range(left, left + block, patch):
                    rows.append(planes[:, y : y + patch, x : x + patch].ravel())
    return np.stack(rows)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("content", [None, (84, 60), (33, 112), (1, 1)], ids=str)
@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (14, 1), (4, 7), (7, 4)])
def test_patches_equal_pillow_and_numpy(simd, channels, content, patch, merge):
    image = picture(channels)
    height, width = 84, 112
    padded = np.zeros((height, width, 3), np.uint8)  # black before normalising
    h, w = content or (height, width)
    padded[:h, :w] = resized(image, h, w)
    expected = patches_of(normalised(padded).transpose(2, 0, 1), patch, merge)
    found = ops.preprocess_patches(image, height, width, content=content, mean=MEAN, std=STD, patch=patch, merge=merge)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@given(data=st.data())
def test_any_size_equals_pillow_and_numpy(data):
    patch, merge = data.draw(st.sampled_from([(14, 2), (7, 3), (4, 1)]))
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    height, width = rows * patch * merge, columns * patch * merge
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    channels = data.draw(st.sampled_from([1, 3]))
    image = picture(channels, data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90)))
    padded = np.zeros((height, width, 3), np.uint8)
    padded[:h, :w] = resized(image, h, w)
    expected = patches_of(normalised(padded).transpose(2, 0, 1), patch, merge)
    options = {"content": (h, w), "mean": MEAN, "std": STD}
    found = ops.preprocess_patches(image, height, width, patch=patch, merge=merge, **options)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    planes = ops.preprocess_planes(image, height, width, **options)
    np.testing.assert_allclose(planes[:, :h, :w], normalised(padded[:h, :w]).transpose(2, 0, 1), **TOLERANCE)
    assert not planes[:, h:].any()
    assert not planes[:, :, w:].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("content", [None, (96, 60), (33, 100), (1, 1)], ids=str)
def test_planes_equal_pillow_and_numpy(simd, channels, content):
    image = picture(channels)
    h, w = content or (96, 100)
    expected = np.zeros((3, 96, 100))  # zero after normalising
    expected[:, :h, :w] = normalised(resized(image, h, w)).transpose(2, 0, 1)
    found = ops.preprocess_planes(image, 96, 100, content=content, mean=MEAN, std=STD)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_patches_equal_those_of_transformers_image_processor():
    transformers = pytest.importorskip("transformers")
    image = picture(3, 56, 84)
    processor = transformers.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, image_mean=MEAN, image_std=STD)
    theirs = processor(Image.fromarray(image), do_resize=False, return_tensors="np")["pixel_values"]
    theirs = theirs.reshape(-1, 3, 2, 14 * 14)  # (n_patches, channel, temporal, y x)
    np.testing.assert_array_equal(theirs[:, :, 0], theirs[:, :, 1])
    ours = ops.preprocess_patches(image, 56, 84, mean=MEAN, std=STD, patch=14, merge=2)
    np.testing.assert_allclose(ours.reshape(-1, 3, 14 * 14), theirs[:, :, 0], **TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"height": 80},
        {"patch": 0},
        {"merge": -2},
        {"content": (85, 10)},
        {"content": (0, 10)},
        {"std": (0.0, 1.0, 1.0)},
        {"std": (float("nan"), 1.0, 1.0)},
        {"std": (1.0, 1.0)},
        {"mean": (float("inf"), 0.0, 0.0)},
        {"height": 1 << 62},
        {"pixels": np.zeros((4, 8), np.uint8)[:, ::2]},
    ],
    ids=str,
)
def test_patches_refuse_what_does_not_fit(change):
    arguments = {"pixels": picture(1), "height": 84, "width": 112, "mean": MEAN, "std": STD, "patch": 14, "merge": 2}
    with pytest.raises(ArrayError):
        ops.preprocess_patches(**(arguments | change))
