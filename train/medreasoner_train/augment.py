"""Crops, flips and contrast changes of an image together with its masks and points.

Only separable geometry (crop, scale, shift, flips, quarter turns): masks are then re-indexed exactly. Pictures whose
sides carry meaning (chest, heart, abdomen, fetal ultrasound) are never mirrored or turned.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from PIL import ImageFilter

__all__ = ["NO_CHANGE", "Augmented", "Options", "augment"]

U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

TURNED = frozenset({"endoscopy", "dermoscopy", "microscopy", "histopathology"})
MIRRORED = frozenset({"usgra", "stu_breast_us", "knee_a", "knee_b", "dental_caries", "brisc_mri", "drive", "chase"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How far an image may be changed; probabilities in [0, 1], the rest relative."""

    crop: float = 0.85
    zoom: tuple[float, float] = (0.65, 1.3)
    aspect: float = 0.25
    shift: float = 0.5
    contrast: float = 0.8
    invert: float = 0.08
    noise: float = 0.3
    blur: float = 0.15
    grey: float = 0.1


NO_CHANGE = Options(crop=0.0, contrast=0.0, invert=0.0, noise=0.0, blur=0.0, grey=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Augmented:
    """pixels (size, size, 3) uint8; masks (K, size, size) bool; points (K, 2, 2) float64 (x, y) in that grid."""

    pixels: U8
    masks: Mask
    points: npt.NDArray[np.float64]


def augment(
    pixels: U8,
    masks: Mask,
    points: npt.NDArray[np.float64],
    *,
    size: int,
    modality: str,
    source: str,
    rng: np.random.Generator,
    options: Options = NO_CHANGE,
) -> Augmented:
    """Bring an image, its masks and its points to a `size` x `size` grid, changed at random within `options`.

    Parameters
    ----------
    pixels : (H, W) or (H, W, 3) uint8
        Grey or RGB.
    masks : (K, H, W) bool
        One for each structure.
    points : (K, 2, 2) float64
        Two (x, y) for each mask, in its pixels.
    size
        Side of the new grid, in pixels.
    modality, source
        Of the image: they tell whether it may be mirrored or turned.
    rng
        Source of all choices.
    options
        How far the image may be changed.
    """
    pixels, masks, points = _turn(pixels, masks, points, modality=modality, source=source, rng=rng, options=options)
    height, width = pixels.shape[:2]
    window = (0.0, 0.0, float(width), float(height))
    if rng.random() < options.crop:
        window = _window(masks, rng, options)
    # Nearest row and column of each target pixel's centre; outside the image the mask is empty.
    rows, row_ok = _nearest(window[1], window[3], size, height)
    columns, column_ok = _nearest(window[0], window[2], size, width)
    new_masks = masks[:, rows[:, None], columns[None, :]] & (row_ok[:, None] & column_ok[None, :])
    scale = np.array([size / (window[2] - window[0]), size / (window[3] - window[1])])
    new_points = (points - np.array(window[:2])) * scale
    return Augmented(
        pixels=_shade(_resize(pixels, window, size, rng, options), rng, options), masks=new_masks, points=new_points
    )


def _turn(
    pixels: U8,
    masks: Mask,
    points: npt.NDArray[np.float64],
    *,
    modality: str,
    source: str,
    rng: np.random.Generator,
    options: Options,
) -> tuple[U8, Mask, npt.NDArray[np.float64]]:
    if options.crop == 0.0:
        return pixels, masks, points
    mirrored = modality in TURNED or source in MIRRORED
    if mirrored and rng.random() < 0.5:
        width = pixels.shape[1]
        pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
        points = np.stack([width - points[..., 0], points[..., 1]], axis=-1)
    if (
        modality in TURNED and rng.random() < 0.5
    ):  # mirror across the main diagonal: with the flip above, all eight turns
        pixels, masks, points = np.swapaxes(pixels, 0, 1), np.swapaxes(masks, 1, 2), points[..., ::-1]
    return pixels, masks, points


def _window(masks: Mask, rng: np.random.Generator, options: Options) -> tuple[float, float, float, float]:
    """A crop (x1, y1, x2, y2), possibly beyond the image, that keeps most of every mask."""
    height, width = masks.shape[1:]
    areas = masks.sum(axis=(1, 2))
    for _ in range(4):
        zoom = np.exp(rng.uniform(*np.log(options.zoom)))
        stretch = np.exp(rng.uniform(-options.aspect, options.aspect) / 2)
        w, h = width * zoom * stretch, height * zoom / stretch
        x = (width - w) * (0.5 + rng.uniform(-1, 1) * options.shift)
        y = (height - h) * (0.5 + rng.uniform(-1, 1) * options.shift)
        left, top, right, bottom = max(int(x), 0), max(int(y), 0), int(min(x + w, width)), int(min(y + h, height))
        kept = masks[:, top:bottom, left:right].sum(axis=(1, 2))
        if (kept >= 0.85 * areas).all():
            return x, y, x + w, y + h
    return 0.0, 0.0, float(width), float(height)


def _nearest(start: float, stop: float, size: int, limit: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    places = np.floor(start + (np.arange(size) + 0.5) * ((stop - start) / size)).astype(np.intp)
    return np.clip(places, 0, limit - 1), (places >= 0) & (places < limit)


def _resize(
    pixels: U8, window: tuple[float, float, float, float], size: int, rng: np.random.Generator, options: Options
) -> U8:
    """Antialiased bicubic, as at run time; what lies beyond the image is black."""
    height, width = pixels.shape[:2]
    left, top = max(0, int(np.ceil(-window[0]))), max(0, int(np.ceil(-window[1])))
    right, bottom = max(0, int(np.ceil(window[2] - width))), max(0, int(np.ceil(window[3] - height)))
    if left or top or right or bottom:
        around = ((top, bottom), (left, right)) + ((0, 0),) * (pixels.ndim - 2)
        pixels = np.pad(pixels, around)
    box = (window[0] + left, window[1] + top, window[2] + left, window[3] + top)
    image = PilImage.fromarray(np.ascontiguousarray(pixels)).resize((size, size), PilImage.Resampling.BICUBIC, box=box)
    if rng.random() < options.blur:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.2))))
    return np.asarray(image)


def _shade(pixels: U8, rng: np.random.Generator, options: Options) -> U8:
    """Contrast, brightness, gamma, inversion and noise; grey becomes three equal channels."""
    channels = 1 if pixels.ndim == 2 else 3
    if channels == 3 and rng.random() < options.grey:
        pixels, channels = np.asarray(PilImage.fromarray(pixels).convert("L")), 1
    curve = np.tile(np.arange(256, dtype=np.float32) / 255, (channels, 1))
    if rng.random() < options.contrast:
        curve **= np.exp(rng.uniform(-0.35, 0.35))
        gain = np.exp(rng.uniform(-0.3, 0.3) + rng.uniform(-0.08, 0.08, size=(channels, 1)))
        curve = (curve - 0.5) * gain + 0.5 + rng.uniform(-0.1, 0.1)
    if channels == 1 and rng.random() < options.invert:
        curve = 1 - curve
    if rng.random() < options.contrast or channels == 1:
        table = np.clip(curve * 255, 0, 255).astype(np.uint8)
        pixels = table[0][pixels] if channels == 1 else np.stack([table[c][pixels[..., c]] for c in range(3)], axis=-1)
    if rng.random() < options.noise:
        noise = rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(2, 12)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels
