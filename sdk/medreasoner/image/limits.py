"""What every reader checks alike: size, choice of frame, values that are no numbers."""

import operator
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import ImageReadError

__all__ = ["MIN_SIDE", "check_size", "finite", "min_max_u8", "select_frame"]

MIN_SIDE = 8  # below this neither the vision tower nor a clinician has anything to look at


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse a picture that is too small to ground on or too large to decode.

    Raises
    ------
    ImageReadError
        If a side is below 8 pixels or height times width is above `max_pixels`.

    >>> check_size(480, 640, 1_000_000)
    """
    if height < MIN_SIDE or width < MIN_SIDE:
        raise ImageReadError(
            f"{height} x {width} pixels (rows x columns) is too small, at least {MIN_SIDE} a side; enlarge it"
        )
    if height * width > max_pixels:
        raise ImageReadError(
            f"{height} x {width} = {height * width} pixels is above max_pixels = {max_pixels}; "
            "read_image(..., max_pixels=N), or --max-pixels N, admits it if the file is trusted"
        )


def select_frame(
    frame: SupportsIndex | None, n_frames: int, *, kind: str = "frame", default: int = 0
) -> tuple[int, list[str]]:
    """Index of the frame to read, and a warning where the choice was ours.

    Parameters
    ----------
    frame
        Index from 0, or None for `default`.
    n_frames
        How many there are, at least 1.
    kind
        What they are called in the message: frame, page or slice.
    default
        Index to choose where the caller names none.

    Raises
    ------
    ImageReadError
        If `frame` is no integer or not in 0 .. n_frames - 1.

    >>> select_frame(None, 3)
    (0, ['frame 0 of 3 is shown (numbered from 0); frame=N (--frame N) shows another'])
    """
    if frame is None:
        note = f"{kind} {default} of {n_frames} is shown (numbered from 0); frame=N (--frame N) shows another"
        return default, [note] if n_frames > 1 else []
    try:
        index = operator.index(frame)
    except TypeError as err:
        raise ImageReadError(f"frame must be an integer or None, not {type(frame).__name__}") from err
    if not 0 <= index < n_frames:
        accepted = "only frame 0" if n_frames == 1 else f"0 to {n_frames - 1}"
        raise ImageReadError(f"{kind} {index} does not exist; it holds {n_frames} ({accepted})")
    return index, []


def finite(values: NDArray[np.floating]) -> tuple[NDArray[np.floating], list[str]]:
    """Values with NaN and infinities replaced by the smallest finite value, and a warning if there were any.

    Raises
    ------
    ImageReadError
        If not one value is finite.

    >>> finite(np.array([np.nan, 2.0, 5.0]))
    (array([2., 2., 5.]), ['1 of 3 values are not finite; they are shown as the minimum'])
    """
    good = np.isfinite(values)
    if good.all():
        return values, []
    if not good.any():
        raise ImageReadError("not one pixel value is finite; write it again with numbers")
    bad = int(values.size - np.count_nonzero(good))
    filled = np.where(good, values, values[good].min())
    return filled, [f"{bad} of {values.size} values are not finite; they are shown as the minimum"]


def min_max_u8(
    values: NDArray[np.generic], *, low: float | None = None, high: float | None = None
) -> NDArray[np.uint8]:
    """Values scaled linearly so that `low` becomes 0 and `high` 255, clipped outside.

    Parameters
    ----------
    values
        Any shape, finite real numbers.
    low, high
        Default: the smallest and the largest value. Where they are equal all becomes 0.

    >>> min_max_u8(np.array([10.0, 15.0, 20.0])).tolist()
    [0, 128, 255]
    """
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    half_span = high / 2 - low / 2  # halved first: the span of all float64 values would overflow
    if not half_span > 0:
        return np.zeros(values.shape, np.uint8)
    shades = (values.astype(np.float64) / 2 - low / 2) / half_span
    return np.floor(np.clip(shades, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
