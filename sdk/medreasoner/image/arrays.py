"""Arrays in memory as images."""

from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import ImageReadError
from medreasoner.image.limits import check_size, finite, min_max_u8, select_frame
from medreasoner.image.record import Image

__all__ = ["array_to_u8", "over_black", "read_array"]


def read_array(array: NDArray[Any], *, source: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    """Image of an array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA; the pixels are copied.

    uint8 is taken as display values, bool as black and white; any other real dtype is scaled from its smallest to its
    largest value, over all channels together, with a warning.

    Raises
    ------
    ImageReadError
        If the shape or the dtype is another, or no value is finite.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageReadError(f"the array has shape {array.shape}; expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype.kind not in "buif":
        raise ImageReadError(f"the array has dtype {array.dtype}; expected bool, integers or floating point")
    check_size(array.shape[0], array.shape[1], max_pixels)
    index, _ = select_frame(frame, 1)
    pixels, warnings = array_to_u8(np.asarray(array))
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels, notes = over_black(pixels)
        warnings += notes
    return Image(pixels=pixels, source=source, warnings=tuple(warnings), frame=index)


def array_to_u8(array: NDArray[Any]) -> tuple[NDArray[np.uint8], list[str]]:
    """C-contiguous copy as uint8, and warnings; see `read_array`."""
    if array.dtype == np.uint8:
        return np.array(array, np.uint8, order="C", copy=True), []
    if array.dtype == np.bool_:
        return np.ascontiguousarray(array).astype(np.uint8) * np.uint8(255), []
    warnings: list[str] = []
    if array.dtype.kind == "f":
        array, warnings = finite(array)
    low, high = float(array.min()), float(array.max())
    warnings.append(f"{array.dtype} values scaled from the smallest to the largest ({low:g} to {high:g})")
    return np.ascontiguousarray(min_max_u8(array, low=low, high=high)), warnings


def over_black(rgba: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], list[str]]:
    """(H, W, 3) of an (H, W, 4) picture laid over black, and a warning where it was not opaque.

    >>> over_black(np.full((1, 1, 4), 100, np.uint8))[0].tolist()
    [[[39, 39, 39]]]
    """
    alpha = rgba[:, :, 3:]
    rgb = np.ascontiguousarray(rgba[:, :, :3])
    if (alpha == 255).all():
        return rgb, []
    covered = (rgb.astype(np.uint16) * alpha + 127) // 255
    return covered.astype(np.uint8), ["transparent parts are shown over black"]
