"""Matrices in four bits: blocks of a row share scale and zero point, as ONNX Runtime's ``MatMulNBits`` reads them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner.errors import BundleError

__all__ = ["BLOCK", "Int4Matrix", "dequantise_int4", "quantise_int4"]

BLOCK = 32
LEVELS = 15
ROWS = 2048  # at a time: the matrix of a large vocabulary would fill the memory in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Matrix:
    """A matrix (rows, columns): value = (level - zero point) * scale.

    levels : (rows, blocks, BLOCK / 2) uint8, two a byte, the first in the lower half; scales : (rows, blocks) float32;
    zero_points : (rows, ceil(blocks / 2)) uint8, packed in the same way.
    """

    levels: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8]


def quantise_int4(matrix: npt.NDArray[Any], name: str) -> Int4Matrix:
    """Round to the nearest of 16 levels between the least and the largest value of each block, 0 among them.

    Parameters
    ----------
    matrix
        (rows, columns) of floating point; columns a multiple of `BLOCK`.
    name
        For messages.

    Raises
    ------
    BundleError
        If the columns do not divide into blocks, or the values are too large.
    """
    rows, columns = matrix.shape
    blocks, rest = divmod(columns, BLOCK)
    if rest or not blocks:
        raise BundleError(f"weight {name}: {columns} columns are no multiple of {BLOCK}, as four bits need")
    levels = np.empty((rows, blocks, BLOCK // 2), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        with np.errstate(over="ignore"):
            values = matrix[part].astype(np.float32).reshape(-1, blocks, BLOCK)
            low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
            scale = (high - low) / LEVELS
        if not np.isfinite(scale).all():
            raise BundleError(f"weight {name}: values beyond what float32 holds cannot be rounded to four bits")
        scale = np.where(scale > 0, scale, np.float32(1))
        zero = np.clip(np.rint(-low / scale), 0, LEVELS)
        level = np.clip(np.rint(values / scale[..., None]) + zero[..., None], 0, LEVELS).astype(np.uint8)
        levels[part] = level[..., ::2] | level[..., 1::2] << 4
        scales[part], zeros[part] = scale, zero
    padded = np.pad(zeros, ((0, 0), (0, blocks % 2)))
    return Int4Matrix(levels=levels, scales=scales, zero_points=padded[:, ::2] | padded[:, 1::2] << 4)


def dequantise_int4(matrix: Int4Matrix) -> npt.NDArray[np.float32]:
    """The matrix (rows, columns) float32 that its levels stand for."""
    rows, blocks = matrix.scales.shape
    zeros = _unpacked(matrix.zero_points)[:, :blocks, None]
    values = (_unpacked(matrix.levels).astype(np.float32) - zeros) * matrix.scales[..., None]
    return np.asarray(values, np.float32).reshape(rows, -1)


def _unpacked(pairs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Twice as many along the last axis."""
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)
