"""What `medreasoner.ops` accepts; every refusal says what was expected and what came."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import ArrayError

_U8, _BOOL = np.dtype(np.uint8), np.dtype(np.bool_)
_F32 = np.dtype(np.float32)
_WEIGHT_STORAGE: dict[str, np.dtype[Any]] = {
    "float32": _F32,
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
_MAX_SIDE = 1 << 20
_MAX_PIXELS = 1 << 28


def check_array(array: NDArray[Any], name: str, shape: str, n_dims: int, *dtypes: np.dtype[Any]) -> None:
    """Refuse what is not a C-contiguous array of one of `dtypes` with `n_dims` dimensions, described by `shape`."""
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes or array.ndim != n_dims:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        names = " or ".join(dtype.name for dtype in dtypes)
        raise ArrayError(f"{name}: expected {names} {shape}, got {found}")
    if not array.flags.c_contiguous:
        raise ArrayError(f"{name}: expected a C-contiguous array; np.ascontiguousarray makes one")


def check_pixels(pixels: NDArray[np.uint8]) -> None:
    """Refuse what is not (H, W) or (H, W, 3) uint8 with at least one pixel."""
    is_color = isinstance(pixels, np.ndarray) and pixels.ndim == 3
    check_array(pixels, "pixels", "(H, W) or (H, W, 3)", 3 if is_color else 2, _U8)
    if pixels.size == 0 or (is_color and pixels.shape[2] != 3):
        raise ArrayError(f"pixels: expected (H, W) or (H, W, 3) with at least one pixel, got {pixels.shape}")


def check_mask(mask: NDArray[np.bool_]) -> None:
    """Refuse what is not (H, W) bool with at least one pixel."""
    check_array(mask, "mask", "(H, W)", 2, _BOOL)
    if mask.size == 0:
        raise ArrayError(f"mask: expected at least one pixel, got {mask.shape}")


def check_size(height: int, width: int) -> None:
    """Refuse an empty image, and one so large that only a fault or malice asks for it."""
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE and height * width <= _MAX_PIXELS):
        limits = f"1 to {_MAX_SIDE} a side and at most {_MAX_PIXELS} pixels"
        raise ArrayError(f"size: expected {limits}, got {height} x {width}")


def check_canvas(
    height: int, width: int, content: tuple[int, int] | None, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Refuse content larger than its canvas, and a normalisation that does not yield finite numbers."""
    check_size(height, width)
    if content is not None and not (0 < content[0] <= height and 0 < content[1] <= width):
        raise ArrayError(f"content: expected a size within {height} x {width}, got {content[0]} x {content[1]}")
    if len(mean) != 3 or not np.isfinite(mean).all():
        raise ArrayError(f"mean: expected three finite numbers, got {tuple(mean)}")
    if len(std) != 3 or not all(0 < value < np.inf for value in std):
        raise ArrayError(f"std: expected three positive numbers, got {tuple(std)}")


def check_weight(weight: NDArray[Any], dtype: str) -> None:
    """Refuse what is not a (V, D) matrix stored as `dtype` is."""
    if dtype not in _WEIGHT_STORAGE:
        raise ArrayError(f"dtype: expected one of {', '.join(_WEIGHT_STORAGE)}, got {dtype!r}")
    check_array(weight, f"weight of dtype {dtype}", "(V, D)", 2, _WEIGHT_STORAGE[dtype])


def check_hidden(hidden: NDArray[np.float32], weight: NDArray[Any]) -> None:
    """Refuse what is not a float32 vector as long as the rows of `weight`."""
    check_array(hidden, "hidden", "(D,)", 1, _F32)
    if hidden.shape[0] != weight.shape[1]:
        raise ArrayError(f"hidden: expected ({weight.shape[1]},) as in weight {weight.shape}, got {hidden.shape}")
