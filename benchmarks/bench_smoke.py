"""Random weights, no peer, a few seconds: that the benchmarks run. ``pytest benchmarks -k "smoke or kernels"``."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from benchmarks.conftest import Models

from medreasoner import Grounder

IMAGE = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
QUERY = "Which organ lies behind the stomach?"


@pytest.fixture(scope="module")
def toy_grounder(toy: Models) -> Iterator[Grounder]:
    with Grounder.load(toy.bundle, device="cpu") as grounder:
        yield grounder


def test_smoke_first_query(benchmark: Any, toy_grounder: Grounder) -> None:
    benchmark.group = "toy, 512x512"
    result = benchmark.pedantic(toy_grounder.ground, (IMAGE, QUERY), rounds=5, warmup_rounds=1)
    assert result.mask.shape == IMAGE.shape


def test_smoke_next_query(benchmark: Any, toy_grounder: Grounder) -> None:
    benchmark.group = "toy, 512x512"
    with toy_grounder.open(IMAGE) as study:
        result = benchmark.pedantic(study.ground, (QUERY,), rounds=10, warmup_rounds=1)
    assert result.mask.shape == IMAGE.shape
