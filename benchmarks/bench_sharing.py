"""What many callers gain by sharing a model: ``pytest benchmarks/bench_sharing.py``.

The peer is this package itself, used as one would without these features: a call at a time, or a lock around calls.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from benchmarks.bench_latency import QUERIES
from benchmarks.conftest import ROUNDS, Models
from benchmarks.report import Comparison, Report, TakingTurns

from medreasoner import Grounder, Grounding

SOME_ROUNDS = max(3, ROUNDS // 3)
N_CLIENTS = 8
PAUSE_S = 0.02

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def forgetful(models: Models) -> Iterator[Grounder]:
    """Keeps nothing of an image."""
    with Grounder.load(models.bundle, device="cpu", cache_bytes=0) as grounder:
        yield grounder


def test_sixteen_images(benchmark: Any, forgetful: Grounder, report: Report, pixels: Pixels) -> None:
    images = [np.roll(pixels, 8 * k, axis=0) for k in range(len(QUERIES))]

    def one_at_a_time(_: int) -> None:
        for image, query in zip(images, QUERIES, strict=True):
            forgetful.ground(image, query)

    turns = TakingTurns(lambda _: forgetful.ground(images, QUERIES), one_at_a_time)
    name, goal = "16 images: a list / one at a time", report.goal("peer / ours", 1.3)
    report.rows.append(turns.run(benchmark, name=name, goal=goal, rounds=SOME_ROUNDS, warmup_rounds=1))


def test_sixteen_queries(benchmark: Any, forgetful: Grounder, report: Report, pixels: Pixels) -> None:
    def plain(_: int) -> None:
        for query in QUERIES:
            forgetful.ground(pixels, query)

    turns = TakingTurns(lambda _: forgetful.ground(pixels, QUERIES), plain)
    name, goal = "16 queries: a list / 16 plain calls", report.goal("peer / ours", 6)
    report.rows.append(turns.run(benchmark, name=name, goal=goal, rounds=SOME_ROUNDS, warmup_rounds=1))


def eight_samples(ask: Callable[..., Grounding], benchmark: Any, report: Report, name: str) -> None:
    """Eight samples beside one answer, of questions whose target is found."""
    found = [query for query in QUERIES if ask(query).found] or list(QUERIES)
    turns = TakingTurns(
        lambda number: ask(found[number % len(found)], samples=8, seed=number),
        lambda number: ask(found[number % len(found)]),
    )
    goal = report.goal("ours / peer", 3)
    report.rows.append(turns.run(benchmark, name=name, goal=goal, rounds=ROUNDS, warmup_rounds=2))


def test_eight_samples(benchmark: Any, grounder: Grounder, report: Report, pixels: Pixels) -> None:
    with grounder.open(pixels) as study:
        eight_samples(study.ground, benchmark, report, "8 samples / one answer, known image")


def test_eight_samples_of_a_new_image(benchmark: Any, forgetful: Grounder, report: Report, pixels: Pixels) -> None:
    eight_samples(partial(forgetful.ground, pixels), benchmark, report, "8 samples / one answer, new image")


def slow_end(ask: Callable[[str], object]) -> float:
    """95th percentile of the milliseconds that an answer takes, of clients that all keep asking at once."""
    start, spent = threading.Barrier(N_CLIENTS), list[float]()

    def client(number: int) -> None:
        start.wait()
        for turn in range(4):
            begin = time.perf_counter()
            ask(QUERIES[(number + turn) % len(QUERIES)])
            spent.append(1e3 * (time.perf_counter() - begin))

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        list(pool.map(client, range(N_CLIENTS)))
    return float(np.percentile(spent, 95))


def test_eight_clients(grounder: Grounder, report: Report, pixels: Pixels) -> None:
    """Not pytest-benchmark's: what counts is not a call, but the slowest of many."""
    lock = threading.Lock()
    ours, theirs = list[float](), list[float]()
    with grounder.open(pixels) as study:

        def one_by_one(query: str) -> None:
            with lock:
                study.ground(query)

        for number in range(SOME_ROUNDS + 1):
            theirs.append(slow_end(one_by_one))
            time.sleep(PAUSE_S)
            ours.append(slow_end(study.ground))
            time.sleep(PAUSE_S)
            if number == 0:  # warms up
                ours.clear()
                theirs.clear()
    name, goal = "8 clients, p95: shared / a lock", report.goal("peer / ours", 2.5)
    report.rows.append(Comparison(name=name, ours=ours, theirs=theirs, goal=goal))
