"""Many callers on one model: batches, deadlines, cancellation, a full queue, and what is kept of an image."""

import asyncio
import concurrent.futures
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.sdk.test_grounder import QUERIES, picture, same, with_threshold

import medreasoner as mr
from medreasoner.engine import Engine
from medreasoner.readings import ReadingCache
from medreasoner.reasoner import scheduler
from medreasoner.reasoner.choosing import Choosing

Loader = Callable[..., mr.Grounder]


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finds something in every image, and does not think for long."""
    copy = tmp_path_factory.mktemp("sharing") / "bundle"
    return with_threshold(toy_bundle, copy, 1.0, max_think_tokens=24)


@pytest.fixture(scope="module")
def load(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Loader]:
    """Loads the bundle, with the decoder's kernel where a test asks for nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        if getattr(request, "param", "steps") == "graph":
            patch.setattr("medreasoner.engine.steps_pay", lambda: False)
        yield lambda **options: mr.Grounder.load(bundle, device="cpu", **options)


both_roads = pytest.mark.parametrize("load", ["steps", "graph"], indirect=True)
"""For what a decoder does with several rows; what lies above it knows nothing of its kernel and its graph."""


@pytest.fixture(scope="module")
def plain(load: Loader) -> Iterator[Callable[..., mr.Grounding]]:
    """Answers one question after the other, about an image that is read anew."""
    with load(n_slots=1, cache_bytes=0) as grounder:
        yield grounder.ground


def all_questions(think: bool) -> list[tuple[NDArray[np.uint8], str, bool]]:
    images = [picture(seed=i, height=90 + i, width=60 + 7 * i) for i in range(3)]
    return [(image, query, think) for image in images for query in QUERIES]


@both_roads
@pytest.mark.parametrize("think", [False, True])
def test_threads_get_what_they_would_get_alone(load: Loader, plain: Callable[..., mr.Grounding], think: bool) -> None:
    questions = all_questions(think) * 2
    expected = [plain(image, query, think=think) for image, query, _ in questions]
    with load() as grounder, concurrent.futures.ThreadPoolExecutor(11) as pool:  # more than there are slots
        asked = [pool.submit(grounder.ground, image, query, think=think) for image, query, _ in questions]
        for future, one in zip(asked, expected, strict=True):
            found = future.result(60)
            assert same(found, one)
            assert {**found.tokens, "cached": 0} == one.tokens
        decoder = grounder._engine.reasoner._decoder
        assert bool(decoder._batches) == (think and decoder._step is None)  # several rows in a run of the graph


@both_roads
@pytest.mark.parametrize("think", [False, True])
def test_a_list_of_questions_gets_what_each_would_get(
    load: Loader, plain: Callable[..., mr.Grounding], think: bool
) -> None:
    image, queries = picture(), [f"{query} {number}" for number in range(4) for query in QUERIES]
    with load() as grounder:
        for query, found in zip(queries, grounder.ground(image, queries, think=think), strict=True):
            assert same(found, plain(image, query, think=think))


@both_roads
@pytest.mark.parametrize("is_on_cpu", [True, False], ids=["side by side", "in batches"])
@pytest.mark.parametrize("think", [False, True])
def test_a_list_of_images_gets_what_each_would_get(
    load: Loader, plain: Callable[..., mr.Grounding], monkeypatch: pytest.MonkeyPatch, think: bool, is_on_cpu: bool
) -> None:
    monkeypatch.setattr(Engine, "is_on_cpu", is_on_cpu)
    images = [picture(seed=i % 5, height=90 + i % 3) for i in range(10)]
    queries = [QUERIES[i % len(QUERIES)] for i in range(10)]
    with load() as grounder:
        for one, query, found in zip(images, queries, grounder.ground(images, queries, think=think), strict=True):
            assert same(found, plain(one, query, think=think))


