"""The baseline that has seen no image: the median box of each category, in relative coordinates."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["box_iou", "fit_prior"]

Boxes = npt.NDArray[np.float64]


def box_iou(a: Boxes, b: Boxes) -> npt.NDArray[np.float64]:
    """Intersection over union of boxes row by row: (N, 4), (N, 4) -> (N,) in [0, 1]; an empty box scores 0.

    >>> box_iou(np.array([[0., 0., 2., 2.]]), np.array([[1., 0., 3., 2.]]))
    array([0.33333333])
    """
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    sizes = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (a, b)]
    union = sizes[0] + sizes[1] - shared
    iou: Boxes = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def fit_prior(keys: Sequence[str], boxes: Boxes) -> Mapping[str, Boxes]:
    """Median box (4,) of each key over `boxes` (N, 4), which are relative to their images."""
    rows: dict[str, list[Boxes]] = defaultdict(list)
    for key, box in zip(keys, boxes, strict=True):
        rows[key].append(box)
    return {key: np.median(np.stack(own), axis=0) for key, own in rows.items()}
