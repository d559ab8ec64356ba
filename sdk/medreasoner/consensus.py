"""Several answers to one question as one: how much their masks agree, and what that is worth."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["concord", "expected_dice"]


def concord(masks: NDArray[np.bool_]) -> tuple[float, int]:
    """How much masks agree.

    Parameters
    ----------
    masks
        (n, ...) bool, at least one; those of an absent target are empty.

    Returns
    -------
    concord : float
        Mean Dice coefficient of two of them, in [0, 1]; two empty ones agree. 1 for a single one.
    nearest : int
        Index of the one that agrees the most with the others.

    Examples
    --------
    >>> value, nearest = concord(np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0]], bool))
    >>> round(value, 3), nearest
    (0.778, 0)
    """
    n = len(masks)
    if n == 1:
        return 1.0, 0
    flat = masks.reshape(n, -1).astype(np.float32)  # exact up to 2**24 places
    sizes = flat.sum(axis=1)
    total = sizes[:, None] + sizes
    dice = np.where(total > 0, 2.0 * (flat @ flat.T) / np.maximum(total, 1.0), 1.0).astype(np.float64)
    others = (dice.sum(axis=1) - 1.0) / (n - 1)
    return float(others.mean()), int(np.argmax(others))


def expected_dice(value: float, knots: Sequence[tuple[float, float]]) -> float:
    """The Dice coefficient that answers of such a concord have: a line through knots, flat beyond its ends.

    >>> expected_dice(0.75, [(0.5, 0.2), (1.0, 0.8)])
    0.5
    """
    xs, ys = zip(*knots, strict=True)
    return float(np.interp(value, xs, ys))
