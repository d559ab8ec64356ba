"""Keeps the chatter of the decoding libraries away from the user.

pydicom warns and logs about faulty elements and may quote their values, which are patient data. What matters to the
user is said in ``Image.warnings`` instead.
"""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

_LIBRARIES = r"(pydicom|PIL|nibabel|pylibjpeg|openjpeg|libjpeg|jpeg_ls|gdcm|highdicom|medreasoner\.image)(\.|$)"
_LOGGERS = (
    "pydicom",
    "pydicom.pixels.decoders.base",
    "openjpeg.decode",
    "PIL.TiffImagePlugin",
    "PIL.PngImagePlugin",
    "nibabel.global",
)

_lock = threading.Lock()
_readers = 0
_saved: warnings.catch_warnings | None = None


def _drop(_record: logging.LogRecord) -> bool:
    return False


def _enter() -> None:
    global _readers, _saved
    with _lock:
        _readers += 1
        if _readers == 1:
            _saved = warnings.catch_warnings()
            _saved.__enter__()
            warnings.filterwarnings("ignore", module=_LIBRARIES)
            for name in _LOGGERS:
                logging.getLogger(name).addFilter(_drop)


def _leave() -> None:
    global _readers, _saved
    with _lock:
        _readers -= 1
        if _readers == 0 and _saved is not None:
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(_drop)
            _saved.__exit__(None, None, None)
            _saved = None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings and log records for the time of a read.

    The filters belong to the process, so that readers in several threads share one entry: the first saves them, the
    last restores them. Saving and restoring once per reader would let two overlapping reads undo each other.
    """
    _enter()
    try:
        yield
    finally:
        _leave()
