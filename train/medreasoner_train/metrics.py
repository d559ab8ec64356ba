"""Means with intervals over groups, and the overlap of masks."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "dice", "group_mean"]


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A mean over samples and its 95 % bootstrap interval over groups."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Overlap 2|A∩B| / (|A| + |B|) of two masks of one shape; two empty masks agree fully.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def group_mean(values: Sequence[float], groups: Sequence[str], *, draws: int = 1000, seed: int = 0) -> Interval:
    """Mean over samples; the interval resamples whole groups, since samples of one patient are not independent.

    Parameters
    ----------
    values, groups
        One of each a sample.
    draws
        Bootstrap resamples.
    seed
        Of the resampling.
    """
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(index).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high), len(values))
