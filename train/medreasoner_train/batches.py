"""Batches that are prepared before they are needed, by a thread or by processes."""

import dataclasses
import pickle
import threading
from collections.abc import Callable, Generator
from queue import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader

from medreasoner._text import one_line

__all__ = ["batches"]


def batches(make: Callable[[int], Any], start: int, stop: int, *, ahead: int = 3, workers: int = 0) -> Generator[Any]:
    """``make(step)`` for each step, prepared `ahead` of the use in a thread, or in `workers` processes.

    A batch depends on its step alone, so a resumed run sees the very batches that it would have seen. What `make`
    raises is raised where its batch would have been used; no other batch is waited for then.
    """
    return _by_processes(make, start, stop, ahead, workers) if workers else _by_thread(make, start, stop, ahead)


@dataclasses.dataclass(frozen=True, slots=True)
class _ByStep:
    """A data set whose item `step` is the batch of that step, or what was raised instead."""

    make: Callable[[int], Any]

    def __getitem__(self, step: int) -> tuple[Any, Exception | None]:
        try:
            return self.make(step), None
        except Exception as err:  # torch would raise another, with a trace for its message
            return None, _sendable(err)


def _sendable(err: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(err))
    except Exception:
        return RuntimeError(f"{type(err).__name__}: {one_line(err)}")
    return err


def _by_processes(make: Callable[[int], Any], start: int, stop: int, ahead: int, workers: int) -> Generator[Any]:
    # Forked processes share the decoded images; one thread each, or they fight over the cores.
    loader: DataLoader[Any] = DataLoader(
        _ByStep(make),  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(start, stop),
        collate_fn=lambda batch: batch,  # the default makes lists of tuples
        num_workers=workers,
        prefetch_factor=ahead,
        multiprocessing_context="fork",
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    prepared: Any = iter(loader)
    try:
        for batch, err in prepared:
            if err is not None:
                raise err
            yield batch
    finally:
        for worker in prepared._workers:  # torch would wait five seconds for each that is at work
            worker.terminate()


def _by_thread(make: Callable[[int], Any], start: int, stop: int, ahead: int) -> Generator[Any]:
    queue: Queue[tuple[Any, BaseException | None]] = Queue(maxsize=ahead)
    stopped = threading.Event()

    def fill() -> None:
        for step in range(start, stop):
            if stopped.is_set():
                return
            try:
                queue.put((make(step), None))
            except BaseException as err:
                queue.put((None, err))
                return

    threading.Thread(target=fill, daemon=True).start()
    try:
        for _ in range(start, stop):
            batch, err = queue.get()
            if err is not None:
                raise err
            yield batch
    finally:
        stopped.set()
        while not queue.empty():
            queue.get_nowait()
