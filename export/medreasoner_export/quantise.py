"""Matrices in few bits, as two operators of ONNX Runtime read them.

``MatMulNBits``: four or eight bits, with a scale and a zero point a block. ``DynamicQuantizeMatMul``: a scale a row.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from medreasoner.errors import BundleError

__all__ = [
    "BLOCK",
    "INT8_LIMIT",
    "LEVEL_LIMIT",
    "Bits",
    "Rounded",
    "RoundedRows",
    "dequantise",
    "dequantise_rows",
    "packed",
    "quantise",
    "quantise_rows",
    "unpacked",
]

Bits: TypeAlias = Literal[4, 8]
BLOCK = 32
ROWS = 2048  # at a time: the matrix of a large vocabulary would fill the memory in float32

LEVEL_LIMIT = 64
"""Largest level of a row at either side of zero.

A processor without VNNI adds two products of an activation, up to 255, and a level in 16 bits, and what does not fit is
cut off without a word: 2 * 255 * 64 = 32,640 fits, and with 127 levels it would not. Unsigned levels, which are widened
first, would be exact too, but took twice the time on a processor with VNNI.
"""
INT8_LIMIT = 127
"""The same for a matrix that is only stored in eight bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A matrix (rows, columns): value = (level - zero point) * scale.

    levels : (rows, blocks, BLOCK * bits / 8) uint8, of four bits two a byte, the first in the lower half; scales :
    (rows, blocks) float32; zero_points : (rows, ceil(blocks * bits / 8)) uint8, packed in the same way.
    """

    bits: Bits
    levels: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedRows:
    """A matrix (rows, columns): value = level * scale of the row.

    levels : (columns, rows) int8, transposed as the product reads them; scales : (rows,) float32.
    """

    levels: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]


def quantise(matrix: npt.NDArray[Any], name: str, bits: Bits) -> Rounded:
    """Round to the nearest of 16 or 256 levels between the least and the largest value of each block, 0 among them.

    Parameters
    ----------
    matrix
        (rows, columns) of floating point; columns a multiple of `BLOCK`.
    name
        For messages.
    bits
        Of a level.

    Raises
    ------
    BundleError
        If the columns do not divide into blocks, or the values are too large.
    """
    rows, columns = matrix.shape
    blocks, rest = divmod(columns, BLOCK)
    if rest or not blocks:
        raise BundleError(f"weight {name}: {columns} columns are no multiple of {BLOCK}, as {bits} bits need")
    largest = 2**bits - 1
    levels = np.empty((rows, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        with np.errstate(over="ignore"):
            values = matrix[part].astype(np.float32).reshape(-1, blocks, BLOCK)
            low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
            scale = (high - low) / largest
        if not np.isfinite(scale).all():
            raise BundleError(f"weight {name}: values beyond what float32 holds cannot be rounded to {bits} bits")
        scale = np.where(scale > 0, scale, np.float32(1))
        zero = np.clip(np.rint(-low / scale), 0, largest)
        level = np.clip(np.rint(values / scale[..., None]) + zero[..., None], 0, largest).astype(np.uint8)
        levels[part] = packed(level, bits)
        scales[part], zeros[part] = scale, zero
    odd = ((0, 0), (0, blocks % 2 if bits == 4 else 0))
    return Rounded(bits=bits, levels=levels, scales=scales, zero_points=packed(np.pad(zeros, odd), bits))


def dequantise(matrix: Rounded) -> npt.NDArray[np.float32]:
    """The matrix (rows, columns) float32 that its levels stand for."""
    rows, blocks = matrix.scales.shape
    zeros = unpacked(matrix.zero_points, matrix.bits)[:, :blocks, None].astype(np.float32)
    values = (unpacked(matrix.levels, matrix.bits).astype(np.float32) - zeros) * matrix.scales[..., None]
    return np.asarray(values, np.float32).reshape(rows, -1)


def quantise_rows(matrix: npt.NDArray[Any], name: str, limit: int = LEVEL_LIMIT) -> RoundedRows:
    """Round each row to the nearest of `limit` levels at either side of zero.

    Parameters
    ----------
    matrix
        (rows, columns) of floating point.
    name
        For messages.
    limit
        At most `INT8_LIMIT`.

    Raises
    ------
    BundleError
        If the values are too large.
    """
    rows, columns = matrix.shape
    levels, scales = np.empty((columns, rows), np.int8), np.empty(rows, np.float32)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        with np.errstate(over="ignore"):
            values = matrix[part].astype(np.float32)
            scale = np.abs(values).max(-1) / np.float32(limit)
        if not np.isfinite(scale).all():
            raise BundleError(f"weight {name}: values beyond what float32 holds cannot be rounded to 8 bits")
        scales[part] = np.where(scale > 0, scale, np.float32(1))
        # The scale of a row of tiny numbers is itself rounded, and may be too small: hence the limits.
        levels[:, part] = np.clip(np.rint(values / scales[part, None]), -limit, limit).T
    return RoundedRows(levels=levels, scales=scales)


def dequantise_rows(matrix: RoundedRows) -> npt.NDArray[np.float32]:
    """The matrix (rows, columns) float32 that its levels stand for."""
    return np.asarray(matrix.levels.T * matrix.scales[:, None], np.float32)


def packed(levels: npt.NDArray[np.uint8], bits: Bits) -> npt.NDArray[np.uint8]:
    """Levels of four bits two a byte along the last axis, whose size is even; those of eight as they are."""
    return levels if bits == 8 else np.asarray(levels[..., ::2] | levels[..., 1::2] << 4, np.uint8)


def unpacked(levels: npt.NDArray[np.uint8], bits: Bits) -> npt.NDArray[np.uint8]:
    """What :func:`packed` was given."""
    if bits == 8:
        return levels
    return np.stack([levels & 15, levels >> 4], axis=-1).reshape(*levels.shape[:-1], -1)
