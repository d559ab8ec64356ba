"""What both models made of an image, kept for the next question about the same pixels."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medreasoner.reasoner import Prefix
from medreasoner.segmenter import Embedded

__all__ = ["CACHE_BYTES", "Reading", "ReadingCache"]

CACHE_BYTES = 256 * 2**20
"""Memory for readings, if nobody says otherwise."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """An image as both models have read it; the segmenter may still be at it.

    `timings_ms` are the stages that it took. It does not change, and may be shared between threads and studies.
    """

    prefix: Prefix = field(repr=False)
    embedded: "Future[tuple[Embedded, float]]" = field(repr=False)
    timings_ms: Mapping[str, float]


@dataclass(slots=True)
class _Entry:
    pixels: Pixels
    reading: Reading
    n_bytes: int


class ReadingCache:
    """Readings by the pixels that were read; the one that was not asked for the longest goes first.

    The bundle, and with it template and window, is the same for all of them. Pixels are compared one by one: two images
    that merely look alike to a digest are never taken for each other.

    Parameters
    ----------
    budget
        Most memory that pixels, keys and values, and embeddings may take together, bytes. 0 keeps nothing.
    """

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
        self._in_work: dict[tuple[object, ...], threading.Event] = {}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, pixels: Pixels) -> Reading | None:
        """The reading of these pixels (H, W) or (H, W, 3), if it is kept."""
        key = _key(pixels)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not _equal(entry.pixels, pixels):
                return None
            self._entries.move_to_end(key)
            return entry.reading

    def find_or_read(self, pixels: Pixels, read: Callable[[], Reading]) -> tuple[Reading, bool]:
        """The reading of these pixels, and whether it was kept; if not it is made, once for all who ask meanwhile."""
        if self._budget <= 0:
            return read(), False
        key = _key(pixels)
        while True:
            if found := self.find(pixels):
                return found, True
            with self._lock:
                other = self._in_work.get(key)
                if other is None:
                    done = self._in_work[key] = threading.Event()
                    break
            other.wait()
            if self.find(pixels) is None:  # it failed, was too large, or is of another image: each for himself
                return read(), False
        try:
            reading = read()
            self.keep(pixels, reading)
            return reading, False
        finally:
            with self._lock:
                del self._in_work[key]
            done.set()

    def keep(self, pixels: Pixels, reading: Reading) -> None:
        """Keep a reading, as long as there is room."""
        if pixels.nbytes + reading.prefix.saved.n_bytes > self._budget:
            return
        key = _key(pixels)
        own = pixels.copy()  # the caller may change his array
        with self._lock:
            self._remove(key)
            self._entries[key] = _Entry(own, reading, own.nbytes + reading.prefix.saved.n_bytes)
            self.n_bytes += self._entries[key].n_bytes
            self._make_room()
        reading.embedded.add_done_callback(lambda future: self._settle(key, reading, future))

    def clear(self) -> None:
        """Give everything up."""
        with self._lock:
            self._entries.clear()
            self.n_bytes = 0

    def _settle(self, key: tuple[object, ...], reading: Reading, future: "Future[tuple[Embedded, float]]") -> None:
        """Count the embedding, now that it is there; without one the reading is worth nothing."""
        try:
            embedded, _ = future.result()
            size = sum(each.nbytes for each in embedded.features.values())
        except (Exception, FutureCancelled):
            size = None
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.reading is not reading:
                return
            if size is None:
                self._remove(key)
                return
            entry.n_bytes += size
            self.n_bytes += size
            self._make_room()

    def _make_room(self) -> None:
        while self.n_bytes > self._budget:
            self._remove(next(iter(self._entries)))

    def _remove(self, key: tuple[object, ...]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.n_bytes -= entry.n_bytes


def _key(pixels: Pixels) -> tuple[object, ...]:
    """Shape and a sample of the pixels: enough to tell most images apart, and a hundredth of reading them all."""
    flat = pixels.reshape(-1)
    return (pixels.shape, flat[:: max(1, flat.size // 4096)].tobytes())


def _equal(one: Pixels, other: Pixels) -> bool:
    """Whether all pixels are the same, eight at a time."""
    if one.shape != other.shape:
        return False
    a, b = one.reshape(-1), other.reshape(-1)
    whole = a.size // 8 * 8
    return np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64)) and np.array_equal(a[whole:], b[whole:])
