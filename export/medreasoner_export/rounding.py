"""Four-bit levels chosen by what a matrix is multiplied with, so that its products change least.

Rounding to the nearest keeps each weight near. What counts is ``(w - q) H (w - q)``: how far the product of a row w and
its rounded form q goes apart, on average over inputs x with second moments ``H = mean(x x')``. The columns are rounded
one by one, and those that are left make up for the error so far.

References
----------
GPTQ, arXiv 2210.17323, section 3.3 (the order of the columns, the Cholesky factor, the dampening).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner_export.quantise import BLOCK, Rounded, packed, quantise, unpacked

__all__ = ["SPAN", "Moments", "calibrated", "weighted_errors"]

SPAN = 1024
"""Columns whose moments are kept with each other. A whole matrix of them would fill the memory: 1.4 GB at 18944."""
DAMPENING = 0.01  # of the mean of the diagonal, on all of it: activations are rounded too, and directions go unseen
LARGEST = 15
# Of a block's range. A narrower grid is finer where most weights are, and clips the few at its ends.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)

Array = npt.NDArray[Any]


class Moments:
    """Second moments of rows of numbers, of `SPAN` neighbours at a time with each other.

    Parameters
    ----------
    width
        Numbers in a row.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._parts = [slice(start, min(start + SPAN, width)) for start in range(0, width, SPAN)]
        self._sums = [np.zeros((part.stop - part.start,) * 2) for part in self._parts]

    def add(self, rows: npt.NDArray[np.float32]) -> None:
        """Take (n, width) float32 rows into account."""
        for part, total in zip(self._parts, self._sums, strict=True):
            own = np.ascontiguousarray(rows[:, part])
            total += own.T @ own
        self.count += len(rows)

    def parts(self) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Columns, and their moments (size, size) float64 with each other; dampened, so that they can be inverted."""
        for part, total in zip(self._parts, self._sums, strict=True):
            mean = total / max(self.count, 1)
            level = float(mean.diagonal().mean()) or 1.0  # where all inputs are zero any levels will do
            yield part, mean + DAMPENING * level * np.eye(len(mean))


def weighted_errors(difference: Array, moments: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``d H d`` of each row d of a difference (rows, size), with moments H (size, size): (rows,).

    Examples
    --------
    >>> weighted_errors(np.array([[1.0, 2.0]]), np.array([[1.0, 0.5], [0.5, 2.0]])).tolist()
    [11.0]
    """
    return np.asarray(np.einsum("ij,ij->i", difference @ moments, difference))


def calibrated(matrix: Array, name: str, moments: Moments) -> Rounded:
    """A matrix (rows, columns) in four bits, each row no further from it than rounded to the nearest.

    "Further" is `weighted_errors` with `moments`, of the columns' inputs.

    Raises
    ------
    BundleError
        As :func:`quantise` does.
    """
    nearest = quantise(matrix, name, 4)
    rows, blocks = nearest.scales.shape
    levels = unpacked(nearest.levels, 4)
    zeros = unpacked(nearest.zero_points, 4)[:, :blocks]
    scales = nearest.scales.copy()
    for part, hessian in moments.parts():
        own = slice(part.start // BLOCK, part.stop // BLOCK)
        weights = np.asarray(matrix[:, part], np.float32)
        found = _with_feedback(weights, hessian)
        errors = [
            weighted_errors(_values(*each).reshape(rows, -1) - weights, hessian)
            for each in (found, (levels[:, own], scales[:, own], zeros[:, own]))
        ]
        better = errors[0] < errors[1]
        levels[better, own], scales[better, own], zeros[better, own] = (each[better] for each in found)
    odd = ((0, 0), (0, blocks % 2))
    return Rounded(bits=4, levels=packed(levels, 4), scales=scales, zero_points=packed(np.pad(zeros, odd), 4))


def _values(levels: Array, scales: Array, zeros: Array) -> npt.NDArray[np.float32]:
    """(rows, blocks, BLOCK) of levels of that shape, with scales and zero points (rows, blocks)."""
    return np.asarray((levels.astype(np.float32) - zeros[..., None]) * scales[..., None], np.float32)


def _with_feedback(weights: npt.NDArray[np.float32], hessian: npt.NDArray[np.float64]) -> tuple[Array, Array, Array]:
    """Levels (rows, blocks, BLOCK), scales and zero points (rows, blocks) of weights (rows, columns)."""
    rows, columns = weights.shape
    # Row j holds, from the diagonal on, how the columns behind j answer to an error in j.
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    left = np.array(weights.T, order="C")  # a copy (columns, rows): one column at a time is contiguous
    levels = np.empty((columns, rows), np.uint8)
    scales, zeros = (np.empty((columns // BLOCK, rows), dtype) for dtype in (np.float32, np.uint8))
    for index, start in enumerate(range(0, columns, BLOCK)):
        stop = start + BLOCK
        curvature = factor.diagonal()[start:stop, None] ** -2
        scale, zero = _grid(left[start:stop], curvature)
        errors = np.empty((BLOCK, rows), np.float32)
        for place, column in enumerate(range(start, stop)):
            level = np.clip(np.rint(left[column] / scale) + zero, 0, LARGEST)
            errors[place] = (left[column] - (level - zero) * scale) / factor[column, column]
            left[column + 1 : stop] -= factor[column, column + 1 : stop, None] * errors[place]
            levels[column] = level
        left[stop:] -= factor[start:stop, stop:].T @ errors
        scales[index], zeros[index] = scale, zero
    return levels.T.reshape(rows, -1, BLOCK), scales.T, zeros.T


def _grid(values: npt.NDArray[np.float32], curvature: npt.NDArray[np.float32]) -> tuple[Array, Array]:
    """Scale and zero point (rows,) of a block's values (BLOCK, rows) whose errors count by `curvature` (BLOCK, 1)."""
    low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
    best = np.full(len(low), np.inf, np.float32)
    scale, zero = np.ones_like(best), np.zeros_like(best)
    for shrink in SHRINKS:
        step = (high - low) * np.float32(shrink / LARGEST)
        step = np.where(step > 0, step, np.float32(1))
        origin = np.clip(np.rint(-low * np.float32(shrink) / step), 0, LARGEST)
        level = np.clip(np.rint(values / step) + origin, 0, LARGEST)
        error = (((level - origin) * step - values) ** 2 * curvature).sum(0)
        better = error < best
        best, scale, zero = (np.where(better, new, old) for new, old in ((error, best), (step, scale), (origin, zero)))
    return scale, zero
