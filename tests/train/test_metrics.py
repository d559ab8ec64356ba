"""Means with intervals over groups, and Dice."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from medreasoner_train.metrics import dice, group_mean

rows = strategies.lists(
    strategies.tuples(strategies.floats(0, 1), strategies.sampled_from("abcdefgh")), min_size=1, max_size=40
)


@hypothesis.given(rows)
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_interval_contains_the_mean_and_stays_in_range(samples: list[tuple[float, str]]) -> None:
    values, groups = zip(*samples, strict=True)
    own = group_mean(values, groups)
    assert own.count == len(values)
    assert own.mean == pytest.approx(sum(values) / len(values))
    assert min(values) - 1e-9 <= own.low <= own.mean + 1e-9
    assert own.mean - 1e-9 <= own.high <= max(values) + 1e-9


def test_nothing_measured_is_not_a_number() -> None:
    own = group_mean([], [])
    assert own.count == 0
    assert all(math.isnan(value) for value in (own.mean, own.low, own.high))


def test_one_group_has_an_interval_without_width() -> None:
    own = group_mean([0.0, 1.0], ["a", "a"])
    assert (own.mean, own.low, own.high) == (0.5, 0.5, 0.5)


def test_samples_of_one_patient_count_as_one() -> None:
    rng = np.random.default_rng(0)
    patient = rng.random(20)
    values = np.repeat(patient, 50)
    apart = group_mean(values.tolist(), [str(i) for i in range(1000)])
    together = group_mean(values.tolist(), np.repeat([f"p{i}" for i in range(20)], 50).tolist())
    assert together.high - together.low > 4 * (apart.high - apart.low)
    # The interval of a mean of 20 independent values is about +- 2 s / sqrt(20).
    assert together.high - together.low == pytest.approx(3.92 * patient.std() / math.sqrt(20), rel=0.15)


def test_a_seed_gives_the_same_interval() -> None:
    values, groups = [0.1, 0.9, 0.4], ["a", "b", "c"]
    assert group_mean(values, groups) == group_mean(values, groups)
    assert str(group_mean([0.5], ["a"])) == "0.500 [0.500, 0.500]"


def test_dice_counts_pixels() -> None:
    a = np.zeros((4, 4), bool)
    b = a.copy()
    assert dice(a, b) == 1.0
    a[:2] = True
    assert dice(a, b) == 0.0
    b[1:3] = True
    assert dice(a, b) == pytest.approx(2 * 4 / 16)
    assert dice(a, a) == 1.0