def test_a_long_list_is_read_in_sessions_of_one_thread(bundle: Path, tmp_path: Path) -> None:
    images, queries = [picture(seed=i) for i in range(8)], [QUERIES[0]] * 8
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    with mr.Grounder.load(copy, device="cpu", n_threads=2, cache_bytes=0) as grounder:
        alone = [grounder.ground(image, QUERIES[0]) for image in images]
        graph = copy / next(name for name in grounder.providers if "vision" in name)
        content = graph.read_bytes()
        graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(mr.BundleError, match="SHA-256"):  # they are opened later than the bundle was proved
            grounder.ground(images, queries)
        graph.write_bytes(content)
        assert all(same(*pair) for pair in zip(grounder.ground(images, queries), alone, strict=True))
        towers = grounder._engine.open_towers()
        assert towers is not None
        assert towers is grounder._engine.open_towers()
        assert towers.vision is not grounder._engine.reasoner._vision
    assert grounder._engine.open_towers() is None  # closed


def test_one_thread_needs_no_other_sessions(bundle: Path) -> None:
    with mr.Grounder.load(bundle, device="cpu", n_threads=1) as grounder:
        assert grounder._engine.open_towers() is None


def test_a_list_of_images_does_not_fill_the_queue_by_itself(load: Loader) -> None:
    images, queries = [picture(seed=i) for i in range(5)], [QUERIES[0]] * 5
    with load(n_slots=2, max_waiting=0) as grounder:
        alone = [grounder.ground(image, QUERIES[0], samples=3) for image in images]
        for found, one in zip(grounder.ground(images, queries, samples=3), alone, strict=True):
            assert same(found, one)


@pytest.mark.parametrize("is_on_cpu", [True, False], ids=["side by side", "in batches"])
def test_one_image_that_fails_ends_the_list(load: Loader, monkeypatch: pytest.MonkeyPatch, is_on_cpu: bool) -> None:
    monkeypatch.setattr(Engine, "is_on_cpu", is_on_cpu)
    images: list[Any] = [picture(seed=i) for i in range(40)]
    images[2] = b"no image"
    with load(cache_bytes=2**30) as grounder:
        with pytest.raises(mr.ImageReadError, match="unknown format"):
            grounder.ground(images, [QUERIES[0]] * len(images))
        assert len(grounder._engine.readings) < 20  # the rest is given up
        assert grounder.ground(images[0], QUERIES[0]).found


def test_a_reader_who_rests_holds_nobody_up(load: Loader) -> None:
    with load(n_slots=2) as grounder:
        stream = grounder.stream(picture(), QUERIES[0], think=True)
        first = next(stream)
        for _ in range(2):
            with concurrent.futures.ThreadPoolExecutor(3) as pool:
                asked = [pool.submit(grounder.ground, picture(), query) for query in QUERIES[:3]]
                assert all(future.result(30).found for future in asked)
        rest = list(stream)
        assert isinstance(first, mr.Thought)
        assert same(rest[-1], grounder.ground(picture(), QUERIES[0], think=True))


class Slow:
    """Makes every tick of the decoder take a while, and tells how many there were."""

    def __init__(self, grounder: mr.Grounder, seconds: float, patch: pytest.MonkeyPatch) -> None:
        decoder = grounder._engine.reasoner._decoder
        self._run, self._seconds, self.rows = decoder.run, seconds, list[int]()
        patch.setattr(decoder, "run", self.run)
        patch.setattr(Choosing, "goes_whole", lambda *_: False)  # a tick for each step

    def run(self, steps: Any) -> Any:
        self.rows.append(len(steps))
        time.sleep(self._seconds)
        return self._run(steps)


