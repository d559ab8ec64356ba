"""The engines that TensorRT builds inside ONNX Runtime: kept in a folder, and never built in silence."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medreasoner.cuda import compute_capability
from medreasoner.errors import ProviderError

__all__ = ["EngineCache"]

logger = logging.getLogger(__name__)


class EngineCache:
    """Engines of one graph in a folder; logs a warning before one is built and after.

    Parameters
    ----------
    folder
        Where they are kept; one for each bundle, since the files' names do not tell bundles apart.
    graph
        Name that their files begin with.
    """

    def __init__(self, folder: Path, graph: str) -> None:
        self._folder, self._graph = folder, graph
        self._notes = folder / f"{graph}.json"

    @property
    def prefix(self) -> str:
        """What the names of the files begin with, for ONNX Runtime's option of that name."""
        return f"{self._graph}_engine"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tell of engines that come to be while the block runs.

        An engine is made when a session starts, or when a run has a shape that the last one was not made for.
        """
        there = self._engines()
        if not self._fitting(there):
            logger.warning(
                "TensorRT builds an engine of %s now%s; it is kept in %s", self._graph, self._last_time(), self._folder
            )
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        if self._engines() - there:
            logger.warning("TensorRT built an engine of %s in %.0f s, kept in %s", self._graph, spent, self._folder)
            with suppress(OSError):  # the note is a courtesy
                self._notes.write_text(json.dumps({"seconds": round(spent, 1)}))

    def _engines(self) -> set[tuple[str, int]]:
        """Names and times of change: an engine that is built anew takes the old one's place."""
        return {(path.name, path.stat().st_mtime_ns) for path in self._folder.glob(f"{self.prefix}*.engine")}

    @staticmethod
    def _fitting(engines: set[tuple[str, int]]) -> bool:
        """Whether one of them was built for this GPU, which ONNX Runtime says at the end of the name."""
        try:
            architecture = "sm{}{}".format(*compute_capability())
        except ProviderError:  # there is none, and nothing will be built
            return True
        return any(architecture in name for name, _ in engines)

    def _last_time(self) -> str:
        try:
            return f", which took {float(json.loads(self._notes.read_text())['seconds']):.0f} s last time"
        except (OSError, ValueError, TypeError, KeyError):
            return ", which may take minutes"
