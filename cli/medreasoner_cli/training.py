"""What is seen of a training: log lines and, on a terminal, a bar below them."""

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import typer

__all__ = ["close_bar", "show_lines", "training_bar"]

_PARTS = 1_000_000  # of a bar, which is drawn again when it has moved
_shown = ExitStack()


class _Lines(logging.Handler):
    """Log lines on the error stream; one takes the place of the bar, which is drawn again below it."""

    has_bar = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        print("\r\x1b[K" * self.has_bar + self.format(record), file=sys.stderr, flush=True)


_LINES = _Lines()
_LINES.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


def show_lines() -> None:
    """Show what the training logs."""
    logger = logging.getLogger("medreasoner_train")
    if not logger.handlers:
        logger.addHandler(_LINES)
    logger.setLevel(logging.INFO)


def training_bar() -> Callable[[float, str], None] | None:
    """A function that draws how much of a run is over, in [0, 1], and words about it; None if there is no terminal.

    The bar is there from its first call until its end or :func:`close_bar`: what is loaded before has bars of its own.
    """
    if not sys.stderr.isatty():
        return None
    bars: list[Any] = []

    def show(share: float, text: str) -> None:
        if not bars:
            bar = typer.progressbar(length=_PARTS, file=sys.stderr, show_eta=False, label=text)
            bars.append(_shown.enter_context(bar))
            _LINES.has_bar = True
        bars[0].label = text
        bars[0].update(int(share * _PARTS) - bars[0].pos)
        if share >= 1:
            close_bar()

    return show


def close_bar() -> None:
    """End the line of the bar, if there is one, for what else is to be said."""
    _LINES.has_bar = False
    _shown.close()