@both_roads
def test_a_deadline_ends_an_answer_and_only_that(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    with load() as grounder, grounder.open(picture()) as study, concurrent.futures.ThreadPoolExecutor(3) as pool:
        expected = study.ground(QUERIES[1])
        Slow(grounder, 0.05, monkeypatch)
        late = [pool.submit(study.ground, query, timeout_s=0.12) for query in QUERIES[:2]]
        fine = pool.submit(study.ground, QUERIES[1], timeout_s=30.0)
        for future in late:
            with pytest.raises(mr.DeadlineError, match="not ready by its deadline"):
                future.result(30)
        assert same(fine.result(30), expected)
        monkeypatch.undo()
        assert same(study.ground(QUERIES[1]), expected)  # the slots are free again
        with pytest.raises(mr.QueryError, match="timeout_s: expected a positive number"):
            study.ground(QUERIES[0], timeout_s=0.0)


def test_who_waits_for_a_slot_has_a_deadline_too(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(n_slots=1) as grounder, grounder.open(picture()) as study:
        slow = Slow(grounder, 0.1, monkeypatch)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            long = pool.submit(study.ground, QUERIES[0], think=True)
            while not slow.rows:
                time.sleep(0.005)
            start = time.monotonic()
            with pytest.raises(mr.DeadlineError):
                study.ground(QUERIES[1], timeout_s=0.05)
            assert time.monotonic() - start < 1
            assert not long.done()
            monkeypatch.undo()
            assert long.result(60).found


def test_a_full_queue_refuses_at_once(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(n_slots=2, max_waiting=1) as grounder, grounder.open(picture()) as study:
        slow = Slow(grounder, 0.05, monkeypatch)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(study.ground, query, think=True) for query in QUERIES[:3]]
            while 2 not in slow.rows:
                time.sleep(0.005)
            with pytest.raises(mr.QueueFullError, match="2 questions are being answered and 1 wait"):
                study.ground(QUERIES[3])
            monkeypatch.undo()
            assert all(future.result(60).found for future in asked)
        assert study.ground(QUERIES[3]).found
        assert all(each.found for each in grounder.ground(picture(), QUERIES * 3))  # a list is no crowd


def test_an_event_loop_goes_on_and_may_cancel(
    load: Loader, plain: Callable[..., mr.Grounding], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(grounder: mr.Grounder) -> None:
        image, beats = picture(), 0
        found = await asyncio.gather(*(grounder.aground(image, query) for query in QUERIES))
        for query, each in zip(QUERIES, found, strict=True):
            assert same(each, plain(image, query))
        Slow(grounder, 0.05, monkeypatch)
        task = asyncio.create_task(grounder.aground(image, QUERIES[0], think=True))
        for _ in range(10):
            await asyncio.sleep(0.01)
            beats += 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert beats == 10
        with pytest.raises(mr.DeadlineError):
            await grounder.aground(image, QUERIES[0], think=True, timeout_s=0.1)
        monkeypatch.undo()
        assert same(await grounder.aground(image, QUERIES[0]), plain(image, QUERIES[0]))

    with load(n_slots=2) as grounder:
        asyncio.run(ask(grounder))
        assert not grounder._engine.reasoner._scheduler._active


def test_a_failing_run_fails_those_who_took_part_and_no_other(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise mr.ProviderError("the device is gone")

    with load() as grounder, grounder.open(picture()) as study:
        expected = study.ground(QUERIES[0])
        with monkeypatch.context() as patch:
            patch.setattr(grounder._engine.reasoner._decoder, "run", fail)
            patch.setattr(scheduler, "write_together", fail)
            with pytest.raises(mr.ProviderError, match="the device is gone"):
                study.ground(QUERIES[0])
        assert same(study.ground(QUERIES[0]), expected)


def test_an_interrupt_leaves_the_model_usable(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with load() as grounder, grounder.open(picture()) as study:
        expected = study.ground(QUERIES[0])
        with monkeypatch.context() as patch:
            patch.setattr(grounder._engine.reasoner._decoder, "run", interrupt)
            patch.setattr(scheduler, "write_together", interrupt)
            with pytest.raises(KeyboardInterrupt):
                study.ground(QUERIES[0])
        assert same(study.ground(QUERIES[0]), expected)


@both_roads
def test_python_goes_on_beside_the_kernels(load: Loader) -> None:
    """A thread that counts must not stand still while another one answers."""
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    with load() as grounder:
        thread = threading.Thread(target=count)
        thread.start()
        try:
            before = counted[0]
            assert grounder.ground(picture(), QUERIES[0]).found
            assert counted[0] > before
        finally:
            stop.set()
            thread.join()


def test_an_image_is_read_once(load: Loader, plain: Callable[..., mr.Grounding]) -> None:
    image = picture()
    with load() as grounder:
        first, again = (grounder.ground(image, QUERIES[0]) for _ in range(2))
        other = grounder.ground(image.copy(), QUERIES[1])
        assert "vision" in first.timings_ms
        assert "cache" not in first.timings_ms
        for found in (again, other):
            assert "cache" in found.timings_ms
            assert "vision" not in found.timings_ms
        assert same(again, first)
        assert same(other, plain(image, QUERIES[1]))
        assert len(grounder._engine.readings) == 1
    assert len(grounder._engine.readings) == 0


def test_images_that_look_alike_are_told_apart(load: Loader, plain: Callable[..., mr.Grounding]) -> None:
    """They differ in one pixel that the cache's key does not hold."""
    image = picture(height=300, width=301)
    with load() as grounder:
        grounder.ground(image, QUERIES[0])
        for place in (1, image.size - 1):
            other = image.copy()
            other.flat[place] ^= 255
            found = grounder.ground(other, QUERIES[0])
            assert "cache" not in found.timings_ms
            assert same(found, plain(other, QUERIES[0]))
        assert "cache" not in grounder.ground(image.reshape(301, 300), QUERIES[0]).timings_ms
        assert "cache" not in grounder.ground(np.stack([image] * 3, axis=-1), QUERIES[0]).timings_ms


def test_an_array_that_changes_is_read_again(load: Loader, plain: Callable[..., mr.Grounding]) -> None:
    image = picture()
    with load() as grounder:
        before = grounder.ground(image, QUERIES[0])
        image[:] = 255 - image
        after = grounder.ground(image, QUERIES[0])
        assert "cache" not in after.timings_ms
        assert same(after, plain(image, QUERIES[0]))
        image[:] = 255 - image
        assert same(grounder.ground(image, QUERIES[0]), before)


def test_the_image_nobody_asked_about_goes_first(load: Loader) -> None:
    images = [picture(seed=seed) for seed in range(3)]
    with load() as grounder:
        for image in images:
            grounder.open(image).segment(box=(1, 1, 20, 20), points=((3, 3), (9, 9)))  # waits for the segmenter
        each = grounder._engine.readings.n_bytes // 3
    assert each > images[0].nbytes
    with load(cache_bytes=int(2.5 * each)) as grounder:

        def is_kept(image: NDArray[np.uint8]) -> bool:
            with grounder.open(image) as study:
                study.segment(box=(1, 1, 20, 20), points=((3, 3), (9, 9)))
                return "cache" in study.timings_ms

        assert [is_kept(images[index]) for index in (0, 1, 0, 2, 0, 1)] == [False, False, True, False, True, False]
        assert grounder._engine.readings.n_bytes <= 2.5 * each


def test_who_asks_at_once_shares_the_reading(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    with load() as grounder:
        reasoner = grounder._engine.reasoner
        encode, runs = reasoner.encode, list[int]()

        def slow(*args: Any) -> Any:
            runs.append(len(args[0]))
            time.sleep(0.05)
            return encode(*args)

        monkeypatch.setattr(reasoner, "encode", slow)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda query: grounder.ground(picture(), query), QUERIES))
        assert all(each.found for each in found)
        assert runs == [1]


def test_a_reading_that_failed_is_not_kept() -> None:
    cache, pixels = ReadingCache(), picture()

    def fail() -> Any:
        raise mr.GenerationError("no")

    for _ in range(2):
        with pytest.raises(mr.GenerationError):
            cache.find_or_read(pixels, fail)
    assert len(cache) == 0


@both_roads
@pytest.mark.parametrize("think", [False, True])
def test_drawn_answers_are_the_same_again_whatever_runs_beside(load: Loader, think: bool) -> None:
    image, options = picture(), {"samples": 5, "seed": 3, "think": think}
    with load(cache_bytes=0) as grounder:
        alone = grounder.ground(image, QUERIES[0], **options)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(grounder.ground, image, query, **options) for query in QUERIES[:4]]
            beside = [future.result(60) for future in asked]
        other = grounder.ground(image, QUERIES[0], samples=5, seed=4, think=think)
    with load(n_slots=2, cache_bytes=0) as grounder:  # in three groups
        slow = grounder.ground(image, QUERIES[0], **options)
    for found in (beside[0], slow):
        assert same(found, alone)
        assert found.concord == alone.concord
        np.testing.assert_array_equal(found.votes, alone.votes)
    assert other.concord != alone.concord


@both_roads
def test_drawn_answers_agree_on_a_mask(load: Loader) -> None:
    image = picture()
    with load() as grounder, grounder.open(image) as study:
        found = study.ground(QUERIES[0], samples=7)
        assert found.votes is not None
        assert found.agreement is not None
        assert found.concord is not None
        assert (found.n_samples, found.votes.dtype, found.votes.shape) == (7, np.uint8, image.shape)
        assert 0 < found.concord < 1
        assert found.votes.max() <= 7
        np.testing.assert_array_equal(found.mask, found.votes >= 4)
        np.testing.assert_allclose(found.agreement, found.votes / 7, rtol=1e-6)
        assert found.confidence is None
        assert any("not calibrated" in warning for warning in found.warnings)
        assert found.to_dict()["samples"] == 7
        cold = study.ground(QUERIES[0], samples=7, temperature=1e-4)  # as good as the likeliest
        assert cold.concord == 1
        assert same(cold, study.ground(QUERIES[0]))
        assert (one := study.ground(QUERIES[0])).votes is None
        assert (one.n_samples, one.concord, one.agreement, one.confidence) == (1, None, None, None)
        several = grounder.ground(image, QUERIES[:2], samples=7)
        assert same(several[0], found)


@both_roads
def test_drawn_answers_share_the_question(load: Loader) -> None:
    with load() as grounder, grounder.open(picture()) as study:
        one, many = study.ground(QUERIES[0]), study.ground(QUERIES[0], samples=8)
        assert many.tokens["prompt"] == one.tokens["prompt"]
        counted = Slow(grounder, 0.0, monkeypatch := pytest.MonkeyPatch())
        study.ground(QUERIES[0], samples=8)
        monkeypatch.undo()
        assert counted.rows[0] == 1  # the question is read in one slot
        assert max(counted.rows) == 8
        assert len(counted.rows) <= one.tokens["decoder_runs"] + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: expected 1 to 64"),
        ({"samples": 65}, "samples: expected 1 to 64"),
        ({"samples": 2, "temperature": 0.0}, "temperature: expected a positive"),
        ({"samples": 2, "temperature": float("nan")}, "temperature: expected a positive"),
        ({"samples": 2, "seed": -1}, "seed: expected at least 0"),
        ({"samples": 2, "unconstrained": True}, "leave out 'unconstrained'"),
    ],
)
def test_draws_out_of_range_are_refused(load: Loader, options: dict[str, Any], message: str) -> None:
    with load() as grounder, pytest.raises(mr.QueryError, match=message):
        grounder.ground(picture(), QUERIES[0], **options)


@pytest.mark.parametrize(("name", "value"), [("n_slots", 0), ("max_waiting", -1), ("cache_bytes", -1)])
def test_sharing_out_of_range_is_refused(load: Loader, name: str, value: int) -> None:
    with pytest.raises(mr.ProviderError, match=f"{name}: expected at least"):
        load(**{name: value})
