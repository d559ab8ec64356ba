"""Images with a question each: side by side on a CPU, in batches on a GPU."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from medreasoner.ask import Ask
from medreasoner.engine import Engine, Towers
from medreasoner.image import Image, ImageSource, read_image
from medreasoner.opening import open_studies
from medreasoner.result import Grounding
from medreasoner.study import Study, answer_all
from medreasoner.timing import Stopwatch

__all__ = ["answer_each", "answer_one", "read_timed"]

_AT_ONCE = 4  # images that are read and answered together; each takes the memory of its activations
_TOWERS_FROM = 8  # images; opening sessions of one thread takes as long as reading two or three


def read_timed(source: ImageSource, frame: int | None) -> tuple[Image, float]:
    """An image, and the milliseconds that reading it took.

    Raises
    ------
    ImageReadError
        If it cannot be read.
    """
    watch = Stopwatch()
    return read_image(source, frame=frame), watch.lap()


def answer_one(
    engine: Engine, image: ImageSource, query: str, frame: int | None, ask: Ask, towers: Towers | None = None
) -> Grounding:
    """Answer to a question about an image, which `towers` read if there are some.

    Raises
    ------
    MedReasonerError
        As `Grounder.ground`.
    """
    engine.check()
    engine.reasoner.prompt.check(query)
    with open_studies(engine, [read_timed(image, frame)], ask, towers)[0] as study:
        return study.answer(query, ask, is_first=True)


def answer_each(
    engine: Engine, images: Sequence[ImageSource], queries: Sequence[str], frame: int | None, ask: Ask
) -> list[Grounding]:
    """Answers about images, one for each, in their order; the first that fails ends all.

    Raises
    ------
    MedReasonerError
        As `Grounder.ground`.
    """
    road = _side_by_side if engine.is_on_cpu else _in_batches
    return road(engine, images, queries, frame, ask)


def _side_by_side(
    engine: Engine, images: Sequence[ImageSource], queries: Sequence[str], frame: int | None, ask: Ask
) -> list[Grounding]:
    """Each image in a thread: cores do more with images of their own than where all of them share one."""
    n_slots, room = engine.reasoner.n_slots, engine.reasoner.room
    towers = engine.open_towers() if len(images) >= _TOWERS_FROM else None
    wanted = _AT_ONCE if towers is None else max(_AT_ONCE, towers.n_cores)
    n_threads = max(1, min(wanted, room // min(ask.samples, n_slots)))  # no more than the queue lets in
    with ThreadPoolExecutor(n_threads, thread_name_prefix="medreasoner-list") as pool:
        asked = [
            pool.submit(answer_one, engine, image, query, frame, ask, towers)
            for image, query in zip(images, queries, strict=True)
        ]
        try:
            return [each.result() for each in asked]
        finally:  # after an error
            pool.shutdown(wait=False, cancel_futures=True)


def _in_batches(
    engine: Engine, images: Sequence[ImageSource], queries: Sequence[str], frame: int | None, ask: Ask
) -> list[Grounding]:
    """Some images in one run of the vision tower; the next are read while questions about them are answered."""
    results: list[Grounding] = []

    def opened(start: int) -> list[Study]:
        return open_studies(engine, [read_timed(each, frame) for each in images[start : start + _AT_ONCE]], ask)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(opened, 0)
        for start in range(0, len(images), _AT_ONCE):
            with ExitStack() as closing:
                studies = [closing.enter_context(study) for study in following.result()]
                if start + _AT_ONCE < len(images):
                    following = pool.submit(opened, start + _AT_ONCE)
                asked = queries[start : start + _AT_ONCE]
                pairs = [(study, each, True) for study, each in zip(studies, asked, strict=True)]
                results += answer_all(engine, pairs, ask)
    return results
