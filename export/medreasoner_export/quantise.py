"""Matrices in four or eight bits, as ONNX Runtime's ``MatMulNBits`` reads them: blocks share scale and zero point."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from medreasoner.errors import BundleError

__all__ = ["BLOCK", "Bits", "Rounded", "dequantise", "packed", "quantise", "unpacked"]

Bits: TypeAlias = Literal[4, 8]
BLOCK = 32
ROWS = 2048  # at a time: the matrix of a large vocabulary would fill the memory in float32


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


def packed(levels: npt.NDArray[np.uint8], bits: Bits) -> npt.NDArray[np.uint8]:
    """Levels of four bits two a byte along the last axis, whose size is even; those of eight as they are."""
    return levels if bits == 8 else np.asarray(levels[..., ::2] | levels[..., 1::2] << 4, np.uint8)


def unpacked(levels: npt.NDArray[np.uint8], bits: Bits) -> npt.NDArray[np.uint8]:
    """What :func:`packed` was given."""
    if bits == 8:
        return levels
    return np.stack([levels & 15, levels >> 4], axis=-1).reshape(*levels.shape[:-1], -1)
