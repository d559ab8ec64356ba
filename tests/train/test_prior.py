"""Overlap of boxes against counted pixels, and the prior."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from medreasoner_train.prior import box_iou, fit_prior

boxes = strategies.lists(
    strategies.tuples(*[strategies.integers(0, 12)] * 4), min_size=1, max_size=6
)  # not all valid: some are empty


def counted(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """IoU by painting both boxes."""
    canvas = np.zeros((2, 12, 12), bool)
    for k, (x1, y1, x2, y2) in enumerate((a, b)):
        canvas[k, y1:y2, x1:x2] = True
    union = (canvas[0] | canvas[1]).sum()
    return float((canvas[0] & canvas[1]).sum() / union) if union else 0.0


@hypothesis.given(boxes, boxes)
def test_overlap_of_boxes_is_that_of_counted_pixels(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> None:
    count = min(len(a), len(b))
    first, second = np.array(a[:count], float), np.array(b[:count], float)
    expected = [counted(x, y) for x, y in zip(a, b, strict=False)]
    np.testing.assert_allclose(box_iou(first, second), expected)
    np.testing.assert_allclose(box_iou(second, first), expected)


@pytest.mark.filterwarnings("error")
def test_an_empty_box_scores_nothing_even_with_itself() -> None:
    empty = np.array([[3.0, 3.0, 3.0, 5.0]])
    assert box_iou(empty, empty).tolist() == [0.0]


def test_the_prior_is_the_median_of_each_key() -> None:
    rows = np.array([[0, 0, 1, 1], [0.2, 0.1, 0.6, 0.5], [0.4, 0.3, 0.9, 0.8], [0.5, 0.5, 0.7, 0.7]], float)
    prior = fit_prior(["a", "a", "a", "b"], rows)
    np.testing.assert_allclose(prior["a"], [0.2, 0.1, 0.9, 0.8])
    np.testing.assert_allclose(prior["b"], rows[3])
