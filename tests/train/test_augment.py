"""Images change together with their masks and points."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PilImage

from medreasoner_train import augment as module
from medreasoner_train.augment import MIRRORED, NO_CHANGE, TURNED, Augmented, Options, augment
from medreasoner_train.targets import box_of, inscribed_points

Mask = NDArray[np.bool_]

CROPS_ONLY = dataclasses.replace(NO_CHANGE, crop=1.0)


def scene(shape: tuple[int, int] = (150, 200), colour: bool = False) -> tuple[NDArray[np.uint8], Mask]:
    """A noisy picture and two large masks, none of which is its own mirror image."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (*shape, 3) if colour else shape).astype(np.uint8)
    masks = np.zeros((2, *shape), bool)
    masks[0, 40:90, 30:100] = True
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    masks[1] = ((columns - 140) / 40) ** 2 + ((rows - 90) / 30) ** 2 <= 1
    return pixels, masks


def changed(seed: int, options: Options, *, modality: str = "CT", source: str = "any", size: int = 168) -> Augmented:
    pixels, masks = scene()
    points = np.stack([inscribed_points(mask) for mask in masks])
    rng = np.random.default_rng(seed)
    return augment(pixels, masks, points, size=size, modality=modality, source=source, rng=rng, options=options)


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
@pytest.mark.parametrize("shape", [(150, 200), (300, 240)], ids=["wide", "high"])
def test_without_change_an_image_is_only_resized_as_pillow_does(shape: tuple[int, int], colour: bool) -> None:
    pixels, masks = scene(shape, colour)
    points = np.stack([inscribed_points(mask) for mask in masks])
    out = augment(pixels, masks, points, size=168, modality="endoscopy", source="any", rng=np.random.default_rng(0))
    expected = np.asarray(PilImage.fromarray(pixels).resize((168, 168), PilImage.Resampling.BICUBIC))
    np.testing.assert_array_equal(out.pixels, expected if colour else np.repeat(expected[..., None], 3, axis=-1))
    np.testing.assert_allclose(out.points, points * 168 / np.array([shape[1], shape[0]]))
    for mask, own in zip(masks, out.masks, strict=True):
        scale = 168 / np.array([shape[1], shape[0]] * 2)
        np.testing.assert_allclose(box_of(own), np.array(box_of(mask)) * scale, atol=1)


def test_at_its_own_size_an_image_stays_as_it_is() -> None:
    pixels, masks = scene((168, 168))
    points = np.stack([inscribed_points(mask) for mask in masks])
    out = augment(pixels, masks, points, size=168, modality="CT", source="any", rng=np.random.default_rng(0))
    np.testing.assert_array_equal(out.pixels[..., 0], pixels)
    np.testing.assert_array_equal(out.masks, masks)
    np.testing.assert_array_equal(out.points, points)


@pytest.mark.parametrize("seed", range(25))
def test_the_box_of_a_cropped_mask_is_the_mapped_and_cut_box(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = []
    original = module._window

    def spy(*args: object) -> tuple[float, float, float, float]:
        windows.append(original(*args))  # type: ignore[arg-type]
        return windows[-1]

    monkeypatch.setattr(module, "_window", spy)
    out = changed(seed, CROPS_ONLY)
    ((left, top, right, bottom),) = windows
    scale = 168 / np.array([right - left, bottom - top] * 2)
    masks = scene()[1]
    for mask, own in zip(masks, out.masks, strict=True):
        expected = (np.array(box_of(mask)) - [left, top, left, top]) * scale
        np.testing.assert_allclose(box_of(own), np.clip(expected, 0, 168), atol=1.0)
        x1, y1, x2, y2 = (round(v) for v in (left, top, right, bottom))
        assert mask[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)].sum() >= 0.8 * mask.sum()


@pytest.mark.parametrize("modality", ["CT", "endoscopy"])
@pytest.mark.parametrize("seed", range(15))
def test_points_stay_on_their_masks(seed: int, modality: str) -> None:
    out = changed(seed, Options(), modality=modality)
    for mask, points in zip(out.masks, out.points, strict=True):
        for x, y in points:
            if 0 <= x < 168 and 0 <= y < 168:  # a crop may cut a seventh of a mask off
                assert mask[max(int(y) - 1, 0) : int(y) + 2, max(int(x) - 1, 0) : int(x) + 2].any()


@pytest.mark.parametrize("seed", range(8))
def test_a_mask_moves_with_the_pixels_under_it(seed: int) -> None:
    masks = scene()[1]
    pixels = np.where(masks[0], 200, 20).astype(np.uint8)
    rng = np.random.default_rng(seed)
    options = dataclasses.replace(CROPS_ONLY, crop=0.9)
    points = inscribed_points(masks[0])[None]
    out = augment(pixels, masks[:1], points, size=168, modality="dermoscopy", source="a", rng=rng, options=options)
    bright = out.pixels[..., 0] > 110
    assert (bright != out.masks[0]).sum() <= 0.02 * bright.size


def is_mirrored(out: Augmented) -> bool:
    """The rectangle lies left of the ellipse and starts above it unless it was mirrored."""
    return box_of(out.masks[0])[0] > box_of(out.masks[1])[0]


def draws(modality: str, source: str) -> list[Augmented]:
    return [changed(seed, CROPS_ONLY, modality=modality, source=source, size=56) for seed in range(40)]


@pytest.mark.parametrize(
    ("modality", "source"),
    [("X-ray", "shenzhen_cxr"), ("CT", "totalseg_ct"), ("MRI", "acdc_mri"), ("ultrasound", "fetal_us")],
)
def test_pictures_whose_sides_carry_meaning_are_never_mirrored_or_turned(modality: str, source: str) -> None:
    for out in draws(modality, source):
        assert not is_mirrored(out)
        assert box_of(out.masks[0])[1] < box_of(out.masks[1])[1]


@pytest.mark.parametrize("source", sorted(MIRRORED))
def test_unsided_sources_are_mirrored_but_not_turned(source: str) -> None:
    out = draws("unsided", source)
    assert 8 < sum(is_mirrored(own) for own in out) < 32
    assert all(box_of(own.masks[0])[1] < box_of(own.masks[1])[1] for own in out)


@pytest.mark.parametrize("modality", sorted(TURNED))
def test_unsided_modalities_are_turned_every_way(modality: str) -> None:
    ways = set()
    for out in draws(modality, "any"):
        first, second = (np.argwhere(mask).mean(axis=0) for mask in out.masks)
        across, down = second[1] - first[1], second[0] - first[0]
        ways.add((across > 0, down > 0, abs(across) > abs(down)))
    assert len(ways) >= 4  # a mirror, and the diagonal: half the turns at least


def test_the_same_generator_gives_the_same_change() -> None:
    a, b = (changed(5, Options(), modality="endoscopy") for _ in range(2))
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_array_equal(a.masks, b.masks)
    np.testing.assert_array_equal(a.points, b.points)


def test_shading_leaves_the_geometry_alone() -> None:
    shades = dataclasses.replace(NO_CHANGE, contrast=1.0, invert=0.5, noise=1.0, grey=0.5)
    plain, shaded = changed(1, NO_CHANGE), changed(1, shades)
    np.testing.assert_array_equal(plain.masks, shaded.masks)
    assert (plain.pixels != shaded.pixels).mean() > 0.5
