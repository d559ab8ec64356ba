"""The whole grounding set in memory: decoded once, so that an epoch costs resizing only."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medreasoner.errors import MedReasonerError
from medreasoner_train.data import ImageRecord, load_mask, load_pixels
from medreasoner_train.files import keep_arrays, kept_arrays
from medreasoner_train.targets import box_of, inscribed_points

__all__ = ["DRAWS", "Stored", "load_store", "redraws", "sampling_weights"]

DRAWS = 50
"""Images that are tried for one that shows something."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One image with its targets.

    pixels : (H, W) or (H, W, 3) uint8; masks : (K, H, W) bool; boxes : (K, 4) and points : (K, 2, 2) float64, (x, y) in
    the image's pixels; K labelled structures in the order of ``record.samples``; guessed : categories of them of whose
    mask no more than box and points mean something (:mod:`medreasoner_train.inferred`).
    """

    record: ImageRecord
    pixels: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    boxes: npt.NDArray[np.float64]
    points: npt.NDArray[np.float64]
    guessed: frozenset[str] = frozenset()


def load_store(records: Sequence[ImageRecord], *, cache: Path | None = None) -> list[Stored]:
    """Decode `records` and work out their targets; the points, which cost most, are kept in `cache` (.npz).

    Raises
    ------
    BundleError
        If the cache is damaged; the message names it.
    """
    known: dict[str, npt.NDArray[np.float64]] = {}
    if cache is not None and cache.exists():
        ids, points = kept_arrays(cache, ("ids", "points"))
        known = dict(zip(ids.tolist(), points, strict=True))

    def read(record: ImageRecord) -> Stored:
        masks = np.stack([load_mask(sample.mask) for sample in record.samples])
        points = [
            known[sample.id] if sample.id in known else inscribed_points(mask)
            for sample, mask in zip(record.samples, masks, strict=True)
        ]
        return Stored(
            record=record,
            pixels=load_pixels(record.image),
            masks=masks,
            boxes=np.array([box_of(mask) for mask in masks]),
            points=np.stack(points),
        )

    with ThreadPoolExecutor(4) as pool:
        stored = list(pool.map(read, records))
    found = {
        sample.id: points for item in stored for sample, points in zip(item.record.samples, item.points, strict=True)
    }
    if cache is not None and not found.keys() <= known.keys():
        known.update(found)
        keep_arrays(cache, ids=np.array(list(known)), points=np.stack(list(known.values())))
    return stored


def redraws(index: int, weights: npt.NDArray[np.float64], rng: np.random.Generator) -> Iterator[int]:
    """An image drawn, and others to try in its place, fifty in all: at the training size its structures may vanish."""
    yield index
    for _ in range(DRAWS - 1):
        yield int(rng.choice(len(weights), p=weights))


def sampling_weights(stored: Sequence[Stored], emphasis: Mapping[str, float] | None = None) -> npt.NDArray[np.float64]:
    """Probability (N,) of drawing each image: that of its rarest structure, by one over the root of its count.

    Rare categories are seen more often, but not so often that a handful of images is learnt by heart. `emphasis` names
    sources whose images are to be drawn so many times as often.

    Raises
    ------
    MedReasonerError
        If `emphasis` names a source that the images do not have; the message lists them.
    """
    emphasis = emphasis or {}
    sources = {item.record.source for item in stored}
    if unknown := sorted(emphasis.keys() - sources):
        raise MedReasonerError(f"no images of the source {', '.join(unknown)}; there are {', '.join(sorted(sources))}")
    counts = Counter(sample.key for item in stored for sample in item.record.samples)
    weights = np.array([max(max(counts[s.key], 15) ** -0.5 for s in item.record.samples) for item in stored])
    weights *= [emphasis.get(item.record.source, 1.0) for item in stored]
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares
