"""Results drawn over their image, for people to look at."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medreasoner.geometry import Box, Point

if TYPE_CHECKING:
    from medreasoner.result import Grounding

__all__ = ["ANSWER", "BOX", "POINT", "TRUTH", "draw", "overlay"]

Colour = tuple[int, int, int]

# From the palette of Okabe and Ito, whose colours stay apart in every kind of colour blindness.
ANSWER: Colour = (86, 180, 233)  # sky blue
TRUTH: Colour = (204, 121, 167)  # reddish purple
BOX: Colour = (240, 228, 66)  # yellow
POINT: Colour = (213, 94, 0)  # vermilion
_WHITE: Colour = (255, 255, 255)
_BLACK: Colour = (0, 0, 0)
_BAND: Colour = (24, 24, 27)
_TEXT: Colour = (235, 235, 235)

_SHORT = 512  # longer side, pixels, to which small images are enlarged
_NARROW = 360  # least width, pixels, so that the caption has room
_TINT = 0.27


def overlay(grounding: "Grounding", *, max_side: int | None = None) -> Image.Image:
    """RGB picture of the image with the mask tinted and outlined, the box, the two points, and a caption below.

    Parameters
    ----------
    grounding
        The result. The caption says whether something was found, the score, the box and the area, but not the question,
        which may hold patient data.
    max_side
        Longest side of the image's part of the picture, pixels; larger images are reduced. None: the image's own size.
        Images under 512 pixels are enlarged by a whole number, whatever this says.

    Returns
    -------
    PIL.Image.Image
        RGB. The image begins at the top, in the middle of the width, and is never covered by text.
    """
    pixels = grounding.image.pixels
    if grounding.found:
        picture = draw(pixels, mask=grounding.mask, box=grounding.box, points=grounding.points or (), max_side=max_side)
    else:
        picture = draw(pixels, max_side=max_side)
    return _with_caption(picture, grounding)


def draw(
    pixels: NDArray[np.uint8],
    *,
    mask: NDArray[np.bool_] | None = None,
    box: Box | None = None,
    points: Sequence[Point] = (),
    truth: NDArray[np.bool_] | None = None,
    max_side: int | None = None,
    line: int | None = None,
) -> Image.Image:
    """RGB picture of an image with an answer drawn on it, and the outline of what is true; nothing below it.

    Parameters
    ----------
    pixels
        (H, W) or (H, W, 3) uint8.
    mask, truth
        (H, W) bool. The mask is tinted and outlined, of the truth there is a line alone.
    box, points
        In the image's own pixels.
    max_side
        As in `overlay`.
    line
        Width of the answer's lines, pixels of the picture, to show it smaller than it is; None: by its size.
    """
    height, width = pixels.shape[:2]
    scale = _scale(height, width, max_side)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(pixels)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    picture = picture.convert("RGB")
    thin = max(2, round(max(size) / 400))
    line = line or thin
    if mask is not None:
        _draw_mask(picture, mask, line)
    if truth is not None:  # on top and thinner: where both agree, both are seen
        _draw_mask(picture, truth, max(1, round(0.6 * line)), colour=TRUTH, tint=0.0)
    if box is not None:
        _draw_box(picture, [edge * scale for edge in box], line)
    for x, y in points:
        _draw_point(picture, x * scale, y * scale, 2 * thin + line)
    return picture


def _scale(height: int, width: int, max_side: int | None) -> float:
    longer = max(height, width)
    if longer < _SHORT:
        return math.ceil(_SHORT / longer)  # whole, so that every pixel of the image keeps its shape
    return min(1.0, max_side / longer) if max_side is not None else 1.0


def _draw_mask(
    picture: Image.Image, mask: NDArray[np.bool_], line: int, *, colour: Colour = ANSWER, tint: float = _TINT
) -> None:
    area = Image.fromarray(mask.view(np.uint8) * 255)
    if picture.width > area.width:
        area = area.resize(picture.size, Image.Resampling.NEAREST)
    elif picture.size != area.size:
        # A pixel is set where a quarter of what it stands for is, so that thin structures stay visible.
        area = area.resize(picture.size, Image.Resampling.BOX).point([255 * (value >= 64) for value in range(256)])
    extent = area.getbbox()
    if extent is None:
        return
    reach = line + 1  # the filters need only see the mask and a rim, not the whole of a large image
    crop = (extent[0] - reach, extent[1] - reach, extent[2] + reach, extent[3] + reach)
    area = area.crop(crop)
    picture.paste(colour, crop[:2], area.point([round(tint * value) for value in range(256)]))
    inside = np.asarray(area) > 0
    outline = inside & ~_over_square(inside, line, np.logical_and)
    halo = _over_square(inside, 1, np.logical_or) & ~inside  # holds the outline on bright ground
    picture.paste(_BLACK, crop[:2], Image.fromarray(halo.view(np.uint8) * np.uint8(153)))
    picture.paste(colour, crop[:2], Image.fromarray(outline.view(np.uint8) * np.uint8(255)))


def _over_square(mask: NDArray[np.bool_], reach: int, combine: np.ufunc) -> NDArray[np.bool_]:
    """`combine` over the square of 2 * reach + 1 pixels around each pixel; False within `reach` of the border.

    A window of n takes log2(n) operations, where those of Pillow's filters grow with its square.
    """
    found = mask
    for axis in (0, 1):
        found, have = np.moveaxis(found, axis, 0), 1
        while have < 2 * reach + 1:
            step = min(have, 2 * reach + 1 - have)
            found = combine(found[:-step], found[step:])
            have += step
        found = np.moveaxis(np.pad(found, ((reach, reach), (0, 0))), 0, axis)
    return np.ascontiguousarray(found)


def _draw_box(picture: Image.Image, box: list[float], line: int) -> None:
    """Draw a box just outside of its half-open edges, on a dark line so that it shows on any ground."""
    left, top, right, bottom = (round(edge) for edge in box)
    draw = ImageDraw.Draw(picture)
    for grow, width, colour in ((line + 1, line + 1, _BLACK), (line, line, BOX)):
        edges = (
            max(0, left - grow),
            max(0, top - grow),
            min(picture.width - 1, right - 1 + grow),
            min(picture.height - 1, bottom - 1 + grow),
        )
        draw.rectangle(edges, outline=colour, width=width)


def _draw_point(picture: Image.Image, x: float, y: float, radius: int) -> None:
    """Draw a filled disc with a white and a dark ring, smoothed by drawing it four times as large."""
    for reach, colour in ((radius + 2, _BLACK), (radius + 1, _WHITE), (radius - 1, POINT)):
        side = 2 * reach + 1
        disc = Image.new("L", (4 * side, 4 * side))
        ImageDraw.Draw(disc).ellipse((0, 0, 4 * side - 1, 4 * side - 1), fill=255)
        disc = disc.resize((side, side), Image.Resampling.BOX)
        picture.paste(colour, (math.floor(x) - reach, math.floor(y) - reach), disc)


def _with_caption(picture: Image.Image, grounding: "Grounding") -> Image.Image:
    width = max(picture.width, _NARROW)
    size = max(15, round(width / 45))
    font = ImageFont.load_default(size)
    lines = _wrap(_caption(grounding), font, width - 2 * size)
    pitch = round(1.4 * size)
    canvas = Image.new("RGB", (width, picture.height + pitch * len(lines) + size), _BAND)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for index, text in enumerate(lines):
        draw.text((size, picture.height + size // 2 + index * pitch), text, fill=_TEXT, font=font)
    return canvas


def _caption(grounding: "Grounding") -> list[str]:
    """Parts of the caption, each of which stays on one line."""
    if not grounding.found:
        return ["Answer: not in this image"]
    parts = [f"Found, predicted IoU {grounding.score:.2f}"]
    if grounding.box is not None:
        parts.append("box " + " ".join(f"{edge:.0f}" for edge in grounding.box))
    if grounding.points is not None:
        parts.append("points " + " ".join(f"({x:.0f}, {y:.0f})" for x, y in grounding.points))
    if grounding.area_mm2 is not None:
        parts.append(f"area {grounding.area_mm2:,.0f} sq mm")  # the built-in font has no raised 2
    return parts


def _wrap(parts: list[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}   {part}"
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines
