"""Images become studies: both models read them, or what they made of the same pixels is taken from the cache."""

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import TypeVar

import numpy as np

from medreasoner.ask import Ask
from medreasoner.engine import Engine, Towers
from medreasoner.geometry import Placement
from medreasoner.image.record import Image
from medreasoner.readings import Reading
from medreasoner.segmenter import Embedded, Segmenter
from medreasoner.session import Session
from medreasoner.study import Study
from medreasoner.timing import Stopwatch

__all__ = ["open_studies"]

T = TypeVar("T")


def open_studies(
    engine: Engine, images: Sequence[tuple[Image, float]], ask: Ask, towers: Towers | None = None
) -> list[Study]:
    """Studies of images, each given with the milliseconds that reading it took, in the same order.

    Images of one grid share a run of the vision tower. The segmenter reads them meanwhile, in threads; with `towers`,
    whose callers run side by side, in the caller's own. What both made of an image is kept for the next time.

    Raises
    ------
    ImageReadError
        If a model cannot take an image of this shape.
    GenerationError
        If an image has more tokens than the reasoner holds.
    QueueFullError, DeadlineError
        As `Study.ground`.
    """
    engine.check()
    if len(images) == 1:
        (image, read), watch = images[0], Stopwatch()
        reading, was_kept = engine.readings.find_or_read(image.pixels, lambda: _read(engine, [image], ask, towers)[0])
        spent = {"cache": watch.lap()} if was_kept else reading.timings_ms
        return [_study(engine, image, reading, {"read": read, **spent})]
    watch, found = Stopwatch(), []
    for image, _ in images:
        found.append((engine.readings.find(image.pixels), watch.lap()))
    missing = [image for (image, _), (reading, _) in zip(images, found, strict=True) if reading is None]
    made = iter(_read(engine, missing, ask, towers)) if missing else iter(())
    studies = []
    for (image, read), (known, spent_ms) in zip(images, found, strict=True):
        reading = known or next(made)
        if known is None:
            engine.readings.keep(image.pixels, reading)
        stages = {"cache": spent_ms} if known else reading.timings_ms
        studies.append(_study(engine, image, reading, {"read": read, **stages}))
    return studies


def _study(engine: Engine, image: Image, reading: Reading, timings_ms: dict[str, float]) -> Study:
    return Study(engine, image, reading, {**timings_ms, "total": sum(timings_ms.values())})


def _read(engine: Engine, images: Sequence[Image], ask: Ask, towers: Towers | None) -> list[Reading]:
    """Let both models read images."""
    placements = [engine.reasoner.place(image) for image in images]
    if towers is not None:
        embedded = [_done(_encode(engine.segmenter, image, towers.encoder)) for image in images]
        return _readings(engine, images, placements, embedded, ask, towers.vision)
    embedded = [engine.submit(_encode, engine.segmenter, image) for image in images]
    try:
        return _readings(engine, images, placements, embedded, ask)
    except BaseException:
        for future in embedded:  # nobody will ask for them
            future.cancel()
        raise


def _readings(
    engine: Engine,
    images: Sequence[Image],
    placements: Sequence[Placement],
    embedded: "Sequence[Future[tuple[Embedded, float]]]",
    ask: Ask,
    vision_session: Session | None = None,
) -> list[Reading]:
    reasoner = engine.reasoner
    grids = [(placement.grid_height, placement.grid_width) for placement in placements]
    readings: dict[int, Reading] = {}
    for _, group in groupby(sorted(range(len(images)), key=grids.__getitem__), key=grids.__getitem__):
        members = list(group)
        watch = Stopwatch()
        patches = np.stack([reasoner.preprocess(images[i], placements[i]) for i in members])
        preprocess = watch.lap() / len(members)
        embeds = reasoner.encode(patches, placements[members[0]], vision_session)
        vision = watch.lap() / len(members)
        prefixes = reasoner.read_prefixes(embeds, [placements[i] for i in members], ask)
        prefill = watch.lap() / len(members)
        for i, prefix in zip(members, prefixes, strict=True):
            timings = {"preprocess": preprocess, "vision": vision, "prefill": prefill}
            readings[i] = Reading(prefix=prefix, embedded=embedded[i], timings_ms=timings)
    return [readings[i] for i in range(len(images))]


def _encode(segmenter: Segmenter, image: Image, encoder: Session | None = None) -> tuple[Embedded, float]:
    watch = Stopwatch()
    return segmenter.encode(image, encoder), watch.lap()


def _done(value: T) -> "Future[T]":
    future: Future[T] = Future()
    future.set_result(value)
    return future
