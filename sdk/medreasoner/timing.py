"""Wall-clock time by stage."""

import time

__all__ = ["Stopwatch"]


class Stopwatch:
    """Milliseconds from lap to lap, the first from its making."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        now = time.perf_counter()
        spent, self._at = (now - self._at) * 1e3, now
        return spent
