"""Every change of grid: image pixels, the grid that the vision tower sees, the segmenter's grid, numbers in an answer.

Coordinates are continuous edges: pixel i covers [i, i + 1). Points are (x, y), boxes half-open (x1, y1, x2, y2). No
other module multiplies a coordinate.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medreasoner.errors import ImageReadError
from medreasoner.spec import Coordinates, Resize, SmartResize, StretchResize, coordinate_scale

__all__ = ["Box", "Placement", "Point", "place", "smart_size"]

Point = tuple[float, float]
Box = tuple[float, float, float, float]

_MAX_ASPECT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How an image lies in a model's grid: resized to the content size, at the top left, padded to the grid. Pixels."""

    image_height: int
    image_width: int
    content_height: int
    content_width: int
    grid_height: int
    grid_width: int

    def to_grid(self, points: ArrayLike) -> NDArray[np.float64]:
        """(..., 2) points of the image as points of the grid.

        >>> from medreasoner.spec import PadResize
        >>> place(PadResize(size=50), height=100, width=200).to_grid([200, 100]).tolist()
        [50.0, 25.0]
        """
        scale = (self.content_width / self.image_width, self.content_height / self.image_height)
        return np.asarray(points, np.float64) * scale

    def to_image(self, points: ArrayLike) -> NDArray[np.float64]:
        """(..., 2) points of the grid as points of the image, clipped to it: [0, width] x [0, height]."""
        scale = (self.image_width / self.content_width, self.image_height / self.content_height)
        moved = np.asarray(points, np.float64) * scale
        return np.minimum(np.maximum(moved, 0.0), (self.image_width, self.image_height))

    def answer_limits(self, coordinates: Coordinates) -> tuple[int, int]:
        """Largest x and y that an answer may name, so that it stays on the image."""
        scale = coordinate_scale(coordinates)
        if scale is None:
            return self.content_width, self.content_height
        # The parts are of the whole grid, of which padding takes its share.
        x, y = scale * self.content_width // self.grid_width, scale * self.content_height // self.grid_height
        return max(1, x), max(1, y)

    def from_answer(self, numbers: ArrayLike, coordinates: Coordinates) -> NDArray[np.float64]:
        """(..., 2) points of an answer as points of the image, clipped to it."""
        points = np.asarray(numbers, np.float64)
        scale = coordinate_scale(coordinates)
        if scale is not None:
            points = points * (self.grid_width, self.grid_height) / scale
        return self.to_image(points)

    def to_answer(self, points: ArrayLike, coordinates: Coordinates) -> NDArray[np.float64]:
        """(..., 2) points of the image as an answer names them, not rounded."""
        moved = self.to_grid(points)
        scale = coordinate_scale(coordinates)
        if scale is not None:
            moved = moved * scale / (self.grid_width, self.grid_height)
        return moved

    def mask_crop(self, mask_size: int) -> tuple[float, float]:
        """Height and width of the part of a (mask_size, mask_size) map over the grid that the image covers."""
        return mask_size * self.content_height / self.grid_height, mask_size * self.content_width / self.grid_width


def smart_size(height: int, width: int, resize: SmartResize) -> tuple[int, int]:
    """Height and width, pixels, to which Qwen2.5-VL resizes an image.

    Raises
    ------
    ImageReadError
        If one side is more than 200 times the other.

    References
    ----------
    ``smart_resize`` of Qwen2-VL's image processor (https://github.com/QwenLM/Qwen2.5-VL, qwen-vl-utils). Halves round
    to the even number, as Python does.

    Examples
    --------
    >>> smart_size(1841, 1955, SmartResize(min_pixels=3136, max_pixels=1003520, factor=28))
    (952, 1008)
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ImageReadError(f"the image is {height} x {width}; no side may be over {_MAX_ASPECT} times the other")
    factor = resize.factor
    sides = [round(side / factor) * factor for side in (height, width)]
    if sides[0] * sides[1] > resize.max_pixels:
        shrink = math.sqrt(height * width / resize.max_pixels)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif sides[0] * sides[1] < resize.min_pixels:
        enlarge = math.sqrt(resize.min_pixels / (height * width))
        sides = [math.ceil(side * enlarge / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def place(resize: Resize, *, height: int, width: int) -> Placement:
    """Where an image of height x width pixels lies in the grid of a model with this resize rule.

    Raises
    ------
    ImageReadError
        If the image is too elongated for the rule.
    """
    if isinstance(resize, StretchResize):
        content = grid = (resize.height, resize.width)
    elif isinstance(resize, SmartResize):
        content = grid = smart_size(height, width, resize)
    else:
        # Rounds halves up, as SAM's ResizeLongestSide.get_preprocess_shape; a very thin image keeps one pixel.
        scale = resize.size / max(height, width)
        content = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        grid = (resize.size, resize.size)
    return Placement(
        image_height=height,
        image_width=width,
        content_height=content[0],
        content_width=content[1],
        grid_height=grid[0],
        grid_width=grid[1],
    )
