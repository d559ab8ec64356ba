"""Where `medreasoner-cli` starts: Ctrl-C ends it without a traceback from the first moment on."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["main", "without_collecting"]


def main() -> None:
    """Import the program and run it; while it is imported, the signal ends the process by itself."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where a shell runs the program in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["ground"]:  # multiplies no matrix in NumPy, whose threads would spin beside the start's own
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from medreasoner_cli.main import main as program

    signal.signal(signal.SIGINT, handler)
    program()


@contextmanager
def without_collecting() -> Iterator[None]:
    """Nothing becomes garbage while modules and models are loaded: looking for it takes a tenth of the start."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
