"""Levels chosen by second moments: against NumPy's own moments, plain rounding, and a search of all levels."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreasoner.errors import BundleError
from medreasoner_export import rounding
from medreasoner_export.quantise import BLOCK, dequantise, quantise
from medreasoner_export.rounding import Moments, calibrated, weighted_errors


def _inputs(rng: np.random.Generator, count: int, width: int, rank: int) -> np.ndarray:
    """Rows that lie near a space of few dimensions, with sizes that differ, as hidden states do."""
    rows = rng.standard_normal((count, rank)) @ rng.standard_normal((rank, width))
    return ((rows + 0.1 * rng.standard_normal((count, width))) * rng.uniform(0.1, 3, width)).astype(np.float32)


def test_moments_are_those_of_numpy_a_span_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "SPAN", 64)
    rows = _inputs(np.random.default_rng(0), 50, 160, 9)
    moments = Moments(160)
    moments.add(rows[:20])
    moments.add(rows[20:])
    assert moments.count == 50
    parts = list(moments.parts())
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 64), (64, 128), (128, 160)]
    for part, found in parts:
        own = rows[:, part].astype(np.float64)
        expected = np.mean([np.outer(row, row) for row in own], axis=0)
        expected += np.eye(len(expected)) * np.trace(expected) / len(expected) / 100
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@settings(deadline=None)
@given(
    rows=st.integers(1, 6),
    blocks=st.integers(1, 5),
    rank=st.integers(1, 40),
    seed=st.integers(0, 99),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_no_row_is_further_in_its_products_than_rounded_to_the_nearest(
    rows: int, blocks: int, rank: int, seed: int, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    width = blocks * BLOCK
    weights = (rng.standard_normal((rows, width)) + shift).astype(np.float32)
    moments = Moments(width)
    moments.add(_inputs(rng, 60, width, rank))
    ((_, hessian),) = moments.parts()
    found, nearest = (
        weighted_errors(dequantise(each).astype(np.float64) - weights, hessian)
        for each in (calibrated(weights, "m", moments), quantise(weights, "m", 4))
    )
    assert (found <= nearest * (1 + 1e-5) + 1e-9).all()


def test_products_with_inputs_like_those_seen_are_much_nearer() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((40, 256)).astype(np.float32)
    rows = _inputs(rng, 600, 256, 30)
    moments = Moments(256)
    moments.add(rows[:300])
    exact = rows[300:] @ weights.T
    found, nearest = (
        np.linalg.norm(rows[300:] @ dequantise(each).T - exact) / np.linalg.norm(exact)
        for each in (calibrated(weights, "m", moments), quantise(weights, "m", 4))
    )
    assert found < 0.5 * nearest


def test_it_is_near_the_best_of_all_levels_of_a_row() -> None:
    """Four columns of a block move, the others are zero and stay: 16**4 rows are tried."""
    rng = np.random.default_rng(3)
    weights = np.zeros((1, BLOCK), np.float32)
    weights[0, :4] = [-1.0, 1.0, 0.37, -0.61]
    rows = np.zeros((200, BLOCK), np.float32)
    rows[:, :4] = _inputs(rng, 200, 4, 2)
    moments = Moments(BLOCK)
    moments.add(rows)
    ((_, hessian),) = moments.parts()
    result = calibrated(weights, "m", moments)
    found = float(weighted_errors(dequantise(result) - weights, hessian)[0])
    scale, zero = float(result.scales[0, 0]), int(result.zero_points[0, 0] & 15)
    every = np.zeros((16**4, BLOCK))
    every[:, :4] = (np.array(list(itertools.product(range(16), repeat=4))) - zero) * scale
    best = float(weighted_errors(every - weights, hessian).min())
    nearest = float(weighted_errors(dequantise(quantise(weights, "m", 4)) - weights, hessian)[0])
    assert best <= found <= nearest
    assert found < best + 0.5 * (nearest - best)


def test_spans_and_odd_numbers_of_blocks_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "SPAN", 64)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 160)).astype(np.float32)
    rows = _inputs(rng, 90, 160, 12)
    moments = Moments(160)
    moments.add(rows)
    found = dequantise(calibrated(weights, "m", moments))
    for part, own in ((slice(0, 64), rows[:, :64]), (slice(128, 160), rows[:, 128:])):
        alone = Moments(part.stop - part.start)
        alone.add(own)
        np.testing.assert_array_equal(found[:, part], dequantise(calibrated(weights[:, part], "m", alone)))


def test_inputs_that_are_always_zero_leave_finite_levels() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for rows in (np.zeros((5, 64), np.float32), np.pad(np.ones((5, 1), np.float32), ((0, 0), (0, 63)))):
        moments = Moments(64)
        moments.add(rows)
        assert np.abs(dequantise(calibrated(weights, "m", moments)) - weights).max() < 1


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BundleError, match="weight m: 40 columns"):
        calibrated(np.zeros((2, 40), np.float32), "m", Moments(40))
